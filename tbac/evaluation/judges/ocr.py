"""A judge that reads words in pictures: optical character recognition by PP-OCR's models, which its package holds."""

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from tbac.evaluation.judges.base import JudgeError, JudgeFacts
from tbac.files import describe_error
from tbac.pictures import to_upright_rgb

LONGEST_SIDE = 4  # times the shorter one; the finder of lines enlarges by the shorter side, and would take minutes
SAYS = re.compile(r'does it say "([^"]+)"\?')


@dataclass(frozen=True)
class TextLine:
    """A line of text in a picture.

    Attributes:
        text: what it says.
        score: how sure that is, in [0, 1].
        corners: four points (x, y) in pixels, from the upper left clockwise.
    """

    text: str
    score: float
    corners: tuple[tuple[float, float], ...]


@dataclass(eq=False)
class OcrJudge:
    """Reads the lines of text in a picture with PP-OCR.

    Attributes:
        min_score: lines that it is less sure of are left out.
        least_side: pictures whose shorter side has fewer pixels are enlarged to it, since the finder of lines is made
            for larger pictures.
    """

    slow: ClassVar[bool] = True
    steady: ClassVar[bool] = True  # it reads the same when it reads again

    min_score: float = 0.5
    least_side: int = 512

    def __post_init__(self) -> None:
        if not 0 <= self.min_score <= 1:
            raise ValueError(f"judge.min_score must be from 0 to 1, got {self.min_score}")
        options = f"min_score {self.min_score}, least_side {self.least_side}"
        self.identity = f"PP-OCR of rapidocr {version('rapidocr')} ({options})"

    @cached_property
    def _engine(self) -> Any:
        """The models, loaded when the first picture is read."""
        from rapidocr import RapidOCR  # takes a second, and sets up its own logging

        engine = RapidOCR(params={"Global.text_score": self.min_score, "Global.log_level": "error"})
        logging.getLogger("RapidOCR").setLevel(logging.ERROR)
        return engine

    def describe_facts(self) -> JudgeFacts:
        """Describe the reader by its package, which holds the models."""
        return JudgeFacts("PP-OCR", f"rapidocr {version('rapidocr')}", f"min_score {self.min_score}")

    def read_lines(self, image: Image.Image) -> list[TextLine]:
        """Read the lines of a picture, from top to bottom and in a row from left to right.

        Raises:
            JudgeError: when the models can't read it.
        """
        upright = to_upright_rgb(image)
        image = pad_narrow(upright)
        scale = max(1, math.ceil(self.least_side / min(image.size)))
        if scale > 1:
            image = image.resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC)
        try:
            found = self._engine(np.asarray(image)[:, :, ::-1])  # it expects blue first
        except Exception as error:  # its packages raise errors of many kinds, without a common base
            size = f"{upright.width} x {upright.height}"
            raise JudgeError(
                f"the reader of text failed at a picture of {size} pixels ({describe_error(error)})"
            ) from error
        if found.txts is None:
            return []
        lines = []
        for text, score, corners in zip(found.txts, found.scores, found.boxes, strict=True):
            points = tuple((float(x) / scale, float(y) / scale) for x, y in corners)
            lines.append(TextLine(text, float(score), points))
        return lines

    def read_text_lines(self, image: Image.Image) -> list[str]:
        """Read the texts of the lines alone."""
        return [line.text for line in self.read_lines(image)]

    def ask(self, question: str, images: Sequence[Image.Image]) -> str:
        """Answer questions of the form `does it say "<letters>"?`, one in each line, with a line "yes" or "no".

        Spaces and the size of letters don't matter.

        Raises:
            JudgeError: for a question of another form.
        """
        asked = [line[: line.rindex("?") + 1] for line in question.splitlines() if "?" in line]
        said = normalise("".join(self.read_text_lines(images[-1])))
        answers = []
        for line in asked:
            match = SAYS.fullmatch(line.strip())
            if match is None:
                raise JudgeError(f"a reader of text can't answer {line!r}")
            answers.append("yes" if normalise(match[1]) == said else "no")
        return "\n".join(answers)


def pad_narrow(image: Image.Image) -> Image.Image:
    """Widen the shorter side of a very long or very wide picture at its right or lower edge, in the colour there."""
    least = math.ceil(max(image.size) / LONGEST_SIDE)
    if min(image.size) >= least:
        return image
    padded = Image.new("RGB", (max(image.width, least), max(image.height, least)), image.getpixel((-1, -1)))
    padded.paste(image)
    return padded


def normalise(text: str) -> str:
    """Return a text without spaces and in lower case."""
    return re.sub(r"\s", "", text).lower()
