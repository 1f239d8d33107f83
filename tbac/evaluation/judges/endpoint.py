"""A judge behind an OpenAI-compatible endpoint."""

import base64
import copy
import io
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from PIL import Image

from tbac.evaluation.judges.base import JudgeError, JudgeFacts, Manner
from tbac.evaluation.protocol import OF_SERVICE, UNKNOWN
from tbac.pictures import to_upright_rgb
from tbac.redaction import HIDDEN, hide_in_text

FIRST_WAIT, LONGEST_WAIT = 0.5, 8.0  # seconds between tries; each wait is twice the one before
LONGEST_REQUEST = 60.0  # seconds that an endpoint may ask us to wait
TEMPORARY = (408, 409, 429)  # statuses, besides 5xx, after which another try may succeed
MOST_TOKENS = 20  # whose probabilities an endpoint may be asked for
# What some models write before their reply; the template may have begun it, and the length may have ended it.
THOUGHTS = re.compile(r".*</think>\s*|<think>.*", re.DOTALL)


class EndpointJudge:
    """A model behind an OpenAI-compatible endpoint, at temperature 0 unless a benchmark wants another one.

    Address and key come from OPENAI_BASE_URL and OPENAI_API_KEY. A temporary failure (no connection, no answer in time,
    status 408, 409, 429 or 5xx) is tried again, each time after a longer wait, and so is a reply without text. The
    client of the openai package could retry as well, but it accepts replies without text, so that is turned off.

    Args:
        model: name of the model, as the endpoint knows it.
        max_retries: how often it is tried again after the first time.
        timeout: seconds that each try may take.
        max_tokens: length of the longest reply.

    Attributes:
        reported: the name that the endpoint gave with its last reply.

    Raises:
        ValueError: when address or key isn't set.
    """

    slow = True

    def __init__(self, model: str, max_retries: int = 5, timeout: float = 120.0, max_tokens: int = 1024) -> None:
        from openai import OpenAI  # takes a second to import

        missing = [name for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY") if not os.environ.get(name)]
        if missing:
            raise ValueError(f"judge=endpoint needs {' and '.join(missing)} in the environment")
        self._client = OpenAI(max_retries=0, timeout=timeout)
        self.model, self.max_retries, self.reported = model, max_retries, UNKNOWN
        self._set_manner(Manner(temperature=0, max_tokens=max_tokens))

    def _set_manner(self, manner: Manner) -> None:
        self.manner = manner
        address = hide_in_text(str(self._client.base_url))
        settings = f"temperature {manner.temperature}, max_tokens {manner.max_tokens}"
        if manner.system or manner.extra:
            settings = manner.describe()
        if manner.pictures_first:
            settings += ", pictures first"
        self.identity = f"{self.model} at {address} ({settings})"

    def in_manner(self, manner: Manner) -> "EndpointJudge":
        """Return a judge at the same endpoint that is asked exactly in this manner."""
        judge = copy.copy(self)
        judge._set_manner(manner)
        return judge

    def describe_facts(self) -> JudgeFacts:
        """Describe the model by the name that the endpoint reports, which may not be the one that was asked for."""
        return JudgeFacts(self.reported, OF_SERVICE, self.manner.describe())

    def ask(self, question: str, images: Sequence[Image.Image]) -> str:
        """Ask the endpoint for a reply.

        Raises:
            JudgeError: when no try brought a text.
        """

        def read_text(answer: Any) -> str | None:
            text = answer.choices[0].message.content
            text = THOUGHTS.sub("", text, count=1).strip() if isinstance(text, str) else ""
            return text or None

        text: str = self._try(question, images, self.manner, read_text)
        return text

    def compute_probability(self, question: str, images: Sequence[Image.Image], answers: Sequence[str]) -> float:
        """Compute how likely the reply is to begin with one of several answers, from the tokens that are listed.

        A token counts that is one of the answers, with or without the space before it, or the beginning of one, of two
        letters or more, as tokenizers cut words.

        Raises:
            JudgeError: when the endpoint lists no probabilities.
        """

        def read_logprobs(answer: Any) -> float | None:
            choice = answer.choices[0]
            listed = choice.logprobs.content[0].top_logprobs if choice.logprobs and choice.logprobs.content else None
            if not listed:
                return None
            return sum(math.exp(min(item.logprob, 0.0)) for item in listed if begins_answer(item.token, answers))

        manner = replace(
            self.manner, max_tokens=1, extra={**self.manner.extra, "logprobs": True, "top_logprobs": MOST_TOKENS}
        )
        probability: float = self._try(question, images, manner, read_logprobs, "the reply holds no probabilities")
        if not 0 <= probability < 1.01:
            raise JudgeError(f"the probabilities of the reply add up to {probability}")
        return min(probability, 1.0)

    def _try(
        self,
        question: str,
        images: Sequence[Image.Image],
        manner: Manner,
        read: Callable[[Any], Any],
        lacking: str = "the reply holds no text",
    ) -> Any:
        """Ask until `read` finds something in an answer; the last problem is what the error tells.

        Raises:
            JudgeError: when it never does.
        """
        from openai import OpenAIError

        content: list[dict[str, Any]] = []
        for image in images:
            url = f"data:image/png;base64,{base64.b64encode(encode_png(image)).decode()}"
            content.append({"type": "image_url", "image_url": {"url": url}})
        content.insert(len(content) if manner.pictures_first else 0, {"type": "text", "text": question})
        problem, wait = "", 0.0
        for number in range(self.max_retries + 1):
            time.sleep(wait)
            wait = min(FIRST_WAIT * 2**number, LONGEST_WAIT)
            try:
                answer = self._complete(content, manner)
                found = read(answer)
                if found is not None:
                    self.reported = answer.model if isinstance(answer.model, str) and answer.model else UNKNOWN
                    return found
                problem = lacking
            except OpenAIError as error:
                problem = f"{type(error).__name__}: {error}"
                # A wrong key or a bad request fails the next time too.
                if not is_temporary(error):
                    break
                wait = read_requested_wait(error) or wait
            except (AttributeError, IndexError, TypeError, ValueError) as error:
                problem = f"the reply isn't a chat completion ({type(error).__name__}: {error})"
        # A server may repeat the key that it was given.
        raise JudgeError(hide_in_text(problem.replace(self._client.api_key, HIDDEN)))

    def _complete(self, content: list[dict[str, Any]], manner: Manner) -> Any:
        """Ask once; returns a chat completion if the endpoint keeps to the protocol."""
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if manner.system:
            messages.insert(0, {"role": "system", "content": manner.system})
        options: dict[str, Any] = {"temperature": manner.temperature, "max_tokens": manner.max_tokens}
        return self._client.chat.completions.create(
            model=self.model,
            messages=messages,  # type: ignore[arg-type]
            extra_body=dict(manner.extra) or None,
            **{name: value for name, value in options.items() if value is not None},
        )


def begins_answer(token: str, answers: Sequence[str]) -> bool:
    """Whether a token is one of the answers or begins one, without regard to the space before it."""
    word = token.strip()
    exact = {answer.strip() for answer in answers}
    return word in exact or (len(word) > 1 and any(answer.startswith(word) for answer in exact))


def is_temporary(error: Exception) -> bool:
    """Whether another try may succeed after this error of the client."""
    from openai import APIConnectionError, APIStatusError

    if isinstance(error, APIStatusError):
        return error.status_code in TEMPORARY or error.status_code >= 500
    return isinstance(error, APIConnectionError)  # also when there was no answer in time


def read_requested_wait(error: Exception) -> float:
    """Seconds that the endpoint asks us to wait by `Retry-After`; 0 when it doesn't, or asks for too much."""
    response = getattr(error, "response", None)
    try:
        seconds = float(response.headers["retry-after"]) if response is not None else 0.0
    except (KeyError, ValueError):
        return 0.0
    return seconds if 0 < seconds <= LONGEST_REQUEST else 0.0


def encode_png(image: Image.Image) -> bytes:
    """Encode a picture as a PNG file."""
    buffer = io.BytesIO()
    to_upright_rgb(image).save(buffer, format="PNG")
    return buffer.getvalue()
