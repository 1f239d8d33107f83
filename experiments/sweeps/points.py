"""Reads the points of a sweep: their folders, what was varied, what they reported."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from tbac.app import CONF

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
        return file.read_text().strip() if file.is_file() else None

    @property
    def stages(self) -> list[dict[str, Any]]:
        """The report of each of its stages."""
        return self.report.get("stages", [self.report])

    @property
    def checkpoint(self) -> Path:
        """The checkpoint from the end of its training."""
        return self.folder / "checkpoints" / Path(self.stages[-1]["checkpoint"]).name


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


def read_points(folder: Path, keys: list[str]) -> list[Point]:
    """Read the finished points below a sweep's folder.

    Args:
        folder: of the sweep.
        keys: what the sweep varies; a folder that doesn't set all of them belongs to something else.
    """
    points = []
    for file in sorted(folder.glob("*/report.json")):
        overrides = yaml.safe_load((file.parent / ".hydra" / "overrides.yaml").read_text())
        given = {o.lstrip("+").partition("=")[0]: o.partition("=")[2] for o in overrides}
        choices = {key: given[key] for key in keys if key in given}
        if len(choices) == len(keys):
            points.append(Point(file.parent, choices, json.loads(file.read_text())))
    return points
