"""ImgEdit's aggregates: what a reply is worth, and the two means."""

import json
from pathlib import Path

import pytest

from tbac.evaluation.benchmarks.imgedit import (
    EditItem,
    ImgEdit,
    aggregate_edits,
    read_imgedit,
    read_judge_prompts,
    read_score,
)
from tbac.evaluation.benchmarks.rows import Row, compute_means
from tests.helpers.pictures import make_noise_image

REPLY = "Brief reasoning: fine\nPrompt Compliance: 5\nVisual Naturalness: 4\nPhysical & Detail Integrity: 4"


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        (REPLY, 4.33),
        ("a: 1\nb: 2\nc: 3", 2.0),
        ("  a: 5  ", 5.0),
        ("a: 5\nReasoning: it has: 2 flaws", 5.0),  # two colons: not a rating
        ("a: 4.5\nb: 3", 3.0),  # whole numbers alone
        ("a: -1\nb: 3", 3.0),
        ("a:5", None),
        ("I can't judge this", None),
        ("", None),
        ("a: five", None),
    ],
)
def test_ratings_of_a_reply(reply: str, score: float | None) -> None:
    assert read_score(reply) == score


def test_macro_is_over_kinds_and_micro_over_edits() -> None:
    kinds = {"1": "add", "2": "add", "3": "add", "4": "remove"}
    found = aggregate_edits({"1": "a: 5", "2": "a: 4", "3": "a: 4", "4": "a: 1"}, kinds)
    assert found.by_kind == {"add": 4.33, "remove": 1.0}
    assert found.macro == pytest.approx((4.33 + 1) / 2)
    assert found.micro == pytest.approx(14 / 4)


def test_failed_and_absent_replies_are_counted_and_not_averaged() -> None:
    kinds = {str(i): f"kind {i}" for i in range(9)}
    replies: dict[str, str | None] = {key: "a: 3" for key in kinds}
    replies["2"], replies["3"] = None, "nonsense"
    del replies["4"]
    found = aggregate_edits(replies, kinds)
    assert (found.scored, found.unscored, found.macro) == (6, ["2", "3", "4"], 3.0)


def test_replies_to_nothing_and_no_rating_at_all_are_errors() -> None:
    with pytest.raises(ValueError, match="doesn't have: x"):
        aggregate_edits({"x": "a: 1"}, {"1": "add"})
    with pytest.raises(ValueError, match="no reply"):
        aggregate_edits({"1": None}, {"1": "add"})


@pytest.mark.parametrize(
    ("cells", "overall"),
    [
        ((3.82, 3.64, 2.27, 3.47, 3.24, 2.99, 4.21, 2.96, 2.74), 3.26),  # UniWorld-V1
        ((3.56, 3.31, 1.70, 3.30, 2.62, 3.24, 4.49, 2.38, 4.17), 3.20),  # BAGEL
        ((3.57, 3.06, 1.77, 3.74, 3.20, 3.57, 4.81, 2.52, 4.68), 3.44),  # OmniGen2
    ],
)
def test_the_published_kinds_give_the_published_overall(cells: tuple[float, ...], overall: float) -> None:
    """Each kind's mean is made of 100 edits rated 1 to 5."""
    replies, kinds = {}, {}
    for number, cell in enumerate(cells):
        low, share = int(cell), round(100 * (cell - int(cell)))
        for i in range(100):
            replies[f"{number}/{i}"] = f"a: {low + (i < share)}"
            kinds[f"{number}/{i}"] = f"kind {number}"
    found = aggregate_edits(replies, kinds)
    assert tuple(found.by_kind.values()) == cells
    assert round(found.macro, 2) == overall


def test_files_are_read_and_bad_ones_named(tmp_path: Path) -> None:
    make_noise_image(0).save(tmp_path / "cat.png")
    row = {"id": "cat.png", "prompt": "make it red", "edit_type": "adjust"}
    file, prompts = tmp_path / "edits.json", tmp_path / "prompts.json"
    file.write_text(json.dumps({"7": row}))
    assert read_imgedit(file, tmp_path)["7"] == EditItem("adjust", "make it red", tmp_path / "cat.png")
    prompts.write_text(json.dumps({"adjust": "rate <edit_prompt>"}))
    assert read_judge_prompts(prompts, {"adjust"}) == {"adjust": "rate <edit_prompt>"}
    with pytest.raises(ValueError, match="for edits of kind 'style'"):
        read_judge_prompts(prompts, {"adjust", "style"})
    for content, words in (
        ("[", "isn't JSON"),
        ("{}", "at least one entry"),
        (json.dumps({"7": {"id": "cat.png"}}), "edit '7' needs 'prompt' as str"),
        (json.dumps({"7": {**row, "id": "dog.png"}}), r"edit '7': .*dog\.png can't be opened"),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=words):
            read_imgedit(file, tmp_path)
    with pytest.raises(ValueError, match="doesn't exist"):
        read_imgedit(tmp_path / "absent.json", tmp_path)


def test_the_means_that_intervals_come_from_are_the_scores(tmp_path: Path) -> None:
    make_noise_image(0).save(tmp_path / "cat.png")
    edits = {str(i): {"id": "cat.png", "prompt": "p", "edit_type": ("add", "style")[i % 2]} for i in range(7)}
    (tmp_path / "edits.json").write_text(json.dumps(edits))
    benchmark = ImgEdit(name="imgedit", file=str(tmp_path / "edits.json"), images=str(tmp_path))
    rows = []
    for i, target in enumerate(benchmark.targets):
        reply = f"a: {1 + i % 5}\nb: {5 - i % 3}\nc: 2"
        state, details = ("failed", {}) if i == 3 else ("scored", {"reply": reply})
        rows.append(Row(target.path, benchmark.find_group(target), "p", state, None, "", details))
    means = compute_means([count for row in rows for count in benchmark.count(row)])
    assert benchmark.combine(means) == pytest.approx(dict(benchmark.summarize(rows, "j").scores))
