"""Train one stage, or several in sequence.

python experiments/train.py stage=t2i_pretrain world=shapes
python experiments/train.py 'stages=[t2i_pretrain,ti2i_pretrain,finetune]' world=shapes
"""

import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import torch
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, read_write
from torch import distributed

from experiments.slurm import submit
from tbac.app import CONF, keep_freed_memory, output_dir, plain, user_errors
from tbac.data.datamodule import StagedDataModule
from tbac.models import UniImage
from tbac.models.architecture import check_config
from tbac.models.config import ModelConfig
from tbac.models.export import read_export
from tbac.models.saved import FACTS, read_checkpoint, read_saved_model
from tbac.training.callbacks.stage_transition import StageTransition
from tbac.training.checkpoints import (
    describe_model,
    load_weights,
    newest_checkpoint,
    newest_whole,
    optimizer_state_of,
)
from tbac.training.module import LadderTuningModule
from tbac.training.stages import Stage
from tbac.training.tracking import log_run, run_facts

log = logging.getLogger(__name__)
RUNS = "outputs/train"
PER_STAGE = ("stage", "data", "optim", "schedule", "flow", "callbacks")  # what stages of a run may differ in


def find_init(cfg: DictConfig) -> str | None:
    """Checkpoint that this stage starts from, or None for the first stage.

    Raises:
        ValueError: when a previous stage is needed and has left no checkpoint.
    """
    if cfg.init or not cfg.stage.previous:
        return cfg.init
    found = newest_checkpoint(RUNS, cfg.stage.previous)
    if found is None:
        raise ValueError(
            f"stage {cfg.stage.name} starts from a checkpoint of {cfg.stage.previous}, and there is none under "
            f"{RUNS}/; run that stage first (make stage1, make stage2), or give init=PATH"
        )
    return str(found)


def find_resume(cfg: DictConfig, folder: Path) -> tuple[str, dict[str, Any]] | None:
    """Checkpoint that this run goes on from, or None for a fresh start.

    Raises:
        ValueError: when one was named and can't be read.
    """
    if not cfg.resume:
        return None
    named = folder if cfg.resume == "auto" else Path(cfg.resume).expanduser()
    found = newest_whole(named) if named.is_dir() else (named, read_checkpoint(named))
    if found is None and cfg.resume != "auto":
        raise ValueError(f"resume={cfg.resume} holds no checkpoint that can be read")
    return found and (str(found[0]), found[1])


def stage_configs(cfg: DictConfig, overrides: Sequence[str]) -> list[DictConfig]:
    """The config of each stage of this run, composed as for a job of its own.

    Raises:
        ValueError: when stages disagree in what belongs to the whole run.
    """
    if not cfg.stages:
        return [cfg]
    kept = [o for o in overrides if o.split("=")[0] not in ("stage", "stages")]
    configs = [compose("train", [*kept, f"stage={name}", *cfg.stage_overrides.get(name, [])]) for name in cfg.stages]
    shared = [{k: v for k, v in plain(c, resolve=False).items() if k not in PER_STAGE} for c in configs]
    for name, other in zip(cfg.stages, shared, strict=True):
        differing = [k for k in other if other[k] != shared[0][k]]
        if differing:
            raise ValueError(
                f"stage_overrides.{name} changes {', '.join(differing)}, which all stages of a run share; a stage may "
                f"have its own {', '.join(PER_STAGE)}"
            )
    return configs


def finished(stages: Sequence[DictConfig], folder: Path) -> bool:
    """Whether a run has nothing left to do in its folder."""
    file = folder / "report.json"
    if not (stages[0].resume == "auto" and file.is_file()):
        return False
    report = json.loads(file.read_text())
    last, steps = report.get("stages", [report])[-1], stages[-1].stage.steps
    if last["name"] != stages[-1].stage.name or steps is None or last["steps"] < steps:
        return False
    return (folder / "checkpoints" / Path(last["checkpoint"]).name).is_file()


def process_rank() -> int:
    """Number of this process by what its launcher has set; 0 where nothing has."""
    return getattr(rank_zero_only, "rank", 0)


def stage_of(cfg: DictConfig) -> Stage:
    """The stage that a config describes."""
    names = ("name", "steps", "samples", "patience", "min_delta", "weight_decay", "clip", "accumulate", "val_every")
    return Stage(
        optimizer=instantiate(cfg.optim),
        scheduler=instantiate(cfg.schedule),
        flow=instantiate(cfg.flow),
        trainable=list(cfg.stage.trainable),
        keep_optimizer=cfg.stage.keep_optimizer,
        callbacks=[instantiate(c) for c in cfg.callbacks.values()] if cfg.callbacks else [],
        config=plain(cfg),
        **{name: cfg.stage[name] for name in names},
    )


def train(configs: Sequence[DictConfig], folder: Path) -> dict[str, Any]:
    """Run the stages that the configs describe, one after the other; returns what `report.json` holds."""
    cfg = configs[0]
    L.seed_everything(cfg.seed, verbose=False)
    resume = find_resume(cfg, folder)
    current, history, init = 0, [], None
    stages = [stage_of(c) for c in configs]
    if resume:
        path, checkpoint = resume
        current = _stage_index(stages, checkpoint, path)
        progress = checkpoint["callbacks"][StageTransition.__qualname__]
        steps, position = checkpoint[FACTS]["steps"], checkpoint[StagedDataModule.__qualname__]["position"]
        log.info("going on from %s", path)
        if stages[current].over(steps, position, progress["stale"]) and current + 1 < len(stages):
            done = {"val_loss_first": progress["first"], "val_loss_last": progress["last"]}
            history = [*progress["history"], {"name": stages[current].name, "steps": steps, **done}]
            current, init, resume = current + 1, path, None
    else:
        init = find_init(cfg)
    model_config: ModelConfig = instantiate(cfg.model)
    connector = model_config.ladder.own_connector
    exported = Path(init).expanduser() if init and (Path(init).expanduser() / "config.json").is_file() else None
    start = read_checkpoint(init) if init and not exported else None
    saved = read_saved_model(start, str(init), connector) if start else None
    if exported is not None:
        saved = read_export(exported, connector)
    if resume:
        read_saved_model(resume[1], resume[0], connector)  # refused here, before anything of it is loaded
    if init and not start and stages[current].keep_optimizer:
        raise ValueError(f"stage.keep_optimizer=true takes the optimizer's state from init={init}, which has none")
    check_config(model_config)
    data = StagedDataModule([instantiate(c.data) for c in configs], current)
    for c, stage, source in zip(configs, stages, data.stages, strict=True):
        total = stage.total_steps(source.batch_size * stage.accumulate)
        stage.scheduler(torch.optim.SGD([torch.zeros(1)], lr=c.stage.lr), total_steps=total)  # tried on nothing

    model = UniImage.from_config(model_config)
    if saved is not None:
        load_weights(saved, model)
        log.info("starting from the weights of %s", init)
    facts = describe_model(model)
    for source in data.stages:
        source.bind(model.prompt, facts["frozen"]["autoencoder"], model.size_multiple)
    module = LadderTuningModule(model, stages[current], cfg.seed, facts)
    state = optimizer_state_of(start) if start else None
    transition = StageTransition(stages, current, history, state, resume[0] if resume else init)
    logger = instantiate(cfg.logger) if cfg.logger and not process_rank() else False
    callbacks = [*stages[current].callbacks, transition]
    trainer: L.Trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=logger)
    if cfg.logger and process_rank():  # one process alone opens the store
        trainer.loggers = [DummyLogger()]
    digests = {f"data/{k}": v for source in data.stages for k, v in source.manifest_digests().items()}
    config = dict(stages[0].config)
    if len(stages) > 1:
        config["stages"] = {s.name: {k: s.config[k] for k in PER_STAGE} for s in stages}
    if trainer.is_global_zero:
        log_run(trainer.loggers, config, run_facts() | digests)

    trainer.fit(module, datamodule=data, ckpt_path=resume[0] if resume else None, weights_only=True)
    reports = transition.reports(module)
    for done in reports:
        done["checkpoint"] = str(folder / "checkpoints" / f"{done['name']}-step={done['steps']}.ckpt")
    report = reports[0] if len(stages) == 1 else {"stages": reports}
    if trainer.is_global_zero:
        (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def _stage_index(stages: Sequence[Stage], checkpoint: dict[str, Any], path: str) -> int:
    names = [s.name for s in stages]
    if checkpoint[FACTS]["stage"] not in names:
        raise ValueError(
            f"{path} is a checkpoint of stage {checkpoint[FACTS]['stage']}, and this run has {', '.join(names)}; "
            "to start from its weights give it as init="
        )
    return names.index(checkpoint[FACTS]["stage"])


def submit_job(configs: Sequence[DictConfig], overrides: Sequence[str]) -> None:
    """Submit these stages instead of training here."""
    folder = output_dir().absolute()
    init = find_init(configs[0])  # settled now, so that all processes start from the same
    if init and Path(init).is_file():
        read_checkpoint(init)
    arguments = [o for o in overrides if o.split("=")[0] != "init"]
    arguments += [f"init='{Path(init).absolute()}'"] if init else []
    launcher = {**plain(HydraConfig.get().launcher), "name": f"tbac-{configs[0].stage.name}"}
    job = submit(launcher, folder, arguments)
    print(f"submitted job {job}; its log is {folder / f'slurm-{job}.log'}")


@contextmanager
def point_alone() -> Iterator[None]:
    """Let Lightning start the other processes of this point of a sweep as if it were the only one, and clean up.

    It starts them with this process's own arguments, which would begin the whole sweep again in each of them.
    """
    config: Any = HydraConfig.get()
    arguments, environment = sys.argv, dict(os.environ)
    if config.mode == RunMode.MULTIRUN:
        sys.argv = [sys.argv[0], *config.overrides.task]
        with read_write(config):
            config.run.dir = config.runtime.output_dir
    try:
        yield
    finally:
        sys.argv = arguments
        if distributed.is_initialized():
            distributed.destroy_process_group()
        for name in set(os.environ) - set(environment):  # the rank and the address of this point
            del os.environ[name]


@hydra.main(version_base="1.3", config_path=CONF, config_name="train")
@user_errors
def main(cfg: DictConfig) -> None:
    keep_freed_memory()
    if process_rank():  # the others say only what is wrong
        logging.getLogger().setLevel(logging.WARNING)
    overrides = HydraConfig.get().overrides.task
    configs = stage_configs(cfg, overrides)
    if "slurm" in cfg.machine and "SLURM_JOB_ID" not in os.environ:
        submit_job(configs, overrides)
        return
    if finished(configs, output_dir()):
        log.info("finished before; give stage.steps=… for more steps")
        return
    with point_alone():
        report = train(configs, output_dir())
    for stage in report.get("stages", [report]):
        log.info("%s: %d steps, validation loss %s -> %s", *list(stage.values())[:4])


if __name__ == "__main__":
    main()
