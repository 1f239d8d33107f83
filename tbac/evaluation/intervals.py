"""How sure scores are: 95 % intervals by a bootstrap over prompts, also of the difference of two models."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tbac.evaluation.benchmarks.base import PictureBenchmark
from tbac.evaluation.benchmarks.rows import Row

RESAMPLES = 1000
BOUNDS = (2.5, 97.5)  # percentiles
Interval = tuple[float, float]


@dataclass(frozen=True)
class Tally:
    """What each prompt adds to each mean.

    Attributes:
        cells: names of the means.
        sums: (prompt, cell), of the weighted values.
        weights: (prompt, cell).
    """

    cells: Sequence[str]
    sums: np.ndarray
    weights: np.ndarray

    def resample(self, times: np.ndarray) -> list[dict[str, float]]:
        """Compute the means where each prompt counts so many times.

        Args:
            times: (resample, prompt).
        """
        sums, weights = times @ self.sums, times @ self.weights
        results = []
        for row, total in zip(sums, weights, strict=True):
            results.append({c: row[i] / total[i] for i, c in enumerate(self.cells) if total[i]})
        return results


def list_prompts(benchmark: PictureBenchmark) -> dict[str, str]:
    """List the prompts of a benchmark, in order, each with the group that its first picture counts for."""
    groups: dict[str, str] = {}
    for target in benchmark.targets:
        groups.setdefault(benchmark.find_prompt(target), benchmark.find_group(target))
    return groups


def build_tally(benchmark: PictureBenchmark, rows: Sequence[Row], cells: Sequence[str]) -> Tally:
    """Build the tally of a benchmark's rows for some means."""
    index = {prompt: number for number, prompt in enumerate(list_prompts(benchmark))}
    prompt_of = {target.path: index[benchmark.find_prompt(target)] for target in benchmark.targets}
    column = {cell: number for number, cell in enumerate(cells)}
    sums, weights = np.zeros((len(index), len(cells))), np.zeros((len(index), len(cells)))
    for row in rows:
        for count in benchmark.count(row):
            place = prompt_of[row.picture], column[count.cell]
            sums[place] += count.weight * count.value
            weights[place] += count.weight
    return Tally(cells, sums, weights)


def draw_resamples(benchmark: PictureBenchmark, seed: int = 0) -> np.ndarray:
    """Draw how often each prompt counts in each resample: prompts with replacement, within each group.

    Returns:
        (resample, prompt).
    """
    generator = np.random.default_rng(seed)
    groups = list(list_prompts(benchmark).values())
    times = np.zeros((RESAMPLES, len(groups)))
    for group in dict.fromkeys(groups):
        members = [number for number, name in enumerate(groups) if name == group]
        times[:, members] = generator.multinomial(len(members), np.full(len(members), 1 / len(members)), RESAMPLES)
    return times


def find_unsure(benchmark: PictureBenchmark, tally: Tally) -> set[str]:
    """Find the scores that a mean without an interval goes into: one that a single prompt, or a group of one, decides.

    However often a single prompt is drawn, the mean stays the same; that says nothing about how sure it is.
    """
    counts = tally.weights > 0
    groups = np.array(list(list_prompts(benchmark).values()), dtype=object)
    alone = np.array([(groups == group).sum() < 2 for group in groups])
    is_thin = (counts.sum(0) < 2) | counts[alone].any(0)
    # A score depends on a mean if it changes with it.
    (means,) = tally.resample(np.ones((1, len(groups))))
    if not means:
        return set()
    scores, unsure = benchmark.combine(means), set()
    for cell in (cell for cell, thin in zip(tally.cells, is_thin, strict=True) if thin and cell in means):
        changed = benchmark.combine({**means, cell: means[cell] + 0.5})
        unsure |= {name for name in scores if changed.get(name) != scores[name]}
    return unsure


def list_cells(benchmark: PictureBenchmark, rows: Sequence[Row]) -> list[str]:
    """List the names of all means that rows count for, in the order in which they come."""
    return list(dict.fromkeys(count.cell for row in rows for count in benchmark.count(row)))


def compute_intervals(benchmark: PictureBenchmark, rows: Sequence[Row]) -> dict[str, Interval]:
    """Compute the 95 % interval of each score that at least two prompts of each of its groups decide.

    There is none for a benchmark without means.
    """
    cells = list_cells(benchmark, rows)
    if not cells:
        return {}
    tally = build_tally(benchmark, rows, cells)
    means = tally.resample(draw_resamples(benchmark))
    intervals = take_percentiles([benchmark.combine(resampled) for resampled in means if resampled])
    return leave_out(intervals, find_unsure(benchmark, tally))


def compute_differences(
    benchmark: PictureBenchmark, rows: Sequence[Row], other_rows: Sequence[Row]
) -> dict[str, Interval]:
    """Compute the 95 % interval of each score minus the other model's, where both have the same prompts resampled."""
    cells = list_cells(benchmark, [*rows, *other_rows])
    if not cells:
        return {}
    times = draw_resamples(benchmark)
    first, second = (build_tally(benchmark, of_model, cells) for of_model in (rows, other_rows))
    pairs = zip(first.resample(times), second.resample(times), strict=True)
    differences = []
    for ours, theirs in pairs:
        if ours and theirs:
            scores, others = benchmark.combine(ours), benchmark.combine(theirs)
            differences.append({name: scores[name] - others[name] for name in scores if name in others})
    return leave_out(take_percentiles(differences), find_unsure(benchmark, first) | find_unsure(benchmark, second))


def leave_out(intervals: dict[str, Interval], names: set[str]) -> dict[str, Interval]:
    """Leave out the intervals of some scores."""
    return {name: interval for name, interval in intervals.items() if name not in names}


def take_percentiles(resampled: Sequence[dict[str, float]]) -> dict[str, Interval]:
    """Take the bounds of each score over the resamples that have it."""
    values: dict[str, list[float]] = {}
    for scores in resampled:
        for name, value in scores.items():
            values.setdefault(name, []).append(value)
    bounds = {}
    for name, of_name in values.items():
        low, high = np.percentile(of_name, BOUNDS)
        bounds[name] = (float(low), float(high))
    return bounds
