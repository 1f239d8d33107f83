"""Train one stage: python experiments/train.py stage=t2i_pretrain model=shapes"""

import json
import logging
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from experiments.common import CONF, keep_freed_memory, output_dir, plain, user_errors
from tbac.training.checkpoints import (
    describe_model,
    load_exported,
    load_weights,
    newest_checkpoint,
    newest_whole,
    read_checkpoint,
)
from tbac.training.module import LadderTuningModule
from tbac.training.tracking import log_run, run_facts

log = logging.getLogger(__name__)
RUNS = "outputs/train"


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


def find_resume(cfg: DictConfig, folder: Path) -> str | None:
    """Checkpoint that this run goes on from, or None for a fresh start.

    Raises:
        ValueError: when one was named and can't be read.
    """
    if not cfg.resume:
        return None
    named = folder if cfg.resume == "auto" else Path(cfg.resume).expanduser()
    if named.is_dir():
        found = newest_whole(named)
    else:
        read_checkpoint(named)
        found = named
    if found is None and cfg.resume != "auto":
        raise ValueError(f"resume={cfg.resume} holds no checkpoint that can be read")
    if found is None:
        return None
    log.info("going on from %s", found)
    return str(found)


def train(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Run the stage that the config describes; returns what `report.json` holds."""
    L.seed_everything(cfg.seed, verbose=False)
    resume = find_resume(cfg, folder)
    init = None if resume else find_init(cfg)
    exported = Path(init).expanduser() if init and (Path(init).expanduser() / "config.json").is_file() else None
    checkpoint = read_checkpoint(init) if init and not exported else None
    instantiate(cfg.model, _target_="tbac.models.loading.check_config")
    data = instantiate(cfg.data)
    flow = instantiate(cfg.flow)
    schedule = instantiate(cfg.schedule)
    schedule(torch.optim.SGD([torch.zeros(1)], lr=cfg.stage.lr), total_steps=cfg.stage.steps)  # tried on nothing

    model = instantiate(cfg.model)
    if exported is not None:
        load_exported(exported, model)
    if checkpoint is not None:
        load_weights(checkpoint, model, str(init))
    if init:
        log.info("starting from the weights of %s", init)
    config = plain(cfg)
    facts = describe_model(model, cfg.stage.name, config)
    data.bind(model.prompt, facts["frozen"]["autoencoder"])
    module = LadderTuningModule(
        model,
        optimizer=instantiate(cfg.optim),
        scheduler=schedule,
        flow=flow,
        weight_decay=cfg.stage.weight_decay,
        total_steps=cfg.stage.steps,
        seed=cfg.seed,
        facts=facts,
    )
    logger = instantiate(cfg.logger) if cfg.logger else False
    callbacks = [instantiate(c) for c in cfg.callbacks.values()] if cfg.callbacks else []
    trainer: L.Trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=logger)
    log_run(trainer.loggers, config, run_facts() | {f"data/{k}": v for k, v in data.manifest_digests().items()})

    validated = bool(data.val_sources)
    first = trainer.validate(module, datamodule=data, verbose=False) if validated and not resume else []
    trainer.fit(module, datamodule=data, ckpt_path=resume)
    last = trainer.validate(module, datamodule=data, verbose=False) if validated else []
    report = {
        "name": cfg.stage.name,
        "steps": module.steps,
        "val_loss_first": first[0].get("val/loss") if first else None,
        "val_loss_last": last[0].get("val/loss") if last else None,
        "checkpoint": str(folder / "checkpoints" / f"{cfg.stage.name}-step={module.steps}.ckpt"),
    }
    if trainer.is_global_zero:
        (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


@hydra.main(version_base="1.3", config_path=CONF, config_name="train")
@user_errors
def main(cfg: DictConfig) -> None:
    keep_freed_memory()
    report = train(cfg, output_dir())
    log.info("%s: %d steps, validation loss %s -> %s", *list(report.values())[:4])


if __name__ == "__main__":
    main()
