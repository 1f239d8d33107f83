"""GenEval's rules, the edit rules and their aggregates, on detections made by hand."""

import pytest

from tbac.evaluation.detectors.base import Detection, Scan
from tbac.evaluation.rules import (
    EVERY,
    GENEVAL_THRESHOLDS,
    Thresholds,
    find_relations,
    is_same_answer,
    judge_edit,
    judge_geneval,
)


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


def dogs(*scores: float, color: str = "red") -> list[Detection]:
    return [at("dog", 30 * i, 5, color, score=score) for i, score in enumerate(scores)]


def counting(count: int) -> dict:
    return {
        "tag": "counting",
        "include": [{"class": "dog", "count": count}],
        "exclude": [{"class": "dog", "count": count + 1}],
    }


def placed(*where: str) -> dict:
    return {"include": [CAT, *({**DOG, "position": [relation, 0]} for relation in where)]}


BLUE_DOG = {**DOG, "color": "blue"}
BY_THRESHOLDS = {
    "just above the threshold": (dogs(0.31), {"tag": "single_object", "include": [DOG]}, True),
    "at the threshold": (dogs(0.3), {"tag": "single_object", "include": [DOG]}, False),
    "below the threshold": (dogs(0.29), {"tag": "single_object", "include": [DOG]}, False),
    "counting is stricter": (dogs(0.95, 0.91), counting(2), True),
    "at the counting threshold": (dogs(0.95, 0.9), counting(2), False),
    "a doubtful one isn't counted": (dogs(0.95, 0.92, 0.5), counting(2), True),
    "a certain one too many": (dogs(0.95, 0.92, 0.91), counting(2), False),
    "without the tag a doubtful one counts": (
        dogs(0.95, 0.92, 0.5),
        {k: v for k, v in counting(2).items() if k != "tag"},
        False,
    ),
    "sixteen count": (dogs(*[0.95] * 16), counting(16), True),
    "the seventeenth doesn't": (dogs(*[0.95] * 17), counting(16), True),
    "so seventeen are never found": (dogs(*[0.95] * 17), counting(17), False),
    "sixteen of each class": ([*dogs(*[0.95] * 17), at("cat", 5, 90, score=0.4)], {"include": [CAT]}, True),
    "a tie of scores: the last comes first, as numpy's argsort turned around has it": (
        [at("dog", 50, 5, "red", score=0.8), at("dog", 5, 5, "blue", score=0.8)],
        {"include": [BLUE_DOG]},
        True,
    ),
    "and the first doesn't get its turn": (
        [at("dog", 5, 5, "blue", score=0.8), at("dog", 50, 5, "red", score=0.8)],
        {"include": [BLUE_DOG]},
        False,
    ),
    "both of two need the color": (
        [at("dog", 5, 5, "blue"), at("dog", 50, 5, "red")],
        {"include": [{**BLUE_DOG, "count": 2}]},
        False,
    ),
    "two of the color": (dogs(0.9, 0.8, color="blue"), {"include": [{**BLUE_DOG, "count": 2}]}, True),
    "each its own color": (
        [at("dog", 5, 5, "blue"), at("cat", 50, 5, "red")],
        {"include": [BLUE_DOG, {**CAT, "color": "red"}]},
        True,
    ),
    "colors exchanged": (
        [at("dog", 5, 5, "red"), at("cat", 50, 5, "blue")],
        {"include": [BLUE_DOG, {**CAT, "color": "red"}]},
        False,
    ),
    "excluded and absent": (dogs(0.9), {"include": [DOG], "exclude": [CAT]}, True),
    "excluded and present": ([*dogs(0.9), at("cat", 50, 50)], {"include": [DOG], "exclude": [CAT]}, False),
    "excluded from two on": (
        [*dogs(0.9), at("cat", 50, 50)],
        {"include": [DOG], "exclude": [{"class": "cat", "count": 2}]},
        True,
    ),
    "excluded but too doubtful": (
        [*dogs(0.9), at("cat", 50, 50, score=0.2)],
        {"include": [DOG], "exclude": [CAT]},
        True,
    ),
    "nothing is asked for": ([], {"include": []}, True),
    "nothing is found": ([], {"include": [DOG]}, False),
    "left of": ([at("dog", 5, 50), at("cat", 50, 50)], placed("left of"), True),
    "right of": ([at("dog", 90, 50), at("cat", 50, 50)], placed("right of"), True),
    "above": ([at("dog", 50, 5), at("cat", 50, 50)], placed("above"), True),
    "below": ([at("dog", 50, 90), at("cat", 50, 50)], placed("below"), True),
    "left, not above": ([at("dog", 5, 50), at("cat", 50, 50)], placed("above"), False),
    "on a diagonal both hold": ([at("dog", 5, 5), at("cat", 50, 50)], placed("above", "left of"), True),
    "zero offset is no relation": ([at("dog", 50, 50), at("cat", 50, 50)], placed("left of"), False),
    "zero offset, other sizes": ([at("dog", 50, 50, size=40), at("cat", 50, 50)], placed("above"), False),
    "within the margin": ([at("dog", 48.1, 50), at("cat", 50, 50)], placed("left of"), False),
    "at the margin": ([at("dog", 48, 50), at("cat", 50, 50)], placed("left of"), False),
    "a thousandth is still the margin": ([at("dog", 47.9995, 50), at("cat", 50, 50)], placed("left of"), False),
    "beyond it, but too short a share": ([at("dog", 47.5, 50), at("cat", 50, 50)], placed("left of"), False),
    "clear of it by half of the offset": ([at("dog", 45.9, 50), at("cat", 50, 50)], placed("left of"), True),
    "large boxes have a large margin": (
        [at("dog", 30, 50, size=100), at("cat", 50, 50, size=100)],
        placed("left of"),
        False,
    ),
    "the most certain target is looked at": (
        [at("dog", 50, 50), at("cat", 90, 50, score=0.9), at("cat", 5, 50, score=0.5)],
        placed("left of"),
        True,
    ),
    "every one of the targets must hold": (
        [at("dog", 50, 50), at("cat", 90, 50), at("cat", 5, 50)],
        {"include": [{"class": "cat", "count": 2}, {**DOG, "position": ["left of", 0]}]},
        False,
    ),
    "the target is absent": ([at("dog", 5, 50)], placed("left of"), False),
}


@pytest.mark.parametrize("case", BY_THRESHOLDS)
def test_geneval_with_its_own_thresholds(case: str) -> None:
    detections, metadata, correct = BY_THRESHOLDS[case]
    assert judge_geneval(detections, metadata, GENEVAL_THRESHOLDS).correct == correct


def test_there_are_enough_cases() -> None:
    assert len(CASES) + len(BY_THRESHOLDS) >= 50  # besides the chains of questions of test_dense.py


def test_thresholds_keep_the_best_of_each_class() -> None:
    found = [*dogs(0.5, 0.9, 0.7), at("cat", 5, 5, score=0.4)]
    kept = Thresholds(score=0.45, counting=0.8, most=2).apply(found, "colors")
    assert [(d.name, d.score) for d in kept] == [("dog", 0.9), ("dog", 0.7)]
    assert [d.score for d in Thresholds(0.45, 0.8, 2).apply(found, "counting")] == [0.9]
    assert len(EVERY.apply(found, "counting")) == 4


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
    assert find_relations(at("a", x, y), at("b", 0, 0)) == expected


def test_relations_are_antisymmetric() -> None:
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    for x in range(-50, 51, 7):
        for y in range(-50, 51, 7):
            a, b = at("a", x, y), at("b", 0, 0)
            assert {opposite[r] for r in find_relations(a, b)} == find_relations(b, a)


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
    assert is_same_answer(" Red. ", "red")
    assert not is_same_answer("dark red", "red")
