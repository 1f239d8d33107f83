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
from tbac.training.checkpoints import describe_model, load_exported, load_weights, newest_checkpoint, read_checkpoint
from tbac.training.module import LadderTuningModule
from tbac.training.tracking import log_run, run_facts

log = logging.getLogger(__name__)
RUNS = "outputs/train"


def find_init(cfg: DictConfig) -> str | None:
    """Checkpoint that this stage starts from, or None for the first stage.

    Raises:
        ValueError: when a previous stage is needed and has left no checkpoint.
    """
    if cfg.resume or cfg.init or not cfg.stage.previous:
        return cfg.init
    found = newest_checkpoint(RUNS, cfg.stage.previous)
    if found is None:
        raise ValueError(
            f"stage {cfg.stage.name} starts from a checkpoint of {cfg.stage.previous}, and there is none under "
            f"{RUNS}/; run that stage first (make stage1, make stage2), or give init=PATH"
        )
    return str(found)


def train(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Run the stage that the config describes; returns what `report.json` holds."""
    L.seed_everything(cfg.seed, verbose=False)
    init = find_init(cfg)
    exported = Path(init).expanduser() if init and (Path(init).expanduser() / "config.json").is_file() else None
    checkpoint = read_checkpoint(init) if init and not exported else None
    if cfg.resume:
        read_checkpoint(cfg.resume)
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

    first = trainer.validate(module, datamodule=data, verbose=False) if data.val_sources else []
    trainer.fit(module, datamodule=data, ckpt_path=cfg.resume)
    last = trainer.validate(module, datamodule=data, verbose=False) if data.val_sources else []
    trainer.save_checkpoint(folder / "checkpoints" / f"{cfg.stage.name}-step={trainer.global_step}.ckpt")
    report = {
        "name": cfg.stage.name,
        "steps": trainer.global_step,
        "val_loss_first": first[0].get("val/loss") if first else None,
        "val_loss_last": last[0].get("val/loss") if last else None,
        "checkpoint": str(folder / "checkpoints" / f"{cfg.stage.name}-step={trainer.global_step}.ckpt"),
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
