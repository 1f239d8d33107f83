"""What a training run ends with: where it is, and the command that comes next."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from experiments.stage_configs import OF_THE_RELEASE
from tbac.app import describe_command, get_run_folder
from tbac.redaction import hide_in_text
from tbac.training.interruptions import outlast_terminal
from tbac.training.tracking import get_run_link, read_run_id

# Overrides that the next stage must have too, since it goes on with this model on this machine.
KEPT = ("world", "model", "taps", "ladder", "machine")


def print_closing(cfg: DictConfig, report: Mapping[str, Any]) -> None:
    """Print where a finished run is, and what comes next.

    Args:
        cfg: of the run.
        report: what its `report.json` holds.
    """
    folder = get_run_folder()
    last = report.get("stages", [report])[-1]
    rows = {"folder": shorten_path(folder), "checkpoint": shorten_path(last["checkpoint"])}
    link = find_link(cfg, folder)
    if link:
        rows["MLflow"] = f"{link} (make ui serves it)"
    for number, line in enumerate(list_next_commands(cfg, last, HydraConfig.get().overrides.task)):
        rows["next" if not number else "or"] = line
    lines = [f"  {name:12}{value}" for name, value in rows.items()]
    with outlast_terminal():
        print("\n".join(["", "done", *lines]), flush=True)


def print_interruption() -> None:
    """Print where an interrupted run is, and the exact command that goes on with it."""
    with outlast_terminal():
        print(f"\ninterrupted; what was done is saved in {shorten_path(get_run_folder())}", file=sys.stderr)
        print(f"to go on: {describe_command()}", file=sys.stderr, flush=True)


def find_link(cfg: DictConfig, folder: Path) -> str | None:
    """Find the page of the run in MLflow; None for one that was logged elsewhere."""
    tracking_uri, run_id = (cfg.logger or {}).get("tracking_uri"), read_run_id(folder / "mlflow_run_id")
    link = get_run_link(tracking_uri, run_id) if tracking_uri and run_id else None
    return hide_in_text(link) if link else None


def list_next_commands(cfg: DictConfig, last: Mapping[str, Any], overrides: Sequence[str]) -> list[str]:
    """List the commands that one may want next: the next stage, and pictures.

    Args:
        cfg: of the run.
        last: report of the run's last stage.
        overrides: that the run was started with.
    """
    checkpoint = shorten_path(last["checkpoint"])
    commands = []
    if last["name"] in OF_THE_RELEASE[:-1]:
        following = OF_THE_RELEASE[OF_THE_RELEASE.index(last["name"]) + 1]
        kept = [o for o in overrides if o.lstrip("+~").split("=")[0].split(".")[0] in KEPT]
        words = [f"stage={following}", *kept, f"init={checkpoint}"]
        commands.append(shlex.join(["python", "experiments/train.py", *words]))
    if cfg.stage.sample_prompts:
        words = [f"checkpoint={checkpoint}", f"prompts={cfg.stage.sample_prompts[0]}"]
        commands.append(shlex.join(["python", "experiments/generate.py", *words]))
    return commands


def shorten_path(path: str | Path) -> str:
    """Name a path from the working directory, if it lies below it."""
    whole = Path(path).absolute()
    return str(whole.relative_to(Path.cwd()) if whole.is_relative_to(Path.cwd()) else whole)
