"""Where a training begins: anew, with the weights of an earlier stage, or in the middle of a run that goes on."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from experiments.going_on import compare_with_checkpoint
from experiments.stage_configs import lies_within
from tbac.data.datamodule import StagedDataModule
from tbac.models.config import ModelConfig
from tbac.models.export import read_export
from tbac.models.saved import FACTS, SavedModel, read_checkpoint, read_saved_model
from tbac.training.callbacks.stage_transition import StageTransition
from tbac.training.checkpoints import (
    check_resumable,
    find_newest_checkpoint,
    find_newest_readable,
    read_optimizer_state,
    read_resumable,
)
from tbac.training.stages import Stage

log = logging.getLogger(__name__)
RUNS = "outputs/train"


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        stage: index of the first stage that is run.
        saved: the model whose weights it starts with; None for new weights.
        resumed: the checkpoint that training resumes in the middle of that stage; None begins the stage anew.
        optimizer_state: parameter name -> state, for a first stage that keeps the optimizer's state.
        history: reports of the stages that are already over.
        first_step: optimizer steps that those stages took.
    """

    stage: int = 0
    saved: SavedModel | None = None
    resumed: Mapping[str, Any] | None = None
    optimizer_state: Mapping[str, dict[str, Any]] | None = None
    history: Sequence[Mapping[str, Any]] = field(default_factory=list)
    first_step: int = 0


def find_start(cfg: DictConfig, stages: Sequence[Stage], model_config: ModelConfig, folder: Path) -> Start:
    """Find where a run begins: in the middle of a stage, with the stage after it, or with the first.

    Raises:
        ValueError: for a checkpoint that can't be read, is of another stage, or lacks what a stage begins with.
    """
    connector = model_config.ladder.own_connector
    resume = find_resume(cfg, folder)
    if resume is None:
        return find_first_start(find_init(cfg), stages[0], connector)
    path, checkpoint = resume
    index = _find_stage(stages, checkpoint, path)
    saved = read_saved_model(checkpoint, path, connector)
    progress = checkpoint["callbacks"][StageTransition.__qualname__]
    _check_history([report["name"] for report in progress["history"]], stages[:index], path)
    changes = compare_with_checkpoint(checkpoint, path, stages[index].config, saved.config, model_config)
    if changes:
        log.warning("going on with other options than before: %s", ", ".join(changes))
    steps, position = checkpoint[FACTS]["steps"], checkpoint[StagedDataModule.__qualname__]["position"]
    if not stages[index].is_over(steps, position, progress["stale"]) or index + 1 == len(stages):
        return Start(index, saved, resumed=checkpoint, history=progress["history"])
    # The checkpoint is the last of its stage, so the next stage begins, with its weights.
    losses = {"val_loss_first": progress["first"], "val_loss_last": progress["last"]}
    history = [*progress["history"], {"name": stages[index].name, "steps": steps, **losses}]
    state = read_optimizer_state(checkpoint)
    return Start(index + 1, saved, None, state, history, first_step=checkpoint["global_step"])


def find_first_start(init: str | None, stage: Stage, connector: Any) -> Start:
    """Find the weights that the first stage starts with.

    Args:
        init: a checkpoint, run folder or exported folder; None for new weights.
        stage: the first stage.
        connector: a connector from outside the package, or None.

    Raises:
        ValueError: when the stage keeps the optimizer's state and `init` has none.
    """
    if init is None:
        return Start()
    folder = Path(init).expanduser()
    if not (folder / "config.json").is_file():
        checkpoint = read_checkpoint(init)
        saved = read_saved_model(checkpoint, init, connector)
        return Start(saved=saved, optimizer_state=read_optimizer_state(checkpoint))
    if stage.keep_optimizer:
        raise ValueError(f"stage.keep_optimizer=true takes the optimizer's state from init={init}, which has none")
    return Start(saved=read_export(folder, connector))


def find_init(cfg: DictConfig) -> str | None:
    """Find the checkpoint that this stage starts from; None for the first stage.

    Raises:
        ValueError: when a previous stage is needed and has left no checkpoint.
    """
    if cfg.init or not cfg.stage.previous:
        return cfg.init
    newest = find_newest_checkpoint(RUNS, cfg.stage.previous)
    if newest is None:
        raise ValueError(
            f"stage {cfg.stage.name} starts from a checkpoint of {cfg.stage.previous}, and there is none under "
            f"{RUNS}/; run that stage first (make stage1, make stage2), or give init=PATH"
        )
    log.info(
        "stage %s starts from %s, the newest whole checkpoint of %s under %s; init=PATH takes another one",
        cfg.stage.name,
        newest,
        cfg.stage.previous,
        RUNS,
    )
    return str(newest)


def find_resume(cfg: DictConfig, folder: Path) -> tuple[str, dict[str, Any]] | None:
    """Find the checkpoint that this run resumes, and read it; None for a fresh start.

    Raises:
        ValueError: when one was named and can't be read.
    """
    if not cfg.resume:
        return None
    # What this run has written itself is newer than what it began with, so the same command goes on from there.
    own = find_newest_readable(folder)
    if own is not None and (cfg.resume == "auto" or not lies_within(cfg.resume, folder) or _began_with(own[1], cfg)):
        return str(own[0]), own[1]
    named = folder if cfg.resume == "auto" else Path(cfg.resume).expanduser()
    # A folder may hold a checkpoint that was cut off, so the newest that can be read is taken; a file must be readable.
    newest = find_newest_readable(named, check_resumable) if named.is_dir() else (named, read_resumable(named))
    if newest is None and cfg.resume != "auto":
        raise ValueError(f"resume={cfg.resume} holds no checkpoint that can be read")
    if newest is None:
        return None
    path, checkpoint = newest
    return str(path), checkpoint


def _began_with(checkpoint: Mapping[str, Any], cfg: DictConfig) -> bool:
    """Whether a checkpoint was written by a run that resumed what this one shall resume."""
    return checkpoint[FACTS].get("config", {}).get("resume") == cfg.resume


def _check_history(before: Sequence[str], earlier: Sequence[Stage], path: str) -> None:
    """Raise ValueError when a checkpoint has other stages behind it than this run has before its stage."""
    names = [stage.name for stage in earlier]
    if list(before) != names:
        raise ValueError(
            f"{path} was trained after these stages: {list(before)}, and this run has {names} before its own; give the "
            "same stages=, or begin a run of its own with init="
        )


def _find_stage(stages: Sequence[Stage], checkpoint: Mapping[str, Any], path: str) -> int:
    names = [s.name for s in stages]
    if checkpoint[FACTS]["stage"] not in names:
        raise ValueError(
            f"{path} is a checkpoint of stage {checkpoint[FACTS]['stage']}, and this run has {', '.join(names)}; "
            "to start from its weights give it as init="
        )
    return names.index(checkpoint[FACTS]["stage"])
