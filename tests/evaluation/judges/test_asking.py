"""Replies that can't be used are asked for again: within a run, and in the next one; all of them are kept."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tbac.evaluation.judges.base import Asked, JudgeError, ask_until_usable, read_yes_or_no, read_yes_or_no_lines
from tbac.evaluation.judges.cache import Cache, CachedJudge
from tests.helpers.pictures import make_noise_image


class Scripted:
    """Says one reply after the other, and notes the questions."""

    identity, slow = "scripted", True

    def __init__(self, *replies: str, steady: bool = False) -> None:
        self.replies, self.questions, self.steady = list(replies), [], steady  # type: ignore[var-annotated]

    def ask(self, question: str, images: Any) -> str:
        self.questions.append(question)
        return self.replies.pop(0)


def ask(judge: Any, wordings: Sequence[str] = ("a?",), tries: int = 3) -> tuple[bool, str]:
    return ask_until_usable(judge, Asked(wordings, [make_noise_image(0)], tries), read_yes_or_no)


def test_a_reply_is_asked_for_until_it_can_be_used() -> None:
    judge = Scripted("hm", "well", "yes")
    assert ask(judge) == (True, "yes")
    assert len(judge.questions) == 3


def test_there_is_a_bound_and_all_replies_are_told() -> None:
    judge = Scripted("hm", "well", "so", "yes")
    with pytest.raises(JudgeError, match="no usable reply in 3 tries, the last one: so") as error:
        ask(judge)
    assert error.value.replies == ["hm", "well", "so"]
    assert len(judge.questions) == 3


def test_the_tries_go_through_the_wordings_and_a_steady_judge_hears_each_once() -> None:
    judge = Scripted("hm", "hm", "hm")
    with pytest.raises(JudgeError):
        ask(judge, ["a?", "b?"])
    assert judge.questions == ["a?", "b?", "a?"]
    steady = Scripted("hm", "hm", steady=True)
    with pytest.raises(JudgeError, match="in 2 tries"):
        ask(steady, ["a?", "b?"])


def test_the_next_run_asks_again_and_raw_replies_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "judged.jsonl"
    with pytest.raises(JudgeError):
        ask(CachedJudge(Scripted("hm", "well", "so"), Cache(file)))
    judge = Scripted("but", "no")
    assert ask(CachedJudge(judge, Cache(file))) == (False, "no")
    assert len(judge.questions) == 2
    # What can be used is asked for no more, whichever wording brought it.
    assert ask(CachedJudge(Scripted(), Cache(file)), ["b?", "a?"]) == (False, "no")
    kept = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["value"] for row in kept] == ["hm", "well", "so", "but", "no"]
    assert {row["question"] for row in kept} == {"a?"}


@pytest.mark.parametrize(
    ("reply", "count", "expected"),
    [
        ("yes, it is\nNo.", 2, [True, False]),
        ("  YES\n\nno", 2, [True, False]),
        ("Here:\nyes\nno", 2, [True, False]),
        ("yes\nno\nyes", 2, None),
        ("1. yes\n2. no", 2, None),  # TIIF-Bench's script takes no number before the word
        ("yesterday\nno", 2, None),
        ("yes\r\nno", 2, [True, False]),
        ("yes\u2028no", 1, [True]),  # only a newline ends a line
        ("", 1, None),
    ],
)
def test_lines_are_read_as_tiif_bench_reads_them(reply: str, count: int, expected: list[bool] | None) -> None:
    assert read_yes_or_no_lines(reply, count) == expected


def test_thoughts_of_any_judge_are_no_reply(tmp_path: Path) -> None:
    """A model on this machine may think too, and replies may have been kept as they came."""
    assert ask(Scripted("<think>yes?</think> no")) == (False, "no")
    with pytest.raises(JudgeError) as error:
        ask_until_usable(Scripted("<think>yes", steady=True), Asked(["a?"], [], 1), lambda reply: "yes" in reply)
    assert error.value.replies == ["<think>yes"]
    cache = Cache(tmp_path / "judged.jsonl")
    CachedJudge(Scripted("Yes? There is no cat.</think>\nno"), cache).ask("a?", [make_noise_image(0)])
    assert ask(CachedJudge(Scripted(), cache)) == (False, "no")
