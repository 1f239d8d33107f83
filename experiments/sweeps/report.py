"""What a sweep found, as Markdown with plots beside it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from experiments.reports import markdown
from experiments.sweeps import plots
from experiments.sweeps.points import SEED, Point
from experiments.sweeps.score import grid_pictures
from tbac.sampling.grid import picture_grid

LADDER, BASELINE = "last_n", "final"


def grouped(points: Sequence[Point]) -> dict[str, list[Point]]:
    """Points that differ in the seed alone, together; the best group first."""
    groups: dict[str, list[Point]] = {}
    for point in sorted(points, key=lambda p: p.seed):
        groups.setdefault(point.group, []).append(point)
    return dict(sorted(groups.items(), key=lambda item: -_overall(item[1])))


def _overall(points: Sequence[Point]) -> float:
    return mean(p.scores["geneval"]["overall"] for p in points)


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean and standard deviation over seeds."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def table(groups: Mapping[str, Sequence[Point]]) -> str:
    """One row per group."""
    tags = [t for t in next(iter(groups.values()))[0].scores["geneval"] if t != "overall"]
    rows = []
    for name, points in groups.items():
        scores = [p.scores["geneval"] for p in points]
        cells = [spread([s["overall"] for s in scores]), spread([p.scores["loss"] for p in points], 4)]
        for tag in tags:
            average = mean(score[tag] for score in scores)
            cells.append(f"{average:.2f}")
        rows.append([name, len(points), *cells])
    return markdown(["point", "seeds", "overall", "validation loss", *tags], rows)


def suite_table(groups: Mapping[str, Sequence[Point]]) -> str:
    """What further suites say, a row per group; nothing where there are none."""
    names = list(next(iter(groups.values()))[0].scores.get("suites", {}))
    if not names:
        return ""
    rows = []
    for group, points in groups.items():
        cells = [group]
        for name in names:
            values = [p.scores["suites"][name] for p in points if name in p.scores["suites"]]
            cells.append(spread(values, 3 if name.startswith("edits") else 1) if values else "")
        rows.append(cells)
    return markdown(["point", *names], rows)


def comparison(points: Sequence[Point]) -> str:
    """Whether the ladder beats the final state, seed by seed, at equal other choices."""
    by_choice: dict[tuple, dict[str, Point]] = {}
    for point in points:
        others = tuple(sorted((k, v) for k, v in point.choices.items() if k != "taps"))
        by_choice.setdefault(others, {})[point.choices.get("taps", "")] = point
    pairs = [(found[LADDER], found[BASELINE]) for found in by_choice.values() if {LADDER, BASELINE} <= found.keys()]
    if not pairs:
        return ""
    lines = []
    for label, read, better in (
        ("GenEval rules, overall", lambda p: p.scores["geneval"]["overall"], 1),
        ("validation loss", lambda p: p.scores["loss"], -1),
    ):
        gains = [read(ladder) - read(final) for ladder, final in pairs]
        wins = sum(better * g > 0 for g in gains)
        verdict = "better" if better * mean(gains) > 0 else "not better"
        lines.append(
            f"- {label}: `{LADDER}` minus `{BASELINE}` at equal seed and other choices is {spread(gains, 4)}; better "
            f"in {wins} of {len(gains)} pairs, on average {verdict}."
        )
    return "\n".join(lines)


def write_report(
    name: str, points: Sequence[Point], histories: Mapping[Path, Mapping[str, Any]], out: Path, expected: int
) -> Path:
    """Write `report.md` and its plots; returns its path.

    Args:
        name: of the sweep.
        points: scored.
        histories: folder of a point -> its metrics over time.
        out: where the report goes.
        expected: number of points that the sweep has.
    """
    groups = grouped(points)
    runs = {}
    for group, members in groups.items():
        runs[group] = [histories[point.folder] for point in members]
    plots.scores_by_group(groups, out / "scores.png")
    plots.scores_by_tag(groups, out / "tags.png")
    pictures = [("Score by point", "scores.png"), ("Score by tag", "tags.png")]
    if plots.curves(runs, "val/loss", "validation loss", out / "loss.png"):
        pictures.append(("Validation loss; the band is the range over seeds", "loss.png"))
    mixed = [p for p in points if p.scores["mix"]]
    if mixed:
        plots.learned_mix(mixed, out / "mix.png")
        pictures.append(("The learned mix", "mix.png"))
    norms = {g: n for g, members in runs.items() if (n := _tap_norms(members))}
    if norms:
        plots.bars_by_tap(norms, "gradient norm of its contexts", out / "tap_norms.png")
        pictures.append(("Gradient norm per tap, mean over training", "tap_norms.png"))
    plots.bars_by_tap({g: _ablated(m) for g, m in groups.items()}, "added validation loss", out / "ablation.png")
    pictures.append(("Loss when the contexts of one tap are zero", "ablation.png"))
    _grid(groups, out / "grid.png")
    pictures.append(("The same prompts from the same noise; the lowest seed of each point", "grid.png"))
    best = next(iter(groups.values()))[0]
    steps = [f"{stage['steps']} steps of {stage['name']}" for stage in best.stages]
    chosen = " ".join(f"{k}={v}" for k, v in best.choices.items() if k != SEED)
    sections = [
        f"# Sweep {name}",
        f"{len(points)} of {expected} points are finished, {' and '.join(steps)} each. "
        f"`make sweep SWEEP={name}` printed this; ± is the standard deviation over seeds.",
        table(groups),
        suite_table(groups),
        comparison(points),
        f"The best point on average: `python experiments/train.py sweep={name} hydra.mode=RUN {chosen}`.",
        *(f"## {title}\n\n![{title}]({file})" for title, file in pictures),
    ]
    path = out / "report.md"
    path.write_text("\n\n".join(s for s in sections if s) + "\n")
    return path


def _tap_norms(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Tap -> its mean gradient norm in each run."""
    found: dict[str, list[float]] = {}
    for run in runs:
        for metric in sorted(run):
            name = metric.removeprefix("guard/norm/")
            if name.startswith("tap_") or name.endswith("_context"):
                short = name.removeprefix("tap_").removesuffix("_context").replace("block_", "b")
                found.setdefault(short, []).append(mean(value for _, value in run[metric]))
    return found


def _ablated(points: Sequence[Point]) -> dict[str, list[float]]:
    """Tap -> what leaving it out adds to the validation loss, in each run."""
    prefix = "b" if points[0].scores["mix"] else ""
    added: dict[str, list[float]] = {}
    for name in points[0].scores["without"]:
        added[f"{prefix}{name}"] = [p.scores["without"][name] - p.scores["loss"] for p in points]
    return added


def _grid(groups: Mapping[str, Sequence[Point]], path: Path) -> None:
    images, captions = [], []
    for name, points in groups.items():
        own = grid_pictures(points[0])
        images += own
        captions += [name.replace("=", " = "), *[""] * (len(own) - 1)]  # so that long names break there
    prompts = list(next(iter(groups.values()))[0].scores["prompts"].values())
    for column, prompt in enumerate(prompts):
        captions[column] = f"{captions[column]} “{prompt}”".strip()
    picture_grid(images, columns=len(prompts), scale=4, captions=captions, wrap=16).save(path)
