"""A judge behind an OpenAI-compatible endpoint."""

import base64
import copy
import io
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from tbac.evaluation.judges.base import JudgeError, JudgeFacts, JudgeRefusedError, Manner
from tbac.evaluation.judges.failures import advise, has_no_connection, is_temporary, read_requested_wait
from tbac.evaluation.judges.first_tokens import compute_answer_probability, read_listed
from tbac.evaluation.judges.thoughts import remove_thoughts
from tbac.evaluation.protocol import OF_SERVICE, UNKNOWN
from tbac.pictures import to_upright_rgb
from tbac.redaction import HIDDEN, hide_in_text

FIRST_WAIT, LONGEST_WAIT = 0.5, 8.0  # seconds between tries; each wait is twice the one before
MAX_TOKENS = 1024  # of a reply, unless a benchmark or the user says otherwise
LEAST_KEY = 8  # characters of a key that is looked for in replies; servers without keys take any word for one
OTHER_NAME = "max_completion_tokens"
MOST_TOKENS = 20  # whose probabilities an endpoint may be asked for


class CutReplyError(JudgeError):
    """The longest length ended a reply before it said what was asked."""


@dataclass
class Known:
    """What has been learnt of an endpoint: how it calls the limit of length, and whether it was ever reached."""

    limit_name: str = "max_tokens"
    was_reached: bool = False


class EndpointJudge:
    """A model behind an OpenAI-compatible endpoint, asked as a benchmark wants it, else at temperature 0.

    Address and key come from OPENAI_BASE_URL and OPENAI_API_KEY. A temporary failure (no connection, no answer in time,
    status 408, 409, 429 or 5xx) is tried again, each time after a longer wait, and so is a reply without text. What
    would fail for every question, such as a wrong key, is told at once. The client of the openai package could retry as
    well, but it accepts replies without text, so that is turned off.

    Args:
        model: name of the model, as the endpoint knows it.
        max_retries: how often it is tried again after the first time.
        timeout: seconds that each try may take.
        max_tokens: length of the longest reply, also where a benchmark wants another one; None leaves it to the
            benchmark, and is 1024 where it says nothing.
        temperature: of sampling, also where a benchmark wants another one; None leaves it to the benchmark, and is 0
            where it says nothing.

    Attributes:
        reported: the name that the endpoint gave with its last reply.

    Raises:
        ValueError: when address or key isn't set.
    """

    slow = True

    def __init__(
        self,
        model: str,
        max_retries: int = 5,
        timeout: float = 120.0,
        max_tokens: int | None = None,
        temperature: float | None = None,
    ) -> None:
        from openai import OpenAI  # takes a second to import

        missing = [name for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY") if not os.environ.get(name)]
        if missing:
            raise ValueError(f"judge=endpoint needs {' and '.join(missing)} in the environment")
        # The client's HTTP library logs a line for every request.
        for name in ("httpx", "httpx2"):
            logging.getLogger(name).setLevel(logging.WARNING)
        self._client = OpenAI(max_retries=0, timeout=timeout)
        self.model, self.max_retries, self.reported = model, max_retries, UNKNOWN
        self.max_tokens, self.temperature = max_tokens, temperature
        self._known = Known()  # shared by all manners
        self._set_manner(Manner(temperature=0, max_tokens=MAX_TOKENS, whole=False))

    def _set_manner(self, manner: Manner) -> None:
        # What the user has set holds everywhere, and is stated; where the first token is asked for, it is the only one.
        if self.temperature is not None:
            manner = replace(manner, temperature=self.temperature)
        if self.max_tokens is not None and manner.max_tokens != 1:
            manner = replace(manner, max_tokens=self.max_tokens)
        self.manner = manner
        address = hide_in_text(str(self._client.base_url))
        settings = f"temperature {manner.temperature}, max_tokens {manner.max_tokens}"
        if manner.system or manner.extra:
            settings = manner.describe()
        if manner.pictures_first:
            settings += ", pictures first"
        self.identity = f"{self.model} at {address} ({settings})"

    def in_manner(self, manner: Manner) -> "EndpointJudge":
        """Return a judge at the same endpoint that is asked in this manner, but for what the user has set."""
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
            JudgeRefusedError: when every other question would be refused too.
        """

        def read_text(answer: Any) -> str:
            reply = read_reply(answer.choices[0], self.manner)
            key = self._client.api_key
            return reply.replace(key, HIDDEN) if len(key) >= LEAST_KEY else reply

        text: str = self._try(question, images, self.manner, read_text)
        return text

    def compute_probability(self, question: str, images: Sequence[Image.Image], answers: Sequence[str]) -> float:
        """Compute how likely the reply is to begin with one of several answers, from the tokens that are listed.

        Raises:
            JudgeError: when the endpoint lists no probabilities, or none of the tokens begins an answer.
        """

        def read_logprobs(answer: Any) -> dict[str, float]:
            choice = answer.choices[0]
            top = choice.logprobs.content[0].top_logprobs if choice.logprobs and choice.logprobs.content else None
            if not top:
                raise JudgeError("the reply holds no probabilities")
            return read_listed(top)

        manner = replace(
            self.manner, max_tokens=1, extra={**self.manner.extra, "logprobs": True, "top_logprobs": MOST_TOKENS}
        )
        return compute_answer_probability(self._try(question, images, manner, read_logprobs), answers)

    def _try(
        self,
        question: str,
        images: Sequence[Image.Image],
        manner: Manner,
        read: Callable[[Any], Any],
    ) -> Any:
        """Ask until `read` finds something in an answer, for which it raises JudgeError; the last problem is told.

        Raises:
            JudgeError: when it never does.
            JudgeRefusedError: when every other question would be refused too.
        """
        from openai import OpenAIError

        content: list[dict[str, Any]] = []
        for image in images:
            url = f"data:image/png;base64,{base64.b64encode(encode_png(image)).decode()}"
            content.append({"type": "image_url", "image_url": {"url": url}})
        content.insert(len(content) if manner.pictures_first else 0, {"type": "text", "text": question})
        problem, wait = "", 0.0
        replies: Sequence[str] = ()
        for number in range(self.max_retries + 1):
            time.sleep(wait)
            wait = min(FIRST_WAIT * 2**number, LONGEST_WAIT)
            try:
                answer = self._complete(content, manner)
                self._known.was_reached = True
                found = read(answer)
                self.reported = answer.model if isinstance(answer.model, str) and answer.model else UNKNOWN
                return found
            except JudgeError as error:
                problem, replies = str(error), error.replies
                # At temperature 0 the next reply would be as long.
                if isinstance(error, CutReplyError) and manner.temperature == 0:
                    break
            except OpenAIError as error:
                problem = f"{type(error).__name__}: {error}"
                self._known.was_reached |= not has_no_connection(error)
                if not self._known.was_reached and number == self.max_retries:
                    advice = f"check OPENAI_BASE_URL={self._client.base_url}"
                else:
                    advice = advise(error)
                if advice:
                    said = f"the endpoint answers no question of judge.model={self.model}; {advice} ({problem})"
                    raise JudgeRefusedError(self._hide_key(said)) from None
                # A bad request fails the next time too.
                if not is_temporary(error):
                    break
                wait = max(wait, read_requested_wait(error))
            except (AttributeError, IndexError, TypeError, ValueError) as error:
                problem = f"the reply isn't a chat completion ({type(error).__name__}: {error})"
        raise JudgeError(self._hide_key(problem), [self._hide_key(reply) for reply in replies])

    def _hide_key(self, text: str) -> str:
        """Hide the key in what a server says, which may repeat it."""
        return hide_in_text(text.replace(self._client.api_key, HIDDEN))

    def _complete(self, content: list[dict[str, Any]], manner: Manner) -> Any:
        """Ask once; returns a chat completion if the endpoint keeps to the protocol."""
        from openai import BadRequestError

        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if manner.system:
            messages.insert(0, {"role": "system", "content": manner.system})
        options: dict[str, Any] = {"temperature": manner.temperature}
        options[self._known.limit_name] = manner.max_tokens
        try:
            return self._client.chat.completions.create(
                model=self.model,
                messages=messages,  # type: ignore[arg-type]
                extra_body=dict(manner.extra) or None,
                **{name: value for name, value in options.items() if value is not None},
            )
        except BadRequestError as error:
            # Newer models take the limit by another name, which their refusal tells.
            if OTHER_NAME not in str(error) or self._known.limit_name == OTHER_NAME:
                raise
            self._known.limit_name = OTHER_NAME
        return self._complete(content, manner)


def read_reply(choice: Any, manner: Manner) -> str:
    """Read the reply of a completion, without the thoughts before it.

    Raises:
        CutReplyError: when the longest length ended it in its thoughts, or at all where the manner wants it whole.
        JudgeError: when it holds no text.
    """
    text = join_parts(choice.message.content)
    reply = remove_thoughts(text)
    is_cut = getattr(choice, "finish_reason", None) == "length"
    if reply is None:
        raise CutReplyError("the reply ends within its thoughts", [text])
    # Thoughts that the template began, and whose end is missing, look like any other text that was cut.
    if is_cut and (manner.whole or not reply):
        raise CutReplyError("the reply was cut at the longest length, before its end", [text] if text else [])
    if not reply:
        reason = getattr(choice, "finish_reason", None)
        raise JudgeError("the reply holds no text" + (f" ({reason})" if reason not in (None, "stop") else ""))
    return reply


def join_parts(content: Any) -> str:
    """Join the parts of a message that are text, as some endpoints send it; thoughts are parts of another kind."""
    if not isinstance(content, list):
        return content if isinstance(content, str) else ""
    texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
    return "".join(text for text in texts if isinstance(text, str))


def encode_png(image: Image.Image) -> bytes:
    """Encode a picture as a PNG file."""
    buffer = io.BytesIO()
    to_upright_rgb(image).save(buffer, format="PNG")
    return buffer.getvalue()
