"""Reads the points of a sweep: their folders, what was varied, what they reported."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from experiments.reports import read_run_report
from tbac.app import CONF, FAILED
from tbac.files import ForeignFileError, read_text, reading

log = logging.getLogger(__name__)
SEED = "seed"


@dataclass
class Point:
    """One run of a sweep.

    Attributes:
        folder: its run folder.
        choices: what was varied -> its value here, the seed included.
        report: its `report.json`.
        scores: what scoring added, by name.
    """

    folder: Path
    choices: dict[str, str]
    report: dict[str, Any]
    scores: dict[str, Any] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        return int(self.choices.get(SEED, 0))

    @property
    def group(self) -> str:
        """Its choices without the seed, as text; points that differ only in the seed have the same."""
        return " ".join(f"{k.split('.')[-1]}={v}" for k, v in self.choices.items() if k != SEED)

    @property
    def run_id(self) -> str | None:
        """The id of its MLflow run, if it was logged."""
        file = self.folder / "mlflow_run_id"
        return file.read_bytes().decode(errors="replace").strip() or None if file.is_file() else None

    @property
    def stages(self) -> list[dict[str, Any]]:
        """The report of each of its stages."""
        return self.report.get("stages", [self.report])

    @property
    def steps(self) -> int:
        """Optimizer steps of all its stages."""
        return sum(stage["steps"] for stage in self.stages)

    @property
    def checkpoint(self) -> Path:
        """The checkpoint from the end of its training."""
        return self.folder / "checkpoints" / Path(self.stages[-1]["checkpoint"]).name


def group_by_choices(points: Sequence[Point]) -> dict[str, list[Point]]:
    """Group the points that differ only in their seed, which orders them."""
    groups: dict[str, list[Point]] = {}
    for point in sorted(points, key=lambda p: p.seed):
        groups.setdefault(point.group, []).append(point)
    return groups


def read_choices(name: str) -> dict[str, list[str]]:
    """Read what a committed sweep varies: key -> values.

    Raises:
        ValueError: for a name that isn't a sweep's, or one that varies nothing.
    """
    file = Path(CONF) / "sweep" / f"{name}.yaml"
    if not file.is_file():
        sweeps = ", ".join(sorted(other.stem for other in file.parent.glob("*.yaml")))
        raise ValueError(f"name={name} isn't a sweep; conf/sweep/ has {sweeps}")
    config = OmegaConf.load(file)
    params = OmegaConf.select(config, "hydra.sweeper.params") or {}
    if not params:
        raise ValueError(f"{file} varies nothing: hydra.sweeper.params is empty")
    return {str(key): str(values).split(",") for key, values in params.items()}


def read_failures(folder: Path) -> dict[str, str]:
    """Read which points below a sweep's folder failed: name of the folder -> message."""
    return {file.parent.name: file.read_text(errors="replace").strip() for file in sorted(folder.glob(f"*/{FAILED}"))}


def describe_failures(failures: Mapping[str, str]) -> str:
    """Describe the points that failed, in one text."""
    return "; ".join(f"{name} failed ({message})" for name, message in failures.items()) or "none failed"


def read_points(folder: Path, keys: list[str]) -> list[Point]:
    """Read the finished points below a sweep's folder.

    Args:
        folder: of the sweep.
        keys: what the sweep varies; a folder that doesn't set all of them belongs to something else.
    """
    points = []
    for file in sorted(folder.glob("*/report.json")):
        given = read_overrides(file.parent)
        choices = {key: given[key] for key in keys if key in given}
        reports = read_run_report(file) if len(choices) == len(keys) else None
        if reports:
            report = reports[0] if len(reports) == 1 else {"stages": reports}
            points.append(Point(file.parent, choices, report))
    return points


def read_overrides(folder: Path) -> dict[str, str]:
    """Read the overrides that a run was started with, key -> value; none, with a warning, if they can't be read."""
    file = folder / ".hydra" / "overrides.yaml"
    try:
        with reading(str(file)):
            overrides = yaml.safe_load(read_text(file))
    except ForeignFileError as error:
        log.warning("%s isn't counted: %s", folder, error)
        return {}
    if not isinstance(overrides, list):
        log.warning("%s isn't counted: %s holds no list of overrides", folder, file)
        return {}
    texts = [override for override in overrides if isinstance(override, str)]
    return {text.lstrip("+").partition("=")[0]: text.partition("=")[2] for text in texts}
