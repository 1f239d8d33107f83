"""GenEval's rules, the edit rules and their aggregates, on detections made by hand."""

import pytest

from tbac.evaluation.detectors import Detection, Scan
from tbac.evaluation.rules import aggregate_by_tag, judge_edit, judge_geneval, relations, same_answer


def at(name: str, x: float, y: float, color: str = "red", size: float = 10, score: float = 1.0) -> Detection:
    return Detection(name, color, (x - size / 2, y - size / 2, x + size / 2, y + size / 2), score)


DOG, CAT = {"class": "dog", "count": 1}, {"class": "cat", "count": 1}
CASES = {
    "present": ([at("dog", 5, 5)], {"include": [DOG]}, True),
    "absent": ([at("cat", 5, 5)], {"include": [DOG]}, False),
    "more than asked is fine": ([at("dog", 5, 5), at("dog", 50, 5)], {"include": [DOG]}, True),
    "two objects": ([at("dog", 5, 5), at("cat", 50, 5)], {"include": [DOG, CAT]}, True),
    "one of two": ([at("dog", 5, 5)], {"include": [DOG, CAT]}, False),
    "count": (
        [at("dog", 5, 5), at("dog", 50, 5)],
        {"include": [{"class": "dog", "count": 2}], "exclude": [{"class": "dog", "count": 3}]},
        True,
    ),
    "one too many": (
        [at("dog", 5, 5), at("dog", 50, 5), at("dog", 90, 5)],
        {"include": [{"class": "dog", "count": 2}], "exclude": [{"class": "dog", "count": 3}]},
        False,
    ),
    "one too few": ([at("dog", 5, 5)], {"include": [{"class": "dog", "count": 2}]}, False),
    "color": ([at("dog", 5, 5, "blue")], {"include": [{**DOG, "color": "blue"}]}, True),
    "wrong color": ([at("dog", 5, 5, "red")], {"include": [{**DOG, "color": "blue"}]}, False),
    "the most certain one is judged": (
        [at("dog", 5, 5, "blue", score=0.5), at("dog", 50, 5, "red", score=0.9)],
        {"include": [{**DOG, "color": "blue"}]},
        False,
    ),
    "position": (
        [at("dog", 5, 5), at("cat", 50, 5)],
        {"include": [CAT, {**DOG, "position": ["left of", 0]}]},
        True,
    ),
    "wrong position": (
        [at("dog", 50, 5), at("cat", 5, 5)],
        {"include": [CAT, {**DOG, "position": ["left of", 0]}]},
        False,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_geneval(case: str) -> None:
    detections, metadata, correct = CASES[case]
    verdict = judge_geneval(detections, metadata)
    assert verdict.correct == correct
    assert bool(verdict.reason) != correct


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (-40, 0, {"left of"}),
        (40, 0, {"right of"}),
        (0, -40, {"above"}),
        (0, 40, {"below"}),
        (-40, 40, {"left of", "below"}),
        (-40, 10, {"left of"}),  # too flat to be below
        (1, 1, set()),  # too close to tell
    ],
)
def test_relations(x: float, y: float, expected: set[str]) -> None:
    assert relations(at("a", x, y), at("b", 0, 0)) == expected


def test_relations_are_antisymmetric() -> None:
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    for x in range(-50, 51, 7):
        for y in range(-50, 51, 7):
            a, b = at("a", x, y), at("b", 0, 0)
            assert {opposite[r] for r in relations(a, b)} == relations(b, a)


def test_overall_is_the_mean_of_tags_and_not_of_pictures() -> None:
    scores = aggregate_by_tag([("a", True), ("a", True), ("a", True), ("b", False)])
    assert scores == {"overall": 0.5, "a": 1.0, "b": 0.0}
    with pytest.raises(ValueError, match="no picture"):
        aggregate_by_tag([])


RED, BLUE = at("circle", 4, 4, "red", 7), at("square", 20, 20, "blue", 7)
GREEN = at("circle", 4, 4, "green", 7)
EXTRA = at("triangle", 28, 4, "red", 7)


@pytest.mark.parametrize(
    ("source", "target", "found", "happened", "kept"),
    [
        ([RED, BLUE], [GREEN, BLUE], [GREEN, BLUE], True, 1.0),
        ([RED, BLUE], [GREEN, BLUE], [RED, BLUE], False, 2 / 3),  # the old circle counts as additional
        ([RED, BLUE], [GREEN, BLUE], [GREEN], True, 0.5),
        ([RED, BLUE], [BLUE], [BLUE], True, 1.0),
        ([RED, BLUE], [BLUE], [RED, BLUE], False, 2 / 3),
        ([RED], [RED, BLUE], [RED, BLUE], True, 1.0),
        ([RED], [RED, BLUE], [RED], False, 1.0),
        ([RED], [RED, BLUE], [RED, BLUE, EXTRA], True, 2 / 3),
    ],
)
def test_edits(source: list, target: list, found: list, happened: bool, kept: float) -> None:
    scans = (Scan("black", tuple(items)) for items in (source, target, found))
    verdict = judge_edit(*scans)
    assert verdict.happened == happened
    assert verdict.score == (verdict.kept if happened else 0)
    if happened:
        assert verdict.kept == pytest.approx(kept)


def test_background_edits() -> None:
    source, target = Scan("black", (RED,)), Scan("white", (RED,))
    assert judge_edit(source, target, target).score == 1
    assert not judge_edit(source, target, source).happened
    assert judge_edit(source, target, Scan("white", ())).score == 0  # happened, but nothing stayed


def test_an_added_object_may_stand_anywhere_when_no_place_is_named() -> None:
    elsewhere = at("square", 4, 28, "blue", 7)
    scans = Scan("black", (RED,)), Scan("black", (RED, BLUE)), Scan("black", (RED, elsewhere))
    assert not judge_edit(*scans).happened
    assert judge_edit(*scans, anywhere=True).score == 1


def test_answers_are_compared_without_case_space_and_full_stop() -> None:
    assert same_answer(" Red. ", "red")
    assert not same_answer("dark red", "red")
