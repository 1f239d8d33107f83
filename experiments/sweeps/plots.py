"""The plots of a sweep's report, as PNG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from experiments.sweeps.points import Point

Groups = Mapping[str, Sequence[Point]]
Histories = Mapping[str, Sequence[Mapping[str, Sequence[tuple[int, float]]]]]


def save_figure(figure: plt.Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_scores_by_group(groups: Groups, path: Path) -> None:
    """Draw the overall score of each group: a bar for the mean, a dot for each seed."""
    figure, axes = plt.subplots(figsize=(7, 0.5 * len(groups) + 1.5))
    for row, points in enumerate(groups.values()):
        values = [p.scores["geneval"]["overall"] for p in points]
        axes.barh(row, mean(values), color="#9ecae1")
        axes.plot(values, [row] * len(values), "o", color="#08519c", markersize=5)
        axes.text(max(values) + 0.01, row, f"{mean(values):.3f}", va="center")
    axes.set_yticks(range(len(groups)), list(groups))
    axes.invert_yaxis()
    axes.set_xlabel("GenEval rules, overall (dots: seeds)")
    axes.margins(x=0.12)
    save_figure(figure, path)


def draw_scores_by_tag(groups: Groups, path: Path) -> None:
    """Draw the mean score of each group for each tag, as a table in colours."""
    tags = list(next(iter(groups.values()))[0].scores["geneval"])

    def average_score(points: Sequence[Point], tag: str) -> float:
        return mean(point.scores["geneval"][tag] for point in points)

    rows = []
    for points in groups.values():
        rows.append([average_score(points, tag) for tag in tags])
    draw_heat_map(np.array(rows), list(groups), tags, "mean over seeds", path)


def draw_heat_map(values: np.ndarray, rows: Sequence[str], columns: Sequence[str], title: str, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(1.0 * len(columns) + 3, 0.5 * len(rows) + 1.8))
    image = axes.imshow(values, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    middle = (values.max() + values.min()) / 2
    for row, column in np.ndindex(values.shape):
        color = "white" if values[row, column] < middle else "black"
        axes.text(column, row, f"{values[row, column]:.2f}", ha="center", va="center", color=color)
    axes.set_title(title, fontsize=10)
    figure.colorbar(image)
    save_figure(figure, path)


def draw_curves(histories: Histories, metric: str, label: str, path: Path) -> bool:
    """Draw a metric over steps: the mean over seeds, and its range; returns whether there was anything to draw."""
    figure, axes = plt.subplots(figsize=(7, 4.5))
    axes.set_prop_cycle(color=plt.get_cmap("tab20").colors)  # type: ignore[attr-defined]
    drawn = False
    for name, runs in histories.items():
        series = [dict(run[metric]) for run in runs if metric in run]
        # Only the steps that every seed has reached.
        steps = sorted(set.intersection(*map(set, series))) if series else []
        if not steps:
            continue
        rows = []
        for values_of_step in series:
            rows.append([values_of_step[step] for step in steps])
        values = np.array(rows)
        (line,) = axes.plot(steps, values.mean(0), marker="o", markersize=3, label=name)
        axes.fill_between(steps, values.min(0), values.max(0), color=line.get_color(), alpha=0.15)
        drawn = True
    # A legend of many groups needs small letters; an empty plot isn't saved.
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(label)
    axes.set_yscale("log")
    if drawn:
        axes.legend(fontsize=7 if len(histories) > 8 else 8)
        save_figure(figure, path)
    plt.close(figure)
    return drawn


def draw_learned_mix(points: Sequence[Point], path: Path) -> None:
    """Draw the share of each MLLM layer in each block's tap, mean over seeds."""
    shares = np.mean([p.scores["mix"] for p in points], axis=0)
    rows = [f"block {i}" for i in range(len(shares))]
    columns = [f"layer {layer}" for layer in points[0].scores["layers"]]
    draw_heat_map(shares, rows, columns, "share of each layer in each block's tap", path)


def draw_bars_by_tap(values: Mapping[str, Mapping[str, Sequence[float]]], label: str, path: Path) -> None:
    """Draw a panel for each group: a bar per tap with the mean over seeds and its standard deviation."""
    columns = min(4, len(values))
    rows = -(-len(values) // columns)
    size = (2.4 * columns + 1, 2.6 * rows + 0.6)
    figure, axes = plt.subplots(rows, columns, figsize=size, sharey=True, squeeze=False)
    for panel in axes.flat[len(values) :]:
        panel.axis("off")
    for panel, (name, taps) in zip(axes.flat, values.items(), strict=False):
        heights = [mean(v) for v in taps.values()]
        errors = [stdev(v) if len(v) > 1 else 0 for v in taps.values()]
        panel.bar(list(taps), heights, yerr=errors, color="#a1d99b", ecolor="#31a354", capsize=3)
        panel.set_title(name, fontsize=9)
        panel.set_xlabel("tap")
    for row in axes:
        row[0].set_ylabel(label)
    save_figure(figure, path)
