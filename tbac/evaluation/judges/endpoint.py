"""A judge behind an OpenAI-compatible endpoint."""

import base64
import io
import os
import time
from collections.abc import Sequence
from typing import Any

from PIL import Image

from tbac.evaluation.judges.base import JudgeError
from tbac.pictures import to_upright_rgb
from tbac.redaction import HIDDEN, hide_in_text

FIRST_WAIT, LONGEST_WAIT = 0.5, 8.0  # seconds between tries; each wait is twice the one before
LONGEST_REQUEST = 60.0  # seconds that an endpoint may ask us to wait
TEMPORARY = (408, 409, 429)  # statuses, besides 5xx, after which another try may succeed


class EndpointJudge:
    """A model behind an OpenAI-compatible endpoint, at temperature 0.

    Address and key come from OPENAI_BASE_URL and OPENAI_API_KEY. A temporary failure (no connection, no answer in time,
    status 408, 409, 429 or 5xx) is tried again, each time after a longer wait, and so is a reply without text. The
    client of the openai package could retry as well, but it accepts replies without text, so that is turned off.

    Args:
        model: name of the model, as the endpoint knows it.
        max_retries: how often it is tried again after the first time.
        timeout: seconds that each try may take.
        max_tokens: length of the longest reply.

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
        self.model, self.max_retries, self.max_tokens = model, max_retries, max_tokens
        address = hide_in_text(str(self._client.base_url))
        self.identity = f"{model} at {address} (temperature 0, max_tokens {max_tokens})"

    def ask(self, question: str, images: Sequence[Image.Image]) -> str:
        """Ask the endpoint for a reply.

        Raises:
            JudgeError: when no try brought a text.
        """
        from openai import OpenAIError

        content: list[dict[str, Any]] = [{"type": "text", "text": question}]
        for image in images:
            url = f"data:image/png;base64,{base64.b64encode(encode_png(image)).decode()}"
            content.append({"type": "image_url", "image_url": {"url": url}})
        # Try until there is a text; the last problem is what the error tells.
        problem, wait = "", 0.0
        for number in range(self.max_retries + 1):
            time.sleep(wait)
            wait = min(FIRST_WAIT * 2**number, LONGEST_WAIT)
            try:
                text = self._complete(content)
                if isinstance(text, str) and text.strip():
                    return text.strip()
                problem = "the reply holds no text"
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

    def _complete(self, content: list[dict[str, Any]]) -> Any:
        """Ask once; returns a text if the endpoint keeps to the protocol."""
        answer = self._client.chat.completions.create(
            model=self.model,
            messages=[{"role": "user", "content": content}],  # type: ignore[misc, list-item]
            temperature=0,
            max_tokens=self.max_tokens,
        )
        return answer.choices[0].message.content


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
