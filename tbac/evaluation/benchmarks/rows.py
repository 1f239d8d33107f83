"""What is concluded about a benchmark's pictures, one by one and together."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tbac.evaluation.protocol import UNKNOWN
from tbac.files import shorten

STATES = ("scored", "missing", "failed")  # of a picture


@dataclass(frozen=True)
class PictureVerdict:
    """What a benchmark concludes about one picture from a judge's reply or a detector's scan.

    Attributes:
        score: in [0, 1]; None where the benchmark has no score.
        reason: what is wrong with the picture.
        details: whatever else `summarize` needs.

    Raises:
        ScoreError: for a score that isn't a number in [0, 1], such as NaN.
    """

    score: float | None
    reason: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_score(self.score)


class ScoreError(ValueError):
    """A judge has given a score that is none."""


def check_score(score: Any) -> None:
    """Raise ScoreError for what is neither None nor a number in [0, 1]."""
    is_number = isinstance(score, int | float) and not isinstance(score, bool)
    if score is not None and not (is_number and 0 <= score <= 1):
        raise ScoreError(f"a score must be a number from 0 to 1, got {shorten(score)}")


@dataclass(frozen=True)
class Row:
    """One picture of a benchmark, and its score.

    Attributes:
        picture: its path in the tree.
        group: tag, type, kind or category that it counts for.
        prompt: what it should show.
        state: `scored`; `missing`, when it isn't there or can't be read; `failed`, when the judge gave no usable reply.
        score: in [0, 1]; None unless it was scored.
        reason: what is wrong with it.
        details: whatever else `summarize` needs.
    """

    picture: str
    group: str
    prompt: str
    state: str = "scored"
    score: float | None = None
    reason: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Summary:
    """What a benchmark reports.

    Attributes:
        scores: name -> value, the most important one first.
        protocol: how they were computed.
        notes: further sentences for the report.
    """

    scores: Mapping[str, float]
    protocol: str
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Count:
    """What a picture adds to a mean.

    Attributes:
        cell: name of the mean, such as a tag.
        value: what is averaged.
        weight: how much it counts.
    """

    cell: str
    value: float
    weight: float = 1.0


@dataclass(frozen=True)
class Drawn:
    """What is known of how the pictures of a tree were drawn.

    Attributes:
        cut: number of prompts that were longer than the model reads.
        sampling: steps, guidance and so on.
        checkpoint: digest of what training had made of the model.
        settings: all that the pictures depend on besides their prompts, as their records hold it.
    """

    cut: Any = UNKNOWN
    sampling: Any = UNKNOWN
    checkpoint: Any = UNKNOWN
    settings: Any = UNKNOWN


def compute_means(counts: Iterable[Count]) -> dict[str, float]:
    """Compute the weighted mean of each cell, in the order in which they come; cells without weight are left out."""
    sums: dict[str, float] = {}
    weights: dict[str, float] = {}
    for count in counts:
        sums[count.cell] = sums.get(count.cell, 0.0) + count.weight * count.value
        weights[count.cell] = weights.get(count.cell, 0.0) + count.weight
    return {cell: sums[cell] / weight for cell, weight in weights.items() if weight}
