"""ImgEdit's aggregates: what a reply is worth, and the two means."""

import pytest

from tbac.evaluation.imgedit import edit_scores, reply_score

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
    assert reply_score(reply) == score


def test_macro_is_over_kinds_and_micro_over_edits() -> None:
    kinds = {"1": "add", "2": "add", "3": "add", "4": "remove"}
    found = edit_scores({"1": "a: 5", "2": "a: 4", "3": "a: 4", "4": "a: 1"}, kinds)
    assert found.by_kind == {"add": 4.33, "remove": 1.0}
    assert found.macro == pytest.approx((4.33 + 1) / 2)
    assert found.micro == pytest.approx(14 / 4)
    assert not found.comparable  # two of nine kinds


def test_failed_and_absent_replies_are_counted_and_not_averaged() -> None:
    kinds = {str(i): f"kind {i}" for i in range(9)}
    replies: dict[str, str | None] = {key: "a: 3" for key in kinds}
    assert edit_scores(replies, kinds).comparable
    replies["2"], replies["3"] = None, "nonsense"
    del replies["4"]
    found = edit_scores(replies, kinds)
    assert (found.scored, found.unscored, found.macro) == (6, ["2", "3", "4"], 3.0)
    assert not found.comparable


def test_replies_to_nothing_and_no_rating_at_all_are_errors() -> None:
    with pytest.raises(ValueError, match="doesn't have: x"):
        edit_scores({"x": "a: 1"}, {"1": "add"})
    with pytest.raises(ValueError, match="no reply"):
        edit_scores({"1": None}, {"1": "add"})
