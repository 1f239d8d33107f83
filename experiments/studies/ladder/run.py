"""The study's record and its comparison: python experiments/studies/ladder/run.py

The study takes more hours than one sitting has, so a sitting trains some points with `make sweep`, and this command
takes what is finished into a record that is kept beside the study: a point's scores, its validation loss and its
learned shares of layers. Then it compares every arm with the final state, pair by pair of equal seeds.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from omegaconf import DictConfig

from experiments.reports import format_table
from experiments.sweeps.points import Point, read_points
from tbac.app import command, to_plain
from tbac.files import ForeignFileError, read_json, reading, write_whole

KEYS = ["experiment", "seed"]
SCORES = "scores.json"
MANY = 6  # seeds from which on a difference is called


@dataclass(frozen=True)
class Measured:
    """What the study keeps of a point.

    Attributes:
        arm: name of its file in `conf/experiment/ladder/`.
        stage: after which it was scored.
        seed: of weights, noise, order and dropout.
        steps: of that stage.
        loss: of validation, at its end.
        scores: name of a suite -> its first score; GenEval's rules over seen words are `words_seen`.
        mix: shares of layers (block, layer) where they are learned.
    """

    arm: str
    stage: str
    seed: int
    steps: int
    loss: float
    scores: Mapping[str, float]
    mix: Sequence[Sequence[float]] | None = field(default=None)

    @property
    def key(self) -> tuple[str, str, int]:
        return self.stage, self.arm, self.seed


def take_point(point: Point, scores: Mapping[str, Any]) -> Measured:
    """Take what the study keeps of a point that is finished and scored."""
    suites = {"words_seen": float(scores["geneval"]["overall"])}
    for name, value in scores["suites"].items():
        suites.setdefault(name.partition(":")[0], float(value))
    stage = point.stages[-1]
    arm = point.choices["experiment"].rpartition("/")[2]
    return Measured(arm, stage["name"], point.seed, stage["steps"], float(scores["loss"]), suites, scores["mix"])


def read_record(file: Path) -> list[Measured]:
    """Read the points that the record has; none where there is no record.

    Raises:
        ForeignFileError: for a record that can't be used; it isn't replaced.
    """
    if not file.exists():
        return []
    with reading(str(file)):
        return [Measured(**entry) for entry in read_json(file, kind=list)]


def collect_points(cfg: DictConfig) -> list[Measured]:
    """Take the finished points of the sweeps beside those of the record, and write the record anew.

    Raises:
        ForeignFileError: for a record, or scores, that can't be used.
    """
    file = Path(cfg.record)
    measured = {point.key: point for point in read_record(file)}
    for folder in map(Path, cfg.sweeps):
        for point in read_points(folder, KEYS):
            scores = point.folder / SCORES
            if scores.is_file():
                with reading(str(scores)):
                    taken = take_point(point, read_json(scores, kind=dict))
                measured[taken.key] = taken
    points = [measured[key] for key in sorted(measured)]
    write_whole(file, ("[\n" + ",\n".join(json.dumps(asdict(point)) for point in points) + "\n]\n").encode())
    return points


def compute_interval(differences: Sequence[float], resamples: int) -> tuple[float, float]:
    """Compute the 95 % interval of a mean of paired differences by a percentile bootstrap over the pairs."""
    import numpy as np  # only when the options are right

    generator = np.random.default_rng(0)
    drawn = generator.choice(np.asarray(differences), (resamples, len(differences)))
    low, high = np.percentile(drawn.mean(1), (2.5, 97.5))
    return float(low), float(high)


def judge(low: float, high: float, pairs: int) -> str:
    """Say what an interval says, by the rule that was written down before the study ran."""
    if pairs < MANY:
        return ""
    if low > 0:
        return "beats it"
    return "worse" if high < 0 else "open"


def compare(points: Sequence[Measured], cfg: DictConfig) -> dict[str, str]:
    """Compare every arm with the baseline in each score of the main comparison.

    Returns:
        Title of a score -> table, a row for each arm: seeds, mean, mean difference, interval and verdict.
    """
    by_key = {point.key: point for point in points}
    arms = list(dict.fromkeys(point.arm for point in points))
    tables = {}
    for stage, scores in to_plain(cfg.scores).items():
        for name, title in scores.items():
            rows = []
            for arm in arms:
                own = [p for p in points if (p.stage, p.arm) == (stage, arm) and name in p.scores]
                rows += [describe_arm(own, by_key, name, cfg)] if own else []
            if rows:
                tables[title] = format_table(["arm", "seeds", "score", "minus final", "95 % interval", ""], rows)
    return tables


def describe_arm(
    points: Sequence[Measured], by_key: Mapping[tuple[str, str, int], Measured], name: str, cfg: DictConfig
) -> list[Any]:
    """Describe one arm in one score: the cells of its row.

    Args:
        points: of the arm, after one stage.
        by_key: all points.
        name: of the score.
        cfg: of `conf/study/ladder.yaml`.
    """
    cells = [points[0].arm, len(points), f"{mean(p.scores[name] for p in points):.3f}"]
    baselines = [(point, by_key.get((point.stage, cfg.baseline, point.seed))) for point in points]
    differences = [p.scores[name] - base.scores[name] for p, base in baselines if base and name in base.scores]
    if points[0].arm == cfg.baseline or not differences:
        return [*cells, "", "", ""]
    low, high = compute_interval(differences, cfg.resamples)
    interval = f"{low:+.3f} to {high:+.3f}" if len(differences) > 1 else ""
    return [*cells, f"{mean(differences):+.3f}", interval, judge(low, high, len(differences))]


def describe_losses(points: Sequence[Measured]) -> str:
    """Describe validation loss and seen words of every arm: a table without a verdict."""
    groups: dict[tuple[str, str], list[Measured]] = defaultdict(list)
    for point in points:
        groups[point.stage, point.arm].append(point)
    others = sorted({name for point in points for name in point.scores})
    rows = []
    for (stage, arm), own in groups.items():
        cells = [f"{arm}, {stage}", own[0].steps, f"{mean(p.loss for p in own):.4f}"]
        for name in others:
            values = [p.scores[name] for p in own if name in p.scores]
            cells.append(f"{mean(values):.3f}" if values else "")
        rows.append(cells)
    return format_table(["arm", "steps", "validation loss", *others], rows)


@command("study/ladder")
def main(cfg: DictConfig) -> None:
    points = collect_points(cfg)
    if not points:
        raise ForeignFileError(f"{', '.join(cfg.sweeps)} hold no scored point yet: make sweep SWEEP=ladder")
    for title, table in compare(points, cfg).items():
        print(f"\n{title}\n\n{table}")
    print(f"\nall scores\n\n{describe_losses(points)}")


if __name__ == "__main__":
    main()
