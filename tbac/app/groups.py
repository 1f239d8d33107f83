"""What a group of conf/ may hold: options, a class that `_target_` names with its options, or several named classes."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from tbac.app.kinds import (
    Kind,
    list_of,
    mapping_of,
    number,
    pattern,
    text,
    whole,
)

DEVICE = pattern(r"auto|cpu|mps|cuda(:\d+)?", "auto, cpu, cuda, cuda:NUMBER or mps")
SIZE = list_of(whole(), count=2, single=False)
PROBABILITY = number(least=0, most=1)
NAMES_TO_LISTS = mapping_of(list_of(text()), "a mapping from names to lists of texts")


@dataclass(frozen=True)
class Part:
    """A group that names a class by `_target_`.

    Attributes:
        options: dotted name of a class of ours -> its options.
        common: options that a class from elsewhere must understand as ours do, where it has them.
        needed: whether null is refused.
    """

    options: Mapping[str, "Fields"]
    common: "Fields" = field(default_factory=dict)
    needed: bool = True


@dataclass(frozen=True)
class Parts:
    """A group of several named parts, such as the callbacks; names are the user's choice."""

    part: Part


Fields = Mapping[str, "Kind | Part | Parts | Fields"]


def shares(*names: str) -> Fields:
    """Options that are probabilities."""
    return dict.fromkeys(names, PROBABILITY)


def counts(*names: str) -> Fields:
    """Options that are whole numbers of at least 1."""
    return dict.fromkeys(names, whole())
