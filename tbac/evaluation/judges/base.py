"""Judges: a question about pictures in, a reply in words out.

A reply is read by the rules of a benchmark alone. A judge that has none raises `JudgeError`; whoever scores counts that
and shows it.
"""

import re
from collections.abc import Sequence
from typing import Protocol

from PIL import Image


class JudgeError(RuntimeError):
    """There is no reply to a question."""


class Judge(Protocol):
    """What scorers ask.

    Attributes:
        identity: who replies, and what the replies depend on besides question and pictures.
        slow: whether it is worth while to keep its replies.
    """

    identity: str
    slow: bool

    def ask(self, question: str, images: Sequence[Image.Image]) -> str:
        """The reply to a question about pictures.

        Raises:
            JudgeError: when there is none.
        """
        ...


def read_yes_or_no(reply: str) -> bool | None:
    """Whether a reply begins with "yes" or "no"; None when with neither."""
    found = re.match(r"\W*(yes|no)\b", reply, re.IGNORECASE)
    return None if found is None else found[1].lower() == "yes"


def read_yes_or_no_lines(reply: str, count: int) -> list[bool] | None:
    """The answers to several questions, a line for each; None when there are more or fewer.

    Lines that begin with neither word are passed over, as TIIF-Bench's scorer does.
    """
    answers = [answer for line in reply.splitlines() if (answer := read_yes_or_no(line)) is not None]
    return answers if len(answers) == count else None
