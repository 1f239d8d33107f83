"""Judges: they get a question about pictures, and reply in words.

Only a benchmark knows how to read the reply. A judge that has no reply raises `JudgeError`, and the picture is then
reported as failed.
"""

import re
from collections.abc import Sequence
from typing import Protocol

from PIL import Image


class JudgeError(RuntimeError):
    """A judge gave no usable reply to a question."""


class Judge(Protocol):
    """What benchmarks ask questions about their pictures.

    Attributes:
        identity: who replies, and what the replies depend on besides question and pictures.
        slow: whether its replies should be kept, so that nothing is asked twice.
    """

    identity: str
    slow: bool

    def ask(self, question: str, images: Sequence[Image.Image]) -> str:
        """Reply to a question about pictures.

        Raises:
            JudgeError: when there is no reply.
        """
        ...


def read_yes_or_no(reply: str) -> bool | None:
    """Whether a reply begins with "yes" rather than "no"; None when it begins with neither."""
    match = re.match(r"\W*(yes|no)\b", reply, re.IGNORECASE)
    return None if match is None else match[1].lower() == "yes"


def read_yes_or_no_lines(reply: str, count: int) -> list[bool] | None:
    """Read the answers to several questions, one in each line; None when there are more or fewer than `count`.

    Lines that begin with neither word are ignored, as TIIF-Bench's scorer does.
    """
    answers = [read_yes_or_no(line) for line in reply.splitlines()]
    usable = [answer for answer in answers if answer is not None]
    return usable if len(usable) == count else None
