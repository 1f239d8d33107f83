"""Judges: a question about pictures in, a reply in words out.

A reply is read by the rules of a benchmark alone. A judge that has none raises `JudgeError`; whoever scores counts that
and shows it.
"""

import base64
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from tbac.evaluation.detectors import Detection, Scan
from tbac.evaluation.rules import RELATIONS, Thresholds, relations
from tbac.models.uniimage import ANSWER_SYSTEM

THIRDS = (("top", "middle", "bottom"), ("left", "center", "right"))


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


def yes_or_no(reply: str) -> bool | None:
    """Whether a reply begins with "yes" or "no"; None when with neither."""
    found = re.match(r"\W*(yes|no)\b", reply, re.IGNORECASE)
    return None if found is None else found[1].lower() == "yes"


def yes_or_no_lines(reply: str, count: int) -> list[bool] | None:
    """The answers to several questions, a line for each; None when there are more or fewer.

    Lines that begin with neither word are passed over, as TIIF-Bench's scorer does.
    """
    answers = [answer for line in reply.splitlines() if (answer := yes_or_no(line)) is not None]
    return answers if len(answers) == count else None


class DetectorJudge:
    """Answers questions of a few forms by what a detector finds: the judge of closed worlds.

    The forms: `is there a <object>?`, `is there a <object> at the <place>?`, `is a <object> <relation> a <object>?`,
    `is the number of <objects> <n>?`, `is the background <name>?`, `does it say "<letters>"?`, the last one also with
    `in <color>`. An object is a name with or without a colour before it. Several lines are several questions; what
    follows the question mark, and lines without any, are instructions and are passed over.

    Args:
        detector: reads a picture.
        names: of all objects that it can find.
        colors: of all colours.
    """

    slow = False

    def __init__(self, detector: Callable[[Image.Image], Scan], names: Sequence[str], colors: Sequence[str]) -> None:
        self.detector = detector
        self.identity = f"questions of fixed forms, answered by {type(detector).__name__}"
        objects: dict[str, tuple[str | None, str]] = {name: (None, name) for name in names}
        objects |= {f"{color} {name}": (color, name) for color in colors for name in names}
        several = {name: f"letters {name[7:]}" if name.startswith("letter ") else f"{name}s" for name in names}
        self._objects = dict(objects)
        for phrase, (color, name) in objects.items():
            self._objects[phrase.removesuffix(name) + several[name]] = (color, name)

    def ask(self, question: str, images: Sequence[Image.Image]) -> str:
        """ "yes" or "no", in a line for each question.

        Raises:
            JudgeError: for a question of another form.
        """
        scan = self.detector(images[-1])
        size = images[-1].size
        asked = [line[: line.rindex("?") + 1] for line in question.splitlines() if "?" in line]
        return "\n".join("yes" if self._holds(one, scan, size) else "no" for one in asked)

    def _found(self, phrase: str, scan: Scan) -> list[Detection]:
        if phrase not in self._objects:
            raise JudgeError(f"no detector finds {phrase!r}")
        color, name = self._objects[phrase]
        return [d for d in scan.detections if d.name == name and color in (None, d.color)]

    def _holds(self, question: str, scan: Scan, size: tuple[int, int]) -> bool:
        if match := re.fullmatch(r"is there an? (.+?)(?: at the (\w+) (\w+))?\?", question):
            place = match.groups()[1:]
            return any(place in ((None, None), _third(d, size)) for d in self._found(match[1], scan))
        if match := re.fullmatch(rf"is an? (.+) ({'|'.join(RELATIONS)}) an? (.+)\?", question):
            first, second = self._found(match[1], scan), self._found(match[3], scan)
            return any(match[2] in relations(a, b) for a in first for b in second if a is not b)
        if match := re.fullmatch(r"is the number of (.+) (\d+)\?", question):
            return len(self._found(match[1], scan)) == int(match[2])
        if match := re.fullmatch(r"is the background (\w+)\?", question):
            return scan.background == match[1]
        if match := re.fullmatch(r'does it say "(\w+)"(?: in (\w+))?\?', question):
            letters = sorted((d for d in scan.detections if d.name.startswith("letter ")), key=lambda d: d.center)
            said = "".join(d.name[-1] for d in letters)
            return said == match[1] and all(match[2] in (None, d.color) for d in letters)
        raise JudgeError(f"the detector can't answer {question!r}")


def _third(detection: Detection, size: tuple[int, int]) -> tuple[str, str]:
    """Row and column of the third of the picture where a detection stands."""
    x, y = (min(2, int(3 * place / length)) for place, length in zip(detection.center, size, strict=True))
    return THIRDS[0][y], THIRDS[1][x]


class LocalJudge:
    """A Qwen2.5-VL of one's own, greedily.

    Args:
        mllm: folder or hub id, with tokenizer and image processor.
        device: where it runs; `auto` is CUDA where there is one.
        dtype: of the weights.
        quantization: of the decoder layers: `nf4`, `int8`, or None.
        image_pixels: area that each picture is resized to.
        max_text_tokens: longest question.
        max_new_tokens: longest reply.

    Raises:
        ValueError: when there are no such weights.
    """

    slow = True

    def __init__(
        self,
        mllm: str,
        device: str = "auto",
        dtype: str = "bfloat16",
        quantization: str | None = None,
        image_pixels: int = 802816,
        max_text_tokens: int = 2048,
        max_new_tokens: int = 512,
    ) -> None:
        from tbac.models.loading import open_mllm
        from tbac.models.prompt import PromptProcessor

        folder, self.model = open_mllm("judge.mllm", mllm, dtype, quantization)
        self.prompt = PromptProcessor.from_pretrained(
            folder, image_pixels=image_pixels, max_text_tokens=max_text_tokens
        )
        kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self.model.to(kind)
        self.device, self.max_new_tokens = kind, max_new_tokens
        settings = {"dtype": dtype, "quantization": quantization, "image_pixels": image_pixels}
        self.identity = f"{mllm} ({settings | {'max_new_tokens': max_new_tokens}})"

    def ask(self, question: str, images: Sequence[Image.Image]) -> str:
        """The model's reply."""
        inputs = self.prompt([question], [list(images)], system=ANSWER_SYSTEM, ending="", padding_side="left")
        tokens = self.model.generate(dict(inputs.to(self.device)), self.max_new_tokens)
        reply = self.prompt.tokenizer.batch_decode(tokens, skip_special_tokens=True)[0].strip()
        if not reply:
            raise JudgeError("the reply is empty")
        return reply


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


class Kept:
    """What was found out about pictures, in a file of JSON lines, so that scoring goes on where it stopped.

    Args:
        file: made where there is none; a line that was torn when writing was cut off is passed over.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._known: dict[str, Any] = {}
        for line in file.read_text().splitlines() if file.is_file() else ():
            try:
                row = json.loads(line)
                self._known[row["key"]] = row["value"]
            except (ValueError, KeyError, TypeError):
                continue

    def get(self, about: Sequence[Any], images: Sequence[Image.Image], find_out: Callable[[], Any]) -> Any:
        """The value, from the file if it was found out before.

        Args:
            about: what else than the pixels it depends on.
            images: pictures.
            find_out: gives the value; what it raises isn't kept.
        """
        pixels = [hashlib.sha256(f"{i.mode}{i.size}".encode() + i.tobytes()).hexdigest() for i in images]
        key = hashlib.sha256(json.dumps([about, pixels]).encode()).hexdigest()
        if key not in self._known:
            self._known[key] = find_out()
            with self.file.open("a") as file:
                file.write(f"\n{json.dumps({'key': key, 'value': self._known[key]})}\n")
        return self._known[key]


class KeptJudge:
    """A judge whose replies are kept; what failed is asked again.

    Args:
        judge: who is asked.
        kept: where.
    """

    slow = False

    def __init__(self, judge: Judge, kept: Kept) -> None:
        self.judge, self.kept, self.identity = judge, kept, judge.identity

    def ask(self, question: str, images: Sequence[Image.Image]) -> str:
        """The reply, as it was given before or now."""
        return self.kept.get([self.identity, question], images, lambda: self.judge.ask(question, images))


class KeptDetector:
    """A detector whose scans are kept.

    Args:
        detector: who looks; its `identity` says what its scans depend on besides the picture.
        kept: where.
    """

    def __init__(self, detector: Any, kept: Kept) -> None:
        self.detector, self.kept, self.identity = detector, kept, detector.identity
        self.thresholds: Thresholds = detector.thresholds

    def __call__(self, image: Image.Image, colored: Collection[str] = ()) -> Scan:
        """The scan, as it was made before or now."""

        def look() -> dict[str, Any]:
            scan = self.detector(image, colored)
            return {"background": scan.background, "detections": [asdict(d) for d in scan.detections]}

        found = self.kept.get([self.identity, sorted(colored)], [image], look)
        detections = (Detection(**{**d, "box": tuple(d["box"])}) for d in found["detections"])
        return Scan(found["background"], tuple(detections))


def png_bytes(image: Image.Image) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
