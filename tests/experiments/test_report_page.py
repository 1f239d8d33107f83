"""The report's files: two models side by side, and the page in Chromium at the widths of a desk and a phone."""

import http.server
import json
import threading
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from experiments.scores.report import Evaluation, Report, choose_sheets, list_prompts, write_report
from tbac.evaluation.benchmarks.geneval import GenEval
from tbac.evaluation.benchmarks.rows import Drawn, Row
from tbac.evaluation.judges.base import JudgeFacts
from tests.helpers.browser import HAS_BROWSER, NO_BROWSER, Page

LONG = "a photo of a dog " + "that is described at some length, " * 12 + "and <b>not</b> cut off"


def make_benchmark(folder: Path) -> GenEval:
    """Six prompts of two tags, two pictures each."""
    include = [{"class": "dog", "count": 1}]
    rows = [
        {"tag": ("colors", "position")[i % 2], "prompt": LONG if i == 0 else f"prompt {i}", "include": include}
        for i in range(6)
    ]
    (folder / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return GenEval(name="geneval", file=str(folder / "x.jsonl"), samples=2)


def evaluate(benchmark: GenEval, out: Path, name: str, right: set[int]) -> Evaluation:
    """A model that is right in some prompts, with pictures of its own."""
    root, rows = out / name / "geneval", []
    for target in benchmark.targets:
        path = root / target.path
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (400, 200), (10 * int(target.item), len(name), 99)).save(path)
        score = float(int(target.item) in right)
        reason = "" if score else "expected dog >= 1, found 0"
        rows.append(Row(target.path, benchmark.find_group(target), target.prompt, "scored", score, reason))
    protocol = benchmark.describe_protocol(rows, JudgeFacts("j", "w", "s"), Drawn(0, {"seed": 1}))
    return Evaluation(f"model {name}", rows, benchmark.summarize(rows, "j"), protocol, root)


@pytest.fixture
def report(tmp_path: Path) -> Report:
    benchmark = make_benchmark(tmp_path)
    ours = evaluate(benchmark, tmp_path, "ours", {0, 1, 2, 3})
    return Report(benchmark, "the judge", ours, evaluate(benchmark, tmp_path, "theirs", {0, 1}))


def test_two_models_stand_side_by_side_with_their_difference(report: Report, tmp_path: Path) -> None:
    values = write_report(report, tmp_path)
    assert values["overall"] - values["against"]["scores"]["overall"] == pytest.approx(1 / 3)
    low, high = values["against"]["intervals_of_difference"]["overall"]
    assert 0 <= low <= 1 / 3 <= high
    text, page = (tmp_path / "report.md").read_text(), (tmp_path / "report.html").read_text()
    assert "| this model | against | this model minus the other |" in text
    assert "| overall | 0.667 [" in text
    assert "| +0.333 [" in text
    assert LONG in text
    assert "and &lt;b&gt;not&lt;/b&gt; cut off" in page
    assert page.count("data:image/jpeg") == 6 * 2 * 2


def test_pictures_that_nobody_asked_for_are_named(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path)
    assert "doesn't ask for" not in (tmp_path / "report.md").read_text()
    for name in ("00077.png", "00000/samples/00000.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / "theirs/geneval" / name)
    write_report(report, tmp_path)
    words = "Of model theirs (against), pictures that the benchmark doesn't ask for lie in geneval: "
    assert f"{words}00000/samples/00000.jpg and 1 more" in (tmp_path / "report.md").read_text()


def test_no_prompt_is_among_the_best_and_the_worst(report: Report) -> None:
    prompts = list_prompts(report.benchmark, report.main.rows)
    sheets = {file: [prompt.text for prompt in chosen] for _, file, chosen in choose_sheets(prompts)}
    assert sheets == {"best": [LONG, "prompt 1", "prompt 2", "prompt 3"], "worst": ["prompt 5", "prompt 4"]}
    alike = [Row(row.picture, row.group, row.prompt, score=1.0) for row in report.main.rows]
    assert [file for _, file, _ in choose_sheets(list_prompts(report.benchmark, alike))] == ["pictures"]


@pytest.mark.browser
@pytest.mark.skipif(not HAS_BROWSER, reason=NO_BROWSER)
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_filters_and_opens_pictures_large(report: Report, tmp_path: Path, width: int) -> None:
    from selenium.webdriver.common.by import By

    write_report(report, tmp_path)
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    driver = Page(f"http://127.0.0.1:{server.server_address[1]}/report.html").browser
    # A window can't be as narrow as a phone's, but what a page is told can.
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        assert driver.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
        assert driver.execute_script("return window.innerWidth") == width

        def count_shown() -> int:
            return sum(card.is_displayed() for card in driver.find_elements(By.CLASS_NAME, "card"))

        assert count_shown() == 6
        for kind, value, expected in (("tag", "colors", 3), ("rank", "best", 2), ("tag", "", 4)):
            button = driver.find_element(By.CSS_SELECTOR, f'button[data-kind={kind}][data-value="{value}"]')
            driver.execute_script("arguments[0].click()", button)
            assert count_shown() == expected
        link = driver.find_element(By.CSS_SELECTOR, ".card:not([hidden]) .pictures a")
        thumbnail = link.find_element(By.TAG_NAME, "img").size
        driver.execute_script("arguments[0].click()", link)
        big = driver.find_element(By.CSS_SELECTOR, "dialog[open] img")
        assert big.get_attribute("src") == link.get_attribute("href")
        assert big.size["width"] > thumbnail["width"]
        driver.execute_script("arguments[0].click()", driver.find_element(By.TAG_NAME, "dialog"))
        assert not driver.find_elements(By.CSS_SELECTOR, "dialog[open]")
    finally:
        driver.quit()
        server.shutdown()
