"""MLflow's pages in Debian's Chromium: from a multirun, and from a sweep, by the links that are printed."""

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers.browser import HAS_BROWSER, NO_BROWSER, Page, find_free_port, wait_until_served
from tests.helpers.commands import FEW, run_to_success
from tests.helpers.configs import ROOT

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(not HAS_BROWSER, reason=NO_BROWSER),
]
CELL = "//div[@role='gridcell' and @col-id='{column}']"


@contextmanager
def serve() -> Iterator[dict[str, str]]:
    """`make ui` for the store of this test; yields the links that it prints, by their names."""
    port = find_free_port()
    process = subprocess.Popen(
        ["make", "-s", "ui", f"PORT={port}"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        links: dict[str, str] = {}
        while "beside each other" not in links:
            line = process.stdout.readline()
            assert line, "make ui ended"
            name, _, link = line.strip().partition(": ")
            if link.startswith("http"):
                links[name] = link
        wait_until_served(f"http://127.0.0.1:{port}/", process)
        yield links
    finally:
        os.killpg(process.pid, 15)
        process.wait(30)


def read_column(page: Page, column: str) -> list[str]:
    """The texts of a column, from top to bottom."""
    page.find(f"div[role=gridcell][col-id='{column}']")
    cells = page.browser.find_elements("xpath", CELL.format(column=column))
    return [cell.text for cell in sorted(cells, key=lambda cell: cell.location["y"])]


def check_comparison(page: Page, link: str, turned: set[str]) -> None:
    """The page that compares runs opens on what was turned, and on the validation loss."""
    page.browser.get("about:blank")
    page.browser.get(link)
    page.wait_for("body", "Comparing")
    page.find("[class*=select-selection-item-content]")
    chosen = page.browser.find_elements("css selector", "[class*=select-selection-item-content]")
    assert {one.text for one in chosen} == {"val/loss", *turned}


def check_pictures(page: Page, link: str, folder: Path) -> None:
    """The sample grids of a run are pictures of its steps, large enough to be read."""
    run = re.sub(r"/runs\?.*", "/runs", link)
    page.browser.get("about:blank")
    page.browser.get(link)
    href = page.find("a[href*='/runs/']").get_attribute("href").split("?")[0]
    assert href.startswith(run)
    page.browser.get("about:blank")
    page.browser.set_window_size(1600, 4000)  # charts are drawn when they come into view
    page.browser.get(f"{href}/model-metrics?workflowType=machine_learning")
    picture = page.find("img[src*='get-artifact']")
    page.browser.execute_script("arguments[0].click()", picture)
    page.find(".ant-image-preview-img, [class*=image-preview-img]")
    # The page shows a small copy until it has loaded the picture itself.
    page.wait_until("return [...document.querySelectorAll('img')].some(image => image.naturalWidth > 600)")
    page.browser.save_screenshot(str(folder / "samples.png"))
    page.browser.set_window_size(1600, 1000)


def test_a_multirun_is_a_list_by_loss_a_comparison_and_pictures(
    in_world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    points = ["taps=last_n,uniform,first,final", "stage.lr=1e-3,2e-3"]
    run_to_success("train", capfd, "-m", *FEW, *points, "hydra.sweep.dir=sweep", "logger=mlflow")
    with serve() as links:
        page = Page(links["runs of taps x lr"], width=1600)
        try:
            page.wait_for("body", "8 matching runs")
            losses = [float(text) for text in read_column(page, "metrics.`val/loss`")]
            assert len(losses) == 8
            assert losses == sorted(losses)
            cells = read_column(page, "attributes.`Run Name`")
            names = {text.splitlines()[-1] for text in cells if text}  # its colour comes first
            wanted = {f"{t} lr={lr}" for t in ("last_n", "uniform", "first", "final") for lr in ("0.001", "0.002")}
            assert {name.split(" seed")[0] for name in names} == wanted
            page.browser.save_screenshot(str(tmp_path / "list.png"))
            check_comparison(page, links["beside each other"], {"taps", "lr", "tap_layers"})
            page.browser.save_screenshot(str(tmp_path / "comparison.png"))
            check_pictures(page, links["runs of taps x lr"], tmp_path)
        finally:
            page.browser.quit()


def test_a_sweep_is_a_list_by_score(in_world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    small = ["stage.steps=2", "stage.warmup_steps=0", "stage.val_every=1", "stage.val_samples=8", "stage.batch_size=4"]
    overrides = [*small, "taps=last_n,final", "seed=0,1", "callbacks.sample_grid.prompts=[]"]
    arguments = [
        "name=layer_selection_mini",
        f"out={tmp_path}/sweep",
        "geneval.num_inference_steps=2",
        "overrides=[" + ",".join(f"'{o}'" for o in overrides) + "]",
    ]
    text = run_to_success("sweep", capfd, *arguments)
    assert "make ui serves its runs: http://127.0.0.1:5000/#/experiments/" in text
    with serve() as links:
        page = Page(links["runs of layer_selection_mini"], width=1600)
        try:
            page.wait_for("body", "4 matching runs")
            scores = [float(text) for text in read_column(page, "metrics.`geneval/overall`")]
            assert len(scores) == 4
            assert scores == sorted(scores, reverse=True)
            page.browser.save_screenshot(str(tmp_path / "sweep.png"))
            check_comparison(page, links["beside each other"], {"taps", "seed", "tap_layers"})
        finally:
            page.browser.quit()
