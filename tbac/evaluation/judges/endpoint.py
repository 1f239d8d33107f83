"""A judge behind an OpenAI-compatible endpoint."""

import base64
import io
import os
from collections.abc import Sequence
from typing import Any

from PIL import Image

from tbac.evaluation.judges.base import JudgeError


class EndpointJudge:
    """A model behind an OpenAI-compatible endpoint, at temperature 0.

    Address and key come from OPENAI_BASE_URL and OPENAI_API_KEY. What fails for the moment (no connection, no answer in
    time, status 408, 409, 429 or 5xx) is tried again, each time after a longer wait; so is a reply without text.

    Args:
        model: name of the model, as the endpoint knows it.
        max_retries: further tries after the first.
        timeout: seconds that each try may take.
        max_tokens: longest reply.

    Raises:
        ValueError: when address or key isn't set.
    """

    slow = True

    def __init__(self, model: str, max_retries: int = 5, timeout: float = 120.0, max_tokens: int = 1024) -> None:
        from openai import OpenAI  # takes a second to import

        missing = [name for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY") if not os.environ.get(name)]
        if missing:
            raise ValueError(f"judge=endpoint needs {' and '.join(missing)} in the environment")
        self._client = OpenAI(max_retries=max_retries, timeout=timeout)
        self.model, self.max_retries, self.max_tokens = model, max_retries, max_tokens
        self.identity = f"{model} at {self._client.base_url} (temperature 0, max_tokens {max_tokens})"

    def ask(self, question: str, images: Sequence[Image.Image]) -> str:
        """The endpoint's reply."""
        from openai import OpenAIError

        content: list[dict[str, Any]] = [{"type": "text", "text": question}]
        for image in images:
            url = f"data:image/png;base64,{base64.b64encode(png_bytes(image)).decode()}"
            content.append({"type": "image_url", "image_url": {"url": url}})
        problem = ""
        for _ in range(self.max_retries + 1):
            try:
                answer = self._client.chat.completions.create(
                    model=self.model,
                    messages=[{"role": "user", "content": content}],  # type: ignore[misc, list-item]
                    temperature=0,
                    max_tokens=self.max_tokens,
                )
                text = answer.choices[0].message.content
                if isinstance(text, str) and text.strip():
                    return text.strip()
                problem = "the reply holds no text"
            except OpenAIError as error:
                raise JudgeError(f"{type(error).__name__}: {error}") from None
            except (AttributeError, IndexError, TypeError, ValueError) as error:
                problem = f"the reply isn't a chat completion ({type(error).__name__}: {error})"
        raise JudgeError(problem)


def png_bytes(image: Image.Image) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
