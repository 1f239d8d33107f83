"""Compares the points of a sweep with its baseline, seed by seed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from scipy.stats import t as student

from experiments.reports import format_table
from experiments.sweeps.points import Point

# Key of a sweep, and the value that others are compared with.
BASELINES = (("taps", "final"), ("experiment", "as_released"), ("experiment", "ladder/final"))
SIZES = (0.05, 0.02)  # differences of a score for which the report says how many seeds tell them
MOST_SEEDS = 1000
LOSS = ("validation loss", "loss", False)  # label, score, whether higher is better
OVERALL = ("GenEval rules, overall", "overall", True)


@dataclass(frozen=True)
class Comparison:
    """A value of a key against the baseline's, where seed and all other choices are equal.

    Attributes:
        value: of the key.
        differences: one for each pair; value minus baseline.
    """

    value: str
    differences: Sequence[float]

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the mean difference, by Student's t; None for a single pair."""
        count = len(self.differences)
        if count < 2:
            return None
        half = student.ppf(0.975, count - 1) * stdev(self.differences) / count**0.5
        return mean(self.differences) - float(half), mean(self.differences) + float(half)

    def count_seeds(self, size: float) -> int | None:
        """Count the pairs with which an interval of this spread is narrow enough to tell a difference from 0.

        Args:
            size: of the difference; the half of the interval must not be longer.

        Returns:
            The number; None for a single pair, whose spread isn't known, and above `MOST_SEEDS`.
        """
        if len(self.differences) < 2:
            return None
        spread = stdev(self.differences)
        counts = range(2, MOST_SEEDS + 1)
        return next((n for n in counts if student.ppf(0.975, n - 1) * spread / n**0.5 <= size), None)


def find_baseline(points: Sequence[Point]) -> tuple[str, str] | None:
    """Find the key and the value that the others are compared with; None where the sweep has none of `BASELINES`."""
    for key, value in BASELINES:
        if any(point.choices.get(key) == value for point in points):
            return key, value
    return None


def compare_points(points: Sequence[Point], key: str, baseline: str, score: str) -> list[Comparison]:
    """Compare each value of a key with the baseline.

    Args:
        points: scored.
        key: of the sweep, such as `taps`.
        baseline: its value that the others are compared with.
        score: `loss`, or a tag of GenEval's rules.
    """
    pairs: dict[tuple[tuple[str, str], ...], dict[str, Point]] = {}
    for point in points:
        others = tuple(sorted((name, value) for name, value in point.choices.items() if name != key))
        pairs.setdefault(others, {})[point.choices.get(key, "")] = point
    differences: dict[str, list[float]] = {}
    for by_value in pairs.values():
        for value, point in by_value.items():
            if value != baseline and baseline in by_value:
                difference = read_score(point, score) - read_score(by_value[baseline], score)
                differences.setdefault(value, []).append(difference)
    return [Comparison(value, found) for value, found in differences.items()]


def read_score(point: Point, score: str) -> float:
    """Read the validation loss, or a tag of GenEval's rules."""
    value: float = point.scores["loss"] if score == "loss" else point.scores["geneval"][score]
    return value


def describe_verdict(comparison: Comparison, higher_is_better: bool) -> str:
    """Say whether the interval is clear of 0, and on which side."""
    interval = comparison.interval
    if interval is None:
        return "one pair tells nothing"
    if interval[0] <= 0 <= interval[1]:
        return "open"
    return "better" if (interval[0] > 0) == higher_is_better else "worse"


def tabulate_comparisons(points: Sequence[Point], scores: Sequence[tuple[str, str, bool]] = (OVERALL, LOSS)) -> str:
    """Tabulate every value of the compared key against the baseline; an empty text where there is nothing to.

    Args:
        points: with these scores.
        scores: label, name and whether higher is better.
    """
    found = find_baseline(points)
    if found is None:
        return ""
    key, baseline = found
    rows = []
    for label, score, higher in scores:
        for comparison in compare_points(points, key, baseline, score):
            rows.append(format_comparison(comparison, label, higher))
    if not rows:
        return ""
    sizes = [f"seeds to tell {size}" for size in SIZES]
    header = [f"{key}, minus `{baseline}`", "of", "pairs", "mean", "95 % interval", "better in", "it is", *sizes]
    return (
        f"Pairs of equal seed and equal other choices; the interval of the mean is Student's. A difference counts as "
        f"found when its interval is clear of 0; the last columns say how many seeds would make it narrow enough.\n\n"
        f"{format_table(header, rows)}"
    )


def format_comparison(comparison: Comparison, label: str, higher_is_better: bool) -> list[str | int]:
    """Format a comparison as the row of a table."""
    sign = 1 if higher_is_better else -1
    wins = sum(sign * difference > 0 for difference in comparison.differences)
    interval = comparison.interval
    seeds = [str(comparison.count_seeds(size) or "?") if higher_is_better else "" for size in SIZES]
    return [
        f"`{comparison.value}`",
        label,
        len(comparison.differences),
        f"{mean(comparison.differences):+.4f}",
        f"{interval[0]:+.4f} to {interval[1]:+.4f}" if interval else "",
        f"{wins} of {len(comparison.differences)}",
        describe_verdict(comparison, higher_is_better),
        *seeds,
    ]


def describe_layers(points: Mapping[str, Sequence[Point]]) -> dict[str, str]:
    """Describe which layers of the MLLM the points of each group read."""
    found = {}
    for group, members in points.items():
        layers = " ".join(map(str, members[0].scores["layers"]))
        found[group] = f"mixes of {layers}" if members[0].scores["mix"] else layers
    return found
