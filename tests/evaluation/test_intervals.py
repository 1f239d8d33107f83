"""Intervals by a bootstrap over prompts: against the textbook's, and the laws of means and differences."""

import json
from pathlib import Path

import numpy as np
import pytest

from tbac.evaluation.benchmarks.dpg import DPG
from tbac.evaluation.benchmarks.geneval import GenEval
from tbac.evaluation.benchmarks.rows import Row
from tbac.evaluation.intervals import (
    build_tally,
    compute_differences,
    compute_intervals,
    draw_resamples,
    list_cells,
    list_prompts,
)

DPG_HEADER = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language"
)
INCLUDE = [{"class": "dog", "count": 1}]


@pytest.fixture
def benchmark(tmp_path: Path) -> GenEval:
    """200 prompts of two tags, two pictures each."""
    rows = [{"tag": ("a", "b")[i % 2], "prompt": f"{i}", "include": INCLUDE} for i in range(200)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return GenEval(name="geneval", file=str(tmp_path / "x.jsonl"), samples=2)


def make_rows(benchmark: GenEval, right: np.ndarray) -> list[Row]:
    """Rows of all pictures; both of a prompt are alike."""
    return [
        Row(target.path, benchmark.find_group(target), target.prompt, score=float(right[int(target.item)]))
        for target in benchmark.targets
    ]


def test_the_interval_of_a_share_is_the_textbook_s_over_prompts_not_pictures(benchmark: GenEval) -> None:
    right = np.random.default_rng(1).random(200) < 0.7
    rows = make_rows(benchmark, right)
    low, high = compute_intervals(benchmark, rows)["overall"]
    share = benchmark.summarize(rows, "j").scores["overall"]
    assert low < share < high
    width = 2 * 1.96 * np.sqrt(sum(right[k::2].var() / 100 / 4 for k in (0, 1)))
    assert high - low == pytest.approx(width, rel=0.1)


def test_resampling_each_prompt_once_gives_the_scores(benchmark: GenEval) -> None:
    rows = make_rows(benchmark, np.random.default_rng(2).random(200) < 0.3)
    cells = list_cells(benchmark, rows)
    (means,) = build_tally(benchmark, rows, cells).resample(np.ones((1, 200)))
    assert benchmark.combine(means) == pytest.approx(benchmark.summarize(rows, "j").scores)


def test_every_resample_has_as_many_prompts_of_each_tag_as_there_are(benchmark: GenEval) -> None:
    times, tags = draw_resamples(benchmark), list(list_prompts(benchmark).values())
    assert {tuple(times[:, [t == tag for t in tags]].sum(1)) for tag in "ab"} == {(100.0,) * len(times)}


def test_a_difference_pairs_the_prompts(benchmark: GenEval) -> None:
    right = np.random.default_rng(3).random(200) < 0.5
    better = right.copy()
    better[np.flatnonzero(~right)[:10]] = True
    rows, others = make_rows(benchmark, better), make_rows(benchmark, right)
    low, high = compute_differences(benchmark, rows, others)["overall"]
    assert 0 < low < 0.05 < high < 0.1  # ten prompts more, though each share alone is much less sure
    low, high = compute_intervals(benchmark, rows)["overall"]
    assert high - low > 0.1
    assert compute_differences(benchmark, rows, rows)["overall"] == (0, 0)


@pytest.mark.parametrize(
    ("tags", "sure"),
    [
        ("ab", set()),
        ("aab", {"a"}),  # the overall score goes with b, of which there is one prompt
        ("aabb", {"a", "b", "overall"}),
        ("a", set()),
    ],
)
def test_one_prompt_of_a_group_gives_no_interval(tags: str, sure: set[str], tmp_path: Path) -> None:
    rows = [{"tag": tag, "prompt": f"{i}", "include": INCLUDE} for i, tag in enumerate(tags)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    benchmark = GenEval(name="geneval", file=str(tmp_path / "x.jsonl"), samples=2)
    judged = make_rows(benchmark, np.arange(len(tags)) % 2)
    assert set(compute_intervals(benchmark, judged)) == sure
    assert set(compute_differences(benchmark, judged, judged)) == sure


def test_a_mean_that_only_one_prompt_counts_for_has_no_interval(tmp_path: Path) -> None:
    lines = ["a,x,,1,0,,,entity (cat),q?", "b,x,,1,0,,,entity (cat),q?", "b,x,,2,0,,,colour (cat),q?"]
    (tmp_path / "q.csv").write_text("\n".join([DPG_HEADER, *lines]))
    (tmp_path / "p").mkdir()
    for name in "ab":
        (tmp_path / "p" / f"{name}.txt").write_text("a cat")
    benchmark = DPG(name="dpg", file=str(tmp_path / "p"), questions=str(tmp_path / "q.csv"))
    answers = {"a.png": {"1": True}, "b.png": {"1": False, "2": False}}
    rows = [Row(name, "", "a cat", score=0.5, details={"answers": [given] * 4}) for name, given in answers.items()]
    intervals = compute_intervals(benchmark, rows)
    assert "colour" not in intervals
    assert intervals["overall"] == (0, 100)
