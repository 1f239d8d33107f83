"""Variety: the probability that two right pictures of a prompt differ, whatever their number."""

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest

from data_prep.shapes.samples import write_world_file
from data_prep.shapes.scene import COLORS, Item, Scene, render
from tbac.evaluation.benchmarks.variety import Variety, compute_difference, cut_grid
from tbac.evaluation.detectors.template import TemplateDetector
from tbac.evaluation.picture_tree import join_grid

CIRCLE = Scene("black", (Item("circle", "red", 1, 1),))
MOVED = Scene("black", (Item("circle", "red", 0, 1),))
BLUE = Scene("gray", (Item("circle", "blue", 1, 1),))
SQUARE = Scene("gray", (Item("square", "blue", 1, 1),))


def judge(scenes: Sequence[Scene]) -> dict[str, float]:
    """The scores of a prompt for a circle with pictures of these scenes."""
    Path("p.jsonl").write_text(
        json.dumps({"tag": "single_object", "prompt": "a circle", "include": [{"class": "circle", "count": 1}]})
    )
    write_world_file(Path("w"))
    benchmark = Variety(name="v", file="p.jsonl", samples=len(scenes))
    grid = join_grid([render(scene) for scene in scenes])
    rows = list(benchmark.judge_pictures(lambda target: grid, TemplateDetector.from_world("w/world.json")))
    return dict(benchmark.summarize(rows, "").scores)


def test_pairs_of_right_pictures_are_compared() -> None:
    scores = judge([CIRCLE, CIRCLE, MOVED, BLUE])
    assert scores["right"] == 1
    # Of six pairs three have another place, three other colours, three another background.
    assert scores["places"] == scores["colors"] == scores["backgrounds"] == pytest.approx(3 / 6)
    assert scores["overall"] == pytest.approx(0.5)


def test_what_nobody_asked_for_is_no_variety() -> None:
    more = [Scene("black", (*CIRCLE.items, Item("square", "blue", 2, column))) for column in (0, 1, 2)]
    assert judge(more)["overall"] == 0


def test_wrong_pictures_don_t_count() -> None:
    assert judge([CIRCLE, SQUARE, CIRCLE, SQUARE]) == {
        "overall": 0, "places": 0, "colors": 0, "backgrounds": 0, "right": 0.5,
    }  # fmt: skip
    assert judge([CIRCLE, SQUARE]) == {"right": 0.5}


def test_the_number_of_pictures_doesn_t_matter_in_the_mean() -> None:
    rng, colors = Random(0), list(COLORS)
    for count in (2, 3, 8):
        found = [compute_difference(rng.choices(colors, k=count)) for _ in range(4000)]
        assert sum(found) / len(found) == pytest.approx(1 - 1 / len(colors), abs=0.02)


@pytest.mark.parametrize("count", [2, 3, 7])
def test_a_grid_is_cut_into_what_it_was_joined_of(count: int) -> None:
    pictures = [render(scene) for scene in [CIRCLE, MOVED, BLUE, SQUARE, CIRCLE, BLUE, MOVED][:count]]
    assert [cell.tobytes() for cell in cut_grid(join_grid(pictures), count)] == [p.tobytes() for p in pictures]


def test_one_picture_can_t_be_compared() -> None:
    with pytest.raises(ValueError, match=r"benchmark\.samples must be at least 2"):
        judge([CIRCLE])
