"""Detectors: they get a picture, and return a `Scan` with what they found in it."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from PIL import Image


@dataclass(frozen=True)
class Detection:
    """One object found in a picture.

    Attributes:
        name: class of the object.
        color: name of its colour.
        box: (left, top, right, bottom) in pixels, right and bottom exclusive.
        score: confidence in [0, 1].
    """

    name: str
    color: str
    box: tuple[float, float, float, float]
    score: float

    @property
    def center(self) -> tuple[float, float]:
        """(x, y) of the middle of the box, in pixels."""
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


@dataclass(frozen=True)
class Scan:
    """Everything that a detector reads from one picture: the objects and the name of the background colour."""

    background: str
    detections: tuple[Detection, ...]


class Detector(Protocol):
    """What the rules for pictures need."""

    def __call__(self, image: Image.Image, colored: Collection[str] = ()) -> Scan:
        """Read one picture; at least objects whose name is in `colored` get their colour."""
        ...
