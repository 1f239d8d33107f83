"""Writes the report of a sweep: Markdown, with plots beside it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from experiments.reports import format_table
from experiments.sweeps import plots
from experiments.sweeps.pairs import describe_layers, tabulate_comparisons
from experiments.sweeps.points import SEED, Point, group_by_choices
from experiments.sweeps.score import open_grid
from tbac.sampling.grid import join_pictures


def group_points(points: Sequence[Point]) -> dict[str, list[Point]]:
    """Group the points that differ only in their seed; the best group comes first."""
    return dict(sorted(group_by_choices(points).items(), key=lambda item: -_average_overall(item[1])))


def _average_overall(points: Sequence[Point]) -> float:
    return mean(p.scores["geneval"]["overall"] for p in points)


def describe_spread(values: Sequence[float], digits: int = 3) -> str:
    """Format mean and standard deviation over seeds."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def tabulate(groups: Mapping[str, Sequence[Point]]) -> str:
    """Tabulate GenEval's scores and the validation loss, a row per group with the layers that it reads."""
    tags = [tag for tag in next(iter(groups.values()))[0].scores["geneval"] if tag != "overall"]
    layers = describe_layers(groups)
    rows = []
    for name, points in groups.items():
        scores = [point.scores["geneval"] for point in points]
        overall = describe_spread([by_tag["overall"] for by_tag in scores])
        loss = describe_spread([point.scores["loss"] for point in points], 4)
        row = [name, layers[name], len(points), overall, loss]
        for tag in tags:
            row.append(f"{mean(by_tag[tag] for by_tag in scores):.2f}")
        rows.append(row)
    return format_table(["point", "layers", "seeds", "overall", "validation loss", *tags], rows)


def tabulate_suites(groups: Mapping[str, Sequence[Point]]) -> str:
    """Tabulate the scores of further suites, a row per group; an empty text if no suite was asked for."""
    names = list(next(iter(groups.values()))[0].scores.get("suites", {}))
    if not names:
        return ""
    rows = []
    for group, points in groups.items():
        row = [group]
        for name in names:
            values = [point.scores["suites"][name] for point in points if name in point.scores["suites"]]
            digits = 3 if name.startswith("edits") else 1  # others are in percent
            row.append(describe_spread(values, digits) if values else "")
        rows.append(row)
    return format_table(["point", *names], rows)


@dataclass(frozen=True)
class Completeness:
    """How much of a sweep there is.

    Attributes:
        expected: number of points that the sweep has.
        failures: folder of a point that failed -> why.
    """

    expected: int
    failures: Mapping[str, str]


def tabulate_failures(failures: Mapping[str, str]) -> str:
    """Tabulate the points that failed; an empty text where none did."""
    if not failures:
        return ""
    rows = [[f"`{name}`", " ".join(message.split()).replace("|", "\\|")] for name, message in failures.items()]
    return "These points failed; the same command tries them again.\n\n" + format_table(["point", "why"], rows)


def write_report(
    name: str, points: Sequence[Point], histories: Mapping[Path, Mapping[str, Any]], out: Path, whole: Completeness
) -> Path:
    """Write `report.md` and its plots; returns its path.

    Args:
        name: of the sweep.
        points: scored.
        histories: folder of a point -> its metrics over time.
        out: where the report goes.
        whole: how many points the sweep has, and which of them failed.
    """
    groups = group_points(points)
    pictures = draw_plots(groups, points, histories, out)
    # Every run's length and the best point's choices, as one would repeat it.
    best = next(iter(groups.values()))[0]
    steps = [f"{stage['steps']} steps of {stage['name']}" for stage in best.stages]
    chosen = " ".join(f"{key}={value}" for key, value in best.choices.items() if key != SEED)
    sections = [
        f"# Sweep {name}",
        f"{len(points)} of {whole.expected} points are finished, {' and '.join(steps)} each. "
        f"`make sweep SWEEP={name}` printed this; ± is the standard deviation over seeds.",
        tabulate_failures(whole.failures),
        tabulate(groups),
        tabulate_suites(groups),
        tabulate_comparisons(points),
        f"The best point on average: `python experiments/train.py sweep={name} hydra.mode=RUN {chosen}`.",
        *(f"## {title}\n\n![{title}]({file})" for title, file in pictures),
    ]
    # A section that has nothing to say is left out.
    path = out / "report.md"
    path.write_text("\n\n".join(section for section in sections if section) + "\n")
    return path


def draw_plots(
    groups: Mapping[str, Sequence[Point]],
    points: Sequence[Point],
    histories: Mapping[Path, Mapping[str, Any]],
    out: Path,
) -> list[tuple[str, str]]:
    """Draw every plot that there is data for into `out`; returns title and file name of each."""
    runs: dict[str, list[Mapping[str, Any]]] = {}
    for group, members in groups.items():
        runs[group] = [histories[point.folder] for point in members]
    # Scores.
    plots.draw_scores_by_group(groups, out / "scores.png")
    plots.draw_scores_by_tag(groups, out / "tags.png")
    pictures = [("Score by point", "scores.png"), ("Score by tag", "tags.png")]
    # What was logged during training.
    if plots.draw_curves(runs, "val/loss", "validation loss", out / "loss.png"):
        pictures.append(("Validation loss; the band is the range over seeds", "loss.png"))
    mixed = [point for point in points if point.scores["mix"]]
    if mixed:
        plots.draw_learned_mix(mixed, out / "mix.png")
        pictures.append(("The learned mix", "mix.png"))
    norms = {group: measure_tap_norms(members) for group, members in runs.items()}
    norms = {group: by_tap for group, by_tap in norms.items() if by_tap}
    if norms:
        plots.draw_bars_by_tap(norms, "gradient norm of its contexts", out / "tap_norms.png")
        pictures.append(("Gradient norm per tap, mean over training", "tap_norms.png"))
    # What each tap is worth, and pictures of the same prompts.
    added = {group: measure_added_losses(members) for group, members in groups.items()}
    plots.draw_bars_by_tap(added, "added validation loss", out / "ablation.png")
    pictures.append(("Loss when the contexts of one tap are zero", "ablation.png"))
    draw_grid(groups, out / "grid.png")
    pictures.append(("The same prompts from the same noise; the lowest seed of each point", "grid.png"))
    return pictures


def measure_tap_norms(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Collect the mean gradient norm of each tap in each run."""
    norms: dict[str, list[float]] = {}
    for run in runs:
        for metric in sorted(run):
            name = metric.removeprefix("guard/norm/")
            if name.startswith("tap_") or name.endswith("_context"):
                short = name.removeprefix("tap_").removesuffix("_context").replace("block_", "b")
                norms.setdefault(short, []).append(mean(value for _, value in run[metric]))
    return norms


def measure_added_losses(points: Sequence[Point]) -> dict[str, list[float]]:
    """Compute what leaving out each tap adds to the validation loss, in each run."""
    prefix = "b" if points[0].scores["mix"] else ""
    added: dict[str, list[float]] = {}
    for name in points[0].scores["without"]:
        added[f"{prefix}{name}"] = [point.scores["without"][name] - point.scores["loss"] for point in points]
    return added


def draw_grid(groups: Mapping[str, Sequence[Point]], path: Path) -> None:
    """Draw a row of pictures for each group, the prompts above the first."""
    images, captions = [], []
    for name, points in groups.items():
        row = open_grid(points[0])
        images += row
        captions += [name.replace("=", " = "), *[""] * (len(row) - 1)]  # so that long names break there
    prompts = list(next(iter(groups.values()))[0].scores["prompts"].values())
    for column, prompt in enumerate(prompts):
        captions[column] = f"{captions[column]} “{prompt}”".strip()
    join_pictures(images, columns=len(prompts), scale=4, captions=captions, wrap=16).save(path)
