"""The detector on the closed world, and benchmark files good and bad."""

import json
from pathlib import Path
from random import Random

import pytest
import torch
from PIL import Image

from data_prep.shapes.samples import scene_to_json
from data_prep.shapes.scene import render, sample_scene
from tbac.evaluation.benchmarks.answers import read_questions
from tbac.evaluation.benchmarks.base import SamplingOptions
from tbac.evaluation.benchmarks.edits import read_edits, run_edits, scan_from_json
from tbac.evaluation.benchmarks.geneval import read_geneval, run_geneval
from tbac.evaluation.detectors.base import Scan
from tbac.evaluation.detectors.template import TemplateDetector


@pytest.fixture
def detector(in_world: Path) -> TemplateDetector:
    return TemplateDetector.from_world(in_world / "benchmarks" / "world.json")


def said(scan: Scan) -> tuple:
    return scan.background, sorted((d.name, d.color, d.box) for d in scan.detections)


def test_the_detector_is_exact_on_what_the_world_draws(detector: TemplateDetector) -> None:
    rng = Random(11)
    for _ in range(300):
        scene = sample_scene(rng)
        assert said(detector(render(scene))) == said(scan_from_json(scene_to_json(scene)))


def test_the_detector_stands_noise_and_finds_nothing_in_noise_alone(detector: TemplateDetector) -> None:
    rng, generator = Random(12), torch.Generator().manual_seed(0)
    for _ in range(50):
        scene = sample_scene(rng)
        pixels = torch.tensor(list(render(scene).tobytes())).view(24, 24, 3)
        noisy = (pixels + 12 * torch.randn(24, 24, 3, generator=generator)).clamp(0, 255).byte()
        assert said(detector(Image.fromarray(noisy.numpy()))) == said(scan_from_json(scene_to_json(scene)))
    noise = torch.randint(0, 256, (24, 24, 3), dtype=torch.uint8, generator=generator)
    assert detector(Image.fromarray(noise.numpy())).detections == ()


class Drawer:
    """A pipeline that draws what it is told to, in place of a model."""

    def __init__(self, pictures: list[Image.Image]) -> None:
        self.pictures = iter(pictures)

    def __call__(self, prompts: list[str], **_: object) -> object:
        images = [next(self.pictures) for _ in prompts]
        return type("Output", (), {"images": images})


def test_perfect_edits_score_one_and_untouched_sources_zero(in_world: Path, detector: TemplateDetector) -> None:
    from data_prep.shapes.samples import World
    from tests.helpers.worlds import SIZES

    file = in_world / "benchmarks" / "edits.jsonl"
    edits = World.draw(0, SIZES).val_edits[:6]
    perfect = run_edits(Drawer([render(e.target) for e in edits]), file, detector, SamplingOptions())
    assert (perfect["score"], perfect["happened"], perfect["kept"]) == (1, 1, 1)
    lazy = run_edits(Drawer([render(e.source) for e in edits]), file, detector, SamplingOptions())
    assert lazy["score"] == lazy["happened"] == 0


def test_black_pictures_score_nothing(in_world: Path, detector: TemplateDetector) -> None:
    rows = read_geneval(in_world / "benchmarks" / "geneval.jsonl")
    result = run_geneval(Drawer([Image.new("RGB", (32, 32))] * len(rows)), rows, detector, SamplingOptions())
    tags = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
    assert result["scores"] == dict.fromkeys(("overall", *tags), 0)
    assert [row["tag"] for row in rows] == [t for t in tags for _ in range(2)]


def test_questions_have_true_answers(in_world: Path) -> None:
    for row in read_questions(in_world / "benchmarks" / "questions.jsonl"):
        names = [o["name"] for o in row["scene"]["objects"]]
        if row["question"].startswith("is there"):
            asked = row["question"].removeprefix("is there a ").removesuffix("?")
            assert (row["answer"] == "yes") == (asked in names)
        if row["question"].startswith("what color is the background"):
            assert row["answer"] == row["scene"]["background"]


GOOD = {"tag": "single_object", "prompt": "a dog", "include": [{"class": "dog", "count": 1}]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "doesn't exist"),
        ("", "holds no row"),
        ("a photo of a dog\n", ":1 is not JSON"),
        ("[1]\n", ":1 must be a JSON object"),
        (json.dumps(GOOD) + "\n" + json.dumps({**GOOD, "prompt": 3}), ":2 needs 'prompt' as str, got 3"),
        (json.dumps({**GOOD, "include": []}), "'include' must hold at least one object"),
        (json.dumps({**GOOD, "include": ["dog"]}), r"include\[0\] needs a 'class'"),
        (json.dumps({**GOOD, "include": [{"class": "dog", "count": 0}]}), r"positive whole 'count', got 0"),
        (
            json.dumps({**GOOD, "include": [{"class": "d", "count": 1, "position": ["near", 0]}]}),
            r"position must be \[one of left of",
        ),
        (
            json.dumps({**GOOD, "include": [{"class": "d", "count": 1, "position": ["above", 0]}]}),
            "must point at an earlier entry",
        ),
    ],
)
def test_prompt_files_of_the_wrong_form_are_named_by_line_and_field(
    tmp_path: Path, content: str | None, words: str
) -> None:
    file = tmp_path / "prompts.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=words) as error:
        read_geneval(file)
    assert str(file) in str(error.value)


def test_edit_and_question_files_are_checked(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"image": "a.png"}\n')
    for read in (read_edits, read_questions):
        with pytest.raises(ValueError, match=r"x\.jsonl:1 needs"):
            read(tmp_path / "x.jsonl")
