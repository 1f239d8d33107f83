"""What scoring finds out about each picture, and what a benchmark makes of all of it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from omegaconf import DictConfig

from tbac.evaluation.trees import Target, readable


@dataclass(frozen=True)
class Row:
    """One picture.

    Attributes:
        picture: its path in the tree.
        group: tag, type, kind or category that it counts for.
        prompt: what it was to show.
        state: `scored`; `missing`, when it isn't there or can't be read; `failed`, when the judge gave no usable reply.
        score: in [0, 1]; None unless it was scored.
        reason: what is wrong.
        details: what the benchmark's averages need besides.
    """

    picture: str
    group: str
    prompt: str
    state: str = "scored"
    score: float | None = None
    reason: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


def missing(target: Target, group: str, root: Path) -> Row | None:
    """The row of a picture that isn't there or doesn't decode; None for one that does."""
    if readable(root / target.path):
        return None
    return Row(target.path, group, target.prompt, "missing", None, "the picture is missing")


@dataclass(frozen=True)
class Summary:
    """What a benchmark reports.

    Attributes:
        scores: name -> value; `overall` first.
        protocol: how they were reached.
        comparable: whether published numbers were reached the same way; "" then, else why not.
        notes: further sentences.
    """

    scores: Mapping[str, float]
    protocol: str
    differences: Sequence[str] = ()
    notes: Sequence[str] = ()

    @property
    def comparable(self) -> bool:
        """Whether the numbers may stand beside published ones."""
        return not self.differences


class Benchmark(Protocol):
    """A benchmark: which pictures it wants, how they are judged, and what its scores are.

    Attributes:
        title: what it is called.
        judged: whether it has scores at all.
    """

    title: str
    judged: bool

    def __init__(self, cfg: DictConfig, samples: int) -> None:
        """Read the files that the benchmark's config names; `samples` of each prompt where their number is free."""
        ...

    def targets(self) -> list[Target]:
        """Every picture."""
        ...

    def write_beside(self, root: Path) -> None:
        """Files of the tree besides pictures."""
        ...

    def check_judge(self, judge: Any) -> None:
        """Raise ValueError where the judge is of the wrong kind, or something that judging needs isn't given."""
        ...

    def rows(self, root: Path, judge: Any) -> Iterator[Row]:
        """Judge every picture of a tree."""
        ...

    def summary(self, rows: Sequence[Row], judge_name: str) -> Summary:
        """Scores of all rows."""
        ...
