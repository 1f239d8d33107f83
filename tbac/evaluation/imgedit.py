"""ImgEdit: from a judge's replies to scores by kind of edit."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

NUM_KINDS = 9  # of the published macro mean


def reply_score(reply: str) -> float | None:
    """Mean of the ratings in a reply, to two decimals; None when it holds none.

    A rating is a line `<name>: <whole number>` with exactly one colon and space, as the official scorer reads it.
    """
    ratings = []
    for line in reply.splitlines():
        parts = line.strip().split(": ")
        if len(parts) == 2 and parts[1].isdecimal():
            ratings.append(int(parts[1]))
    return round(sum(ratings) / len(ratings), 2) if ratings else None


@dataclass(frozen=True)
class EditScores:
    """Result of ImgEdit.

    Attributes:
        macro: mean over kinds, each rounded to two decimals: the published number.
        micro: mean over edits.
        by_kind: kind -> mean, to two decimals.
        scored: edits with a score.
        unscored: edits without a reply, or with one that holds no rating; they are in no mean.
    """

    macro: float
    micro: float
    by_kind: Mapping[str, float]
    scored: int
    unscored: Sequence[str]

    @property
    def comparable(self) -> bool:
        """Whether every edit was scored and every kind is there, as for published numbers."""
        return not self.unscored and len(self.by_kind) == NUM_KINDS


def edit_scores(replies: Mapping[str, str | None], kinds: Mapping[str, str]) -> EditScores:
    """Aggregate replies.

    Args:
        replies: key of an edit -> what the judge said, or None when it failed.
        kinds: key -> kind, of every edit of the benchmark.

    Raises:
        ValueError: for a reply to an unknown edit, or when none has a score.
    """
    unknown = sorted(replies.keys() - kinds.keys())
    if unknown:
        raise ValueError(f"replies to edits that the benchmark doesn't have: {', '.join(unknown[:5])}")
    by_kind: dict[str, list[float]] = defaultdict(list)
    unscored = []
    for key, kind in kinds.items():
        reply = replies.get(key)
        score = None if reply is None else reply_score(reply)
        if score is None:
            unscored.append(key)
        else:
            by_kind[kind].append(score)
    if not by_kind:
        raise ValueError("no reply of the judge holds a rating")
    means = {kind: round(sum(scores) / len(scores), 2) for kind, scores in by_kind.items()}
    every = [score for scores in by_kind.values() for score in scores]
    return EditScores(sum(means.values()) / len(means), sum(every) / len(every), means, len(every), unscored)
