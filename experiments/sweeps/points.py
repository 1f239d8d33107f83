"""The points of a sweep: where they are, what was varied, what they reached."""

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
        """What it shares with the points that differ in the seed alone."""
        return " ".join(f"{k.split('.')[-1]}={v}" for k, v in self.choices.items() if k != SEED)

    @property
    def run_id(self) -> str | None:
        """Its MLflow run."""
        file = self.folder / "mlflow_run_id"
        return file.read_text().strip() if file.is_file() else None

    @property
    def stages(self) -> list[dict[str, Any]]:
        """What is reported of each of its stages."""
        return self.report.get("stages", [self.report])

    @property
    def checkpoint(self) -> Path:
        """Of the end of its training."""
        return self.folder / "checkpoints" / Path(self.stages[-1]["checkpoint"]).name


def read_choices(name: str) -> dict[str, list[str]]:
    """What a committed sweep varies: key -> values.

    Raises:
        ValueError: for a name that isn't a sweep's, or one that varies nothing.
    """
    file = Path(CONF) / "sweep" / f"{name}.yaml"
    if not file.is_file():
        found = ", ".join(sorted(f.stem for f in file.parent.glob("*.yaml")))
        raise ValueError(f"name={name} isn't a sweep; conf/sweep/ has {found}")
    config = OmegaConf.load(file)
    params = OmegaConf.select(config, "hydra.sweeper.params") or {}
    if not params:
        raise ValueError(f"{file} varies nothing: hydra.sweeper.params is empty")
    return {str(key): str(values).split(",") for key, values in params.items()}


def read_points(folder: Path, keys: list[str]) -> list[Point]:
    """The finished points under a sweep's folder."""
    points = []
    for file in sorted(folder.glob("*/report.json")):
        overrides = yaml.safe_load((file.parent / ".hydra" / "overrides.yaml").read_text())
        given = {o.lstrip("+").partition("=")[0]: o.partition("=")[2] for o in overrides}
        choices = {key: given[key] for key in keys if key in given}
        if len(choices) == len(keys):
            points.append(Point(file.parent, choices, json.loads(file.read_text())))
    return points
