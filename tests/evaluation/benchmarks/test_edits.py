"""Edits: judged by what should be there, the same in memory and in a tree."""

import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from data_prep.shapes.samples import World
from data_prep.shapes.scene import render
from tbac.evaluation.benchmarks.edits import Edits, read_edits
from tbac.evaluation.benchmarks.in_memory import score_in_memory
from tbac.evaluation.detectors.base import Detection, Scan
from tbac.evaluation.detectors.template import TemplateDetector
from tbac.evaluation.rules import GENEVAL_THRESHOLDS
from tests.helpers.drawing import Drawer
from tests.helpers.worlds import SIZES


def test_perfect_edits_score_one_and_untouched_sources_zero(in_world: Path, detector: TemplateDetector) -> None:
    benchmark = Edits(name="edits", file=str(in_world / "benchmarks" / "edits.jsonl"))
    edits = World.draw(0, SIZES).val_edits[:6]
    perfect = score_in_memory(Drawer([render(e.target) for e in edits]), benchmark, detector).summary.scores
    assert (perfect["score"], perfect["happened"], perfect["kept"]) == (1, 1, 1)
    lazy = score_in_memory(Drawer([render(e.source) for e in edits]), benchmark, detector).summary.scores
    assert lazy["score"] == lazy["happened"] == 0


class Sharp:
    """A detector that is certain of few things, and names colours only where it is asked for them."""

    thresholds = GENEVAL_THRESHOLDS

    def __init__(self, *found: Detection) -> None:
        self.found = found

    def __call__(self, image: Image.Image, colored: Collection[str] = ()) -> Scan:
        asked = [d if d.name in colored else replace(d, color="") for d in self.found]
        return Scan("black", tuple(asked))


def test_a_real_detector_is_asked_for_colors_and_only_what_it_is_sure_of_counts(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "source.png")
    circle = {"name": "circle", "color": "red", "box": [0, 0, 4, 4]}
    square = {"name": "square", "color": "blue", "box": [10, 0, 14, 4]}
    row = {"image": "source.png", "instruction": "add a blue square", "kind": "add"}
    row |= {"source": {"background": "black", "objects": [circle]}}
    row |= {"target": {"background": "black", "objects": [circle, square]}}
    (tmp_path / "edits.jsonl").write_text(json.dumps(row))
    benchmark = Edits(name="edits", file=str(tmp_path / "edits.jsonl"))
    seen = [Detection("circle", "red", (0, 0, 4, 4), 0.9), Detection("square", "blue", (10, 0, 14, 4), 0.8)]
    ghost = Detection("letter L", "red", (5, 5, 9, 9), 0.05)
    picture = Image.new("RGB", (8, 8))
    scored = score_in_memory(Drawer([picture]), benchmark, Sharp(*seen, ghost)).summary.scores
    assert (scored["score"], scored["happened, add"]) == (1, 1)
    assert score_in_memory(Drawer([picture]), benchmark, Sharp(seen[0])).summary.scores["happened"] == 0


def test_files_are_checked(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"image": "a.png"}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl:1 needs"):
        read_edits(tmp_path / "x.jsonl")


def test_a_missing_picture_counts_as_nothing_done(in_world: Path, detector: TemplateDetector) -> None:
    benchmark = Edits(name="edits", file=str(in_world / "benchmarks" / "edits.jsonl"))
    rows = list(benchmark.judge_pictures(lambda target: None, detector))
    assert {row.state for row in rows} == {"missing"}
    assert set(benchmark.summarize(rows, "x").scores.values()) == {0}
