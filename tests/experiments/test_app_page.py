"""The app: what it draws, keeps and shows; and, marked `browser`, the page itself in Debian's Chromium."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.ui.ladder import compute_attention, draw_weighted, list_taps, measure_norms, overlay, plot_heat
from experiments.ui.studio import Studio, draw_recipe
from tbac.models import UniImage
from tbac.sampling import UniImagePipeline
from tbac.sampling.recipe import Recipe, read_recipe
from tests.helpers.browser import HAS_BROWSER, NO_BROWSER, Page, find_free_port, wait_until_served
from tests.helpers.commands import run_to_message, run_to_success
from tests.helpers.configs import ROOT
from tests.helpers.pictures import make_noise_image
from tests.helpers.worlds import load_small_model

RECIPE = Recipe("a red circle", num_inference_steps=8, height=24, width=24)


@pytest.fixture
def studio(model: UniImage, tmp_path: Path) -> Studio:
    pipeline = UniImagePipeline(model)
    pipeline.set_progress_bar_config(disable=True)
    return Studio(pipeline, "outputs/model", tmp_path / "app", {"device": "cpu"})


def test_a_drawing_shows_previews_and_is_kept_with_its_recipe(studio: Studio) -> None:
    seen = list(studio.draw(RECIPE))
    assert len(seen) > 2
    assert [p.path is None for p in seen] == [True] * (len(seen) - 1) + [False]
    assert [p.step for p in seen[:-1]] == sorted(p.step for p in seen[:-1])
    path = seen[-1].path
    assert path is not None
    kept = read_recipe(path)
    assert (kept.prompt, kept.model) == ("a red circle", studio.fingerprint)
    assert studio.get_command(path) == f"python experiments/generate.py checkpoint=outputs/model from={path}"
    assert [p.path for p in studio.draw(RECIPE)][-1] != path


def test_a_drawing_that_isn_t_wanted_any_more_stops(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    predict = studio.pipeline.model.predict_velocity

    def count(*arguments: Any, **options: Any) -> Any:
        steps.append(1)
        return predict(*arguments, **options)

    monkeypatch.setattr(studio.pipeline.model, "predict_velocity", count)
    drawing = studio.draw(Recipe("a red circle", num_inference_steps=60))
    next(drawing)
    drawing.close()
    taken = len(steps)
    time.sleep(0.3)
    assert taken == len(steps) < 60
    assert not list(studio.folder.glob("*.png"))
    assert [p.path for p in studio.draw(RECIPE)][-1] is not None  # the next one runs


def test_mistakes_are_raised_where_the_drawing_is_waited_for(studio: Studio) -> None:
    with pytest.raises(ValueError, match="height must be a positive multiple"):
        list(studio.draw(Recipe("a red circle", height=25)))


def test_sizes_keep_the_area_and_follow_an_image(studio: Studio) -> None:
    sizes = studio.list_sizes()
    multiple = studio.pipeline.model.size_multiple
    assert all(side % multiple == 0 and side > 0 for size in sizes for side in size)
    wide, tall = (studio.choose_size(make_noise_image(1).resize(size)) for size in ((300, 100), (100, 300)))
    assert wide[0] > wide[1]
    assert tall[0] < tall[1]


def test_input_images_are_kept_once(studio: Studio) -> None:
    first, again, other = (studio.keep_input(make_noise_image(seed)) for seed in (1, 1, 2))
    assert first == again != other
    made = [p.path for p in studio.draw(Recipe("add a circle", images=(first,), num_inference_steps=2))][-1]
    assert made is not None
    assert read_recipe(made).images == (first,)


@torch.no_grad()
def test_taps_are_switched_off_one_by_one(studio: Studio) -> None:
    pipeline, taps = studio.pipeline, list_taps(studio.pipeline.model)
    pipeline.model.ladder.connector.apply(lambda m: m.weight.mul_(30) if hasattr(m, "weight") else None)
    whole = draw_weighted(pipeline, RECIPE, [1.0] * len(taps))
    assert whole.tobytes() == draw_recipe(pipeline, RECIPE).tobytes()
    pictures = [
        draw_weighted(pipeline, RECIPE, [float(index != off) for index in range(len(taps))]).tobytes()
        for off in range(len(taps))
    ]
    assert len({whole.tobytes(), *pictures}) == len(taps) + 1


def test_attention_is_what_the_blocks_compute(studio: Studio) -> None:
    """The shares of all queries add up to 1 at each place, and one of them is a block's own softmax."""
    pipeline = studio.pipeline
    count = len(pipeline.model.ladder.queries)
    maps = torch.stack([compute_attention(pipeline, RECIPE, query) for query in range(count)])
    blocks = pipeline.model.denoiser.num_blocks
    assert maps.shape == (count, blocks, 3, 3)
    torch.testing.assert_close(maps.sum(0), torch.ones(blocks, 3, 3), rtol=1e-4, atol=1e-4)
    picture = overlay(draw_recipe(pipeline, RECIPE), maps[0, 0])
    assert picture.size == (24, 24)


def test_norms_and_plots(studio: Studio) -> None:
    model = studio.pipeline.model
    norms = measure_norms(model, "a red circle")
    states = model.encode_condition(model.prompt(["a red circle"])).states[:, 0]
    torch.testing.assert_close(norms, states.float().pow(2).mean(-1).sqrt())
    assert plot_heat(norms, "norms", list_taps(model), "query").width > 300


def test_mixed_taps_are_named_by_their_blocks(in_world: Path) -> None:
    assert list_taps(load_small_model(in_world, "taps=learned_mix"))[0] == "block 0: mix of 2..5"


def test_two_models_draw_from_the_same_noise(studio: Studio, model: UniImage, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "same", standalone=True)
    for prompt, mine, theirs in studio.compare(str(tmp_path / "same"), ["a red circle", "a blue square"], RECIPE):
        assert prompt in ("a red circle", "a blue square")
        difference = torch.tensor(list(mine.tobytes())).int() - torch.tensor(list(theirs.tobytes())).int()
        assert difference.abs().max() <= 1


def test_a_picture_is_drawn_again_to_the_byte(
    model: UniImage, in_world: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model.save_pretrained("export", standalone=True)
    make_noise_image(3).save("source.png")
    options = ["checkpoint=export", "prompts=[add a circle]", "images=[source.png]", "num_inference_steps=2", "seed=5"]
    run_to_success("generate", capfd, *options, "out=first", "hydra.run.dir=run1")
    run_to_success("generate", capfd, "checkpoint=export", "from=first/00000.png", "out=again", "hydra.run.dir=run2")
    assert Path("again/00000.png").read_bytes() == Path("first/00000.png").read_bytes()
    message = run_to_message("generate", capfd, "checkpoint=export", "from=first/00000.png", "prompts=[x]")
    assert "from=PICTURE says what is drawn" in message
    with torch.no_grad():
        model.ladder.queries += 1
    model.save_pretrained("other", standalone=True)
    assert "another model" in run_to_message("generate", capfd, "checkpoint=other", "from=first/00000.png")


def test_an_app_without_a_model_says_how_to_get_one(in_world: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "make demo makes outputs/demo/model" in run_to_message("app", capfd)
    assert "port" in run_to_message("app", capfd, "port=0")


@pytest.fixture
def address(model: UniImage, in_world: Path, tmp_path: Path) -> Iterator[str]:
    """The app of a small model, running."""
    model.save_pretrained(tmp_path / "export", standalone=True)
    port = find_free_port()
    line = [sys.executable, str(ROOT / "experiments" / "app.py"), f"checkpoint={tmp_path / 'export'}", f"port={port}"]
    line += ["num_inference_steps=12", f"hydra.run.dir={tmp_path / 'app'}"]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    url = f"http://127.0.0.1:{port}/"
    try:
        wait_until_served(url, process)
        yield url
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.browser
@pytest.mark.skipif(not HAS_BROWSER, reason=NO_BROWSER)
def test_the_page_draws_edits_asks_and_looks_into_the_ladder(address: str, tmp_path: Path) -> None:
    make_noise_image(1).resize((64, 64)).save(tmp_path / "source.png")
    page, other = Page(address), Page(address, width=420)
    try:
        # Two browsers at once get their own pictures.
        for one, prompt in ((page, "a photo of a red circle"), (other, "a photo of a blue square")):
            one.type("#draw-prompt", prompt)
            one.find("#draw-start").click()
        for one in (page, other):
            one.wait_for("#draw-state", "done")
        assert page.get_source("#draw-picture") != other.get_source("#draw-picture")
        recipes = sorted(read_recipe(path).prompt for path in (tmp_path / "app").glob("0*.png"))
        assert recipes == ["a photo of a blue square", "a photo of a red circle"]
        other.browser.save_screenshot(str(tmp_path / "phone.png"))

        # A mistake is said in the page, and a drawing stops half-way.
        page.type("#draw-prompt", "")
        page.find("#draw-start").click()
        page.wait_for("body", "Write what should be drawn")
        # Two edits in a row, the second of the first one's result.
        page.open("Edit")
        chooser = page.browser.find_element("css selector", "#edit-inputs input[type=file]")
        chooser.send_keys(str(tmp_path / "source.png"))
        page.find("#edit-inputs img")
        page.type("#edit-prompt", "add a circle")
        page.find("#edit-start").click()
        page.wait_for("#edit-state", "done")
        page.find("#edit-onward").click()
        time.sleep(1)
        page.find("#edit-start").click()
        page.wait_for("#edit-command", "00003.png")  # the steps in between may be over before anyone looks
        page.wait_for("#edit-state", "done")
        edits = [read_recipe(path) for path in sorted((tmp_path / "app").glob("0*.png"))][2:]
        assert len({edit.images for edit in edits}) == len(edits) == 2

        page.open("Ask")
        page.type("#ask-question", "what is it?")
        page.find("#ask-start").click()
        time.sleep(3)

        page.open("Ladder")
        page.find("#ladder-taps input").click()
        page.find("#ladder-start").click()
        page.wait_for("#ladder-pictures", "these on")
        page.browser.save_screenshot(str(tmp_path / "desktop.png"))
        page.browser.refresh()
        assert page.find("#draw-prompt textarea").get_attribute("value") == ""
        errors = [json.dumps(e) for e in page.browser.get_log("browser") if e["level"] == "SEVERE"]
        assert not [e for e in errors if "127.0.0.1" in e and "favicon" not in e]
    finally:
        page.browser.quit()
        other.browser.quit()
