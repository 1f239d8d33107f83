"""Replies read as answers."""

import pytest

from tbac.evaluation.judges.base import read_yes_or_no, read_yes_or_no_lines


@pytest.mark.parametrize(
    ("reply", "expected"),
    [("yes", True), ("No.", False), ("**Yes**, it is", True), ("yesterday", None), ("", None), ("It is, yes", None)],
)
def test_yes_or_no(reply: str, expected: bool | None) -> None:
    assert read_yes_or_no(reply) is expected


def test_lines_that_dont_answer_are_passed_over_and_their_number_must_fit() -> None:
    assert read_yes_or_no_lines("Here:\nyes, a cat\n\nno, no dog", 2) == [True, False]
    assert read_yes_or_no_lines("yes", 2) is None
    assert read_yes_or_no_lines("yes\nno\nno", 2) is None
