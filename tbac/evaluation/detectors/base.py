"""Detectors: they get a picture, and return a `Scan` with what they found in it."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

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
    """What the rules for pictures need.

    A detector may also have `object_names`, the names of all objects that it can find: prompts that ask for others are
    then refused before anything is drawn.
    """

    def __call__(self, image: Image.Image, colored: Collection[str] = ()) -> Scan:
        """Read one picture; at least objects whose name is in `colored` get their colour."""
        ...


def check_names(detector: Any, wanted: Iterable[str], what: str) -> None:
    """Raise ValueError, by name, for objects that a detector can't find; one that doesn't list its names passes."""
    names = getattr(detector, "object_names", None)
    lacking = [] if names is None else sorted(set(wanted) - set(names))
    if names is not None and lacking:
        listed = ", ".join(lacking[:5]) + (f" and {len(lacking) - 5} more" if len(lacking) > 5 else "")
        raise ValueError(
            f"the judge can't find {listed}, which {what} asks for; it knows {len(set(names or ()))} objects"
        )
