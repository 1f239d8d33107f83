"""How much of a text was read: against a plain reference, and TIIF-Bench's own cases."""

from random import Random

import pytest

from tbac.evaluation.words import (
    compare_words,
    compute_edit_distance,
    count_found,
    list_quoted_words,
    split_text,
)


def compute_plainly(first: str, second: str) -> int:
    """The edit distance by its definition."""
    if not first or not second:
        return len(first) + len(second)
    rest = compute_plainly(first[1:], second[1:]) + (first[0] != second[0])
    return min(rest, compute_plainly(first[1:], second) + 1, compute_plainly(first, second[1:]) + 1)


def test_the_edit_distance_is_that_of_its_definition() -> None:
    rng = Random(0)
    for _ in range(60):
        first, second = ("".join(rng.choices("ab ", k=rng.randint(0, 5))) for _ in range(2))
        assert compute_edit_distance(first, second) == compute_plainly(first, second)


@pytest.mark.parametrize(
    ("wanted", "lines", "recall", "distance"),
    [
        (["tea", "cake"], ["TEA cake"], 1, 0),
        (["tea", "cake"], ["cake", "tea"], 1, 0),
        (["tea", "cake"], [], 0, 1),  # an empty word is as far from any as can be, and one word has no partner
        (["tea", "cake"], ["tea"], 0.5, 0.5),
        (["tea"], ["tea", "tea"], 1, 0.5),
        (["delight"], ["deligh"], 1, 1 / 7),
        (["tea", "tea"], ["tea"], 0.5, 0.5),  # a word that was read serves once
        (["tea"], ["ten"], 0, 1 / 3),  # 0.33 is too far
    ],
)
def test_words_are_compared_as_tiif_bench_does(
    wanted: list[str], lines: list[str], recall: float, distance: float
) -> None:
    found = compare_words(wanted, lines)
    assert (found["word recall"], found["word distance"]) == (recall, pytest.approx(distance))


def test_quoted_words_are_found() -> None:
    assert list_quoted_words('with the text on it: "drink", "tea". And “eat”.') == ["drink", "tea", "eat"]
    assert list_quoted_words("nothing") == []


def test_longtext_compares_words_without_signs_each_as_often_as_it_is_there() -> None:
    wanted = split_text("FRESH BREWS, EVERY MORNING,\nEVERY-DAY! Café")
    assert wanted == ["fresh", "brews", "every", "morning", "everyday", "café"]
    assert count_found(wanted, split_text("every every brews")) == 2
    assert split_text("你好, ab1", by_letter=True) == ["你", "好", "a", "b", "1"]
