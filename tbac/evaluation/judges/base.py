"""Judges: they get a question about pictures, and reply in words.

Only a benchmark knows how to read the reply. A reply that it can't use is asked for again, a few times; a judge that
has no reply raises `JudgeError`, and the picture is then reported as failed.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from PIL import Image

from tbac.evaluation.judges.thoughts import remove_thoughts
from tbac.evaluation.protocol import UNKNOWN

Value = TypeVar("Value")


class JudgeError(RuntimeError):
    """A judge gave no usable reply to a question.

    Attributes:
        replies: what it said instead, in the order of the tries.
    """

    def __init__(self, message: str, replies: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.replies = list(replies)


class EmptyReplyError(JudgeError):
    """A judge had nothing to say, which is an answer only to a question such as what a picture says."""


class JudgeRefusedError(ValueError):
    """A judge answers no question at all until its user changes something: a key, a name, an option, or credit."""


@dataclass(frozen=True)
class Manner:
    """How a benchmark wants a judge to be asked; None leaves it to the judge.

    Attributes:
        system: system message.
        temperature: of sampling; 0 takes the most likely token.
        max_tokens: length of the longest reply.
        extra: further fields of a request to an endpoint.
        pictures_first: whether an endpoint gets the pictures before the question; a model on this machine always does.
        whole: whether a reply must have come to its end; False where its beginning says enough.
    """

    system: str | None = None
    temperature: float | None = None
    max_tokens: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    pictures_first: bool = False
    whole: bool = True

    def describe(self) -> str:
        """Describe the settings in one line, as a protocol states them."""
        said = (
            f"system message {hashlib.sha256(self.system.encode()).hexdigest()[:8]}"
            if self.system
            else "no system message"
        )
        parts = [said, "default temperature" if self.temperature is None else f"temperature {self.temperature:g}"]
        parts.append("no limit of length" if self.max_tokens is None else f"at most {self.max_tokens} tokens")
        return ", ".join([*parts, *(f"{name} {value}" for name, value in self.extra.items())])


@dataclass(frozen=True)
class JudgeFacts:
    """Who judged, as a protocol states it.

    Attributes:
        name: of the model, as an endpoint reports it.
        weights: digest of its weights.
        settings: how it was asked.
    """

    name: str = UNKNOWN
    weights: str = UNKNOWN
    settings: str = UNKNOWN


class Judge(Protocol):
    """What benchmarks ask questions about their pictures.

    A judge may also have `in_manner(manner)`, which returns a judge that is asked in a `Manner`; `describe_facts()`,
    which returns its `JudgeFacts`; `steady`, whether it says the same when it is asked again; and
    `compute_probability(question, images, answers)`, how likely it is to begin its reply with one of several answers.

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
            JudgeRefusedError: when there will be none to any other question either.
        """
        ...


def use_manner(judge: Any, manner: Manner | None) -> Any:
    """Return a judge that is asked in a manner, if there is one and it can be; else the judge itself."""
    return judge if manner is None or not hasattr(judge, "in_manner") else judge.in_manner(manner)


def read_facts(judge: Any) -> JudgeFacts:
    """Read what a judge or detector says about itself; `UNKNOWN` where it says nothing."""
    if hasattr(judge, "describe_facts"):
        facts: JudgeFacts = judge.describe_facts()
        return facts
    return JudgeFacts(getattr(judge, "identity", UNKNOWN))


@dataclass(frozen=True)
class Asked:
    """A question to a judge, and how often it may be asked.

    Attributes:
        wordings: the ways to put it; the tries go through them in turn.
        images: the pictures that it is about.
        tries: how often it is asked in one run.
    """

    wordings: Sequence[str]
    images: Sequence[Image.Image]
    tries: int = 3


def ask_until_usable(judge: Any, asked: Asked, read: Callable[[str], Value | None]) -> tuple[Value, str]:
    """Ask until `read` makes something of a reply, whose thoughts it doesn't see.

    A usable reply that was kept is used. Otherwise the question is asked, up to so many times, also where an unusable
    reply was kept. A judge that always says the same is asked once in each wording.

    Returns:
        What was read, and the reply without thoughts.

    Raises:
        JudgeError: when no reply was usable, with all of them.
    """
    wordings = list(dict.fromkeys(asked.wordings))
    for wording in wordings if hasattr(judge, "recall") else ():
        kept = judge.recall(wording, asked.images)
        reply = None if kept is None else remove_thoughts(kept)
        value = None if reply is None else read(reply)
        if reply is not None and value is not None:
            return value, reply
    # Tries share their number with the ways to put the question, so that each gets its turn.
    tries = min(asked.tries, len(wordings)) if getattr(judge, "steady", False) else asked.tries
    ask = getattr(judge, "ask_anew", judge.ask)
    replies: list[str] = []
    for number in range(tries):
        said = ask(asked.wordings[number % len(asked.wordings)], asked.images)
        reply = remove_thoughts(said)
        value = None if reply is None else read(reply)
        if reply is not None and value is not None:
            return value, reply
        replies.append(said)
    raise JudgeError(f"no usable reply in {tries} tries, the last one: {replies[-1]}", replies)


def read_yes_or_no(reply: str) -> bool | None:
    """Whether a reply begins with "yes" rather than "no"; None when it begins with neither."""
    match = re.match(r"\W*(yes|no)\b", reply, re.IGNORECASE)
    return None if match is None else match[1].lower() == "yes"


def read_yes_or_no_lines(reply: str, count: int) -> list[bool] | None:
    """Read the answers to several questions, one in each line; None when there are more or fewer than `count`.

    Lines that don't begin with one of these words are ignored, as TIIF-Bench's scorer does.
    """
    matches = [re.match(r"(yes|no)\b", line.strip(), re.IGNORECASE) for line in reply.strip().split("\n")]
    answers = [match[1].lower() == "yes" for match in matches if match]
    return answers if len(answers) == count else None
