"""Run the training of one or several stages: from their configs to `report.json`."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig

from experiments.going_on import compare_with_checkpoint, warn_of_replaced_data
from experiments.stage_configs import PER_STAGE
from experiments.starting import find_start
from tbac.app import check_target, make_part, read_varied_overrides, to_plain
from tbac.data.datamodule import StagedDataModule
from tbac.files import write_whole
from tbac.models import UniImage
from tbac.models.architecture import check_config
from tbac.models.config import ModelConfig
from tbac.models.prompt_cache import make_prompt_cache
from tbac.models.saved import read_saved_model
from tbac.redaction import hide_secrets
from tbac.training.callbacks.preemption import Preemption
from tbac.training.callbacks.reinforce import Reinforce
from tbac.training.callbacks.stage_transition import StageTransition
from tbac.training.checkpoints import describe_model, find_newest_readable, load_weights
from tbac.training.interruptions import INTERRUPTION, InterruptedRun, outlast_terminal
from tbac.training.module import LadderTuningModule
from tbac.training.randomness import seed_everything
from tbac.training.rewarding import FROM_SHARDS, WeightedReward
from tbac.training.run_facts import collect_run_facts
from tbac.training.run_logger import RunLogger, log_nowhere
from tbac.training.run_summary import add_varied, name_run, summarize
from tbac.training.stages import Stage
from tbac.training.strategies import read_process_rank
from tbac.training.tracking import MlflowLogger, RunDescription, describe_end, log_run

if TYPE_CHECKING:
    import lightning as L

log = logging.getLogger(__name__)
REWARDS = Path(__file__).parents[1] / "conf" / "reward"


def train(configs: Sequence[DictConfig], folder: Path, accepted: Callable[[], None] | None = None) -> dict[str, Any]:
    """Run the stages that the configs describe, one after the other.

    Args:
        configs: of each stage; what isn't in `PER_STAGE` is the same in all.
        folder: the run folder.
        accepted: called by the first process when all options are found right, before the model is loaded.

    Returns:
        what `report.json` holds.

    Raises:
        ValueError: for an option that can't be used, before a weight is loaded.
    """
    seed_everything(configs[0].seed)
    # Everything that can be checked without the model is checked before it is loaded, which may take minutes.
    check_machine(configs[0])
    stages = [build_stage(c) for c in configs]
    preemption = find_preemption(stages)
    with outlast_terminal(), INTERRUPTION.watch(preemption.signals if preemption else []):
        try:
            report = run_stages(configs, stages, folder, accepted)
        except InterruptedRun as interrupted:
            assert preemption is not None
            preemption.end(interrupted.received, "when all that was done was saved; the same command goes on")
        # A signal that came as the run ended still says that nothing must follow, such as the next run of a sweep.
        if preemption and INTERRUPTION.received in preemption.stop:
            raise InterruptedRun(INTERRUPTION.received)
    return report


def check_without_model(configs: Sequence[DictConfig]) -> StagedDataModule:
    """Check all that can be checked without a model: parts, schedules, taps, data and its manifests.

    Returns:
        The data of the stages.

    Raises:
        ValueError: for an option that can't be used.
    """
    stages = [build_stage(c) for c in configs]
    find_preemption(stages)
    check_config(make_model_config(configs[0]))
    data = StagedDataModule([make_part(c.data, "data") for c in configs])
    try_schedules(configs, stages, data)
    if configs[0].logger:
        check_target(configs[0].logger, "logger")
    return data


def send_unsent(cfg: DictConfig) -> None:
    """Send what an earlier start of a run, which is finished, couldn't send to its logger."""
    logger = make_part(cfg.logger, "logger") if cfg.logger else None
    if isinstance(logger, MlflowLogger):
        logger.log_tags({})
        logger.finalize("success")


def find_preemption(stages: Sequence[Stage]) -> Preemption | None:
    """Find the callback that says which signals end the run; None when it was left out."""
    callbacks = [callback for stage in stages for callback in stage.callbacks]
    return next((callback for callback in callbacks if isinstance(callback, Preemption)), None)


def run_stages(
    configs: Sequence[DictConfig], stages: Sequence[Stage], folder: Path, accepted: Callable[[], None] | None
) -> dict[str, Any]:
    """Run stages whose options have been checked; returns what `report.json` holds."""
    cfg = configs[0]
    model_config = make_model_config(cfg)
    _, plan = check_config(model_config)
    start = find_start(cfg, stages, replace(model_config, taps=plan), folder)
    data = StagedDataModule([make_part(c.data, "data") for c in configs], start.stage)
    try_schedules(configs, stages, data)
    if cfg.logger:
        check_target(cfg.logger, "logger")
    cache_config = make_part(cfg.prompt_cache, "prompt_cache")
    fingerprints = collect_fingerprints(data)
    if start.resumed is not None:
        warn_of_replaced_data(start.resumed, fingerprints)
    if accepted is not None and not read_process_rank():
        accepted()

    # The model, with the weights that the run starts with.
    model = UniImage.from_config(model_config)
    if start.saved is not None:
        load_weights(start.saved, model)
        log.info("going on from %s" if start.resumed else "starting from the weights of %s", start.saved.origin)
    facts = describe_model(model) | {"data": fingerprints}
    prompt = make_prompt_cache(cache_config, model, cfg.trainer.precision) or model.prompt
    for source in data.stages:
        latent_form = (model.latent_channels, model.autoencoder.compression)
        source.bind(prompt, facts["frozen"]["autoencoder"], model.size_multiple, latent_form)
    module = LadderTuningModule(model, stages[start.stage], cfg.seed, facts)
    module.first_step = start.first_step

    # All stages share one logger, and only the first process opens it, so that nothing is logged twice.
    logger = RunLogger(make_part(cfg.logger, "logger")) if cfg.logger and not read_process_rank() else None
    if logger:
        digests = {f"data/{k}": v for source in data.stages for k, v in source.compute_manifest_digests().items()}
        varied = read_varied_overrides()
        summary = summarize([stage.config for stage in stages], model.ladder.plan)
        name = name_run(summary, varied)
        summary = add_varied(summary, varied, stages[0].config)
        facts = collect_run_facts() | digests
        log_run(logger, RunDescription(name, collect_config(stages), summary, facts, data.list_inputs()))

    # Each stage has a trainer of its own, which the transition asks for when the stage begins.
    def make_trainer(stage: int, callbacks: Sequence["L.Callback"]) -> "L.Trainer":
        options = configs[stage].trainer
        trainer: L.Trainer = make_part(options, "trainer", callbacks=list(callbacks), logger=logger or False)
        if cfg.logger and not logger:
            log_nowhere(trainer)
        return trainer

    origin = start.saved.origin if start.saved else None
    transition = StageTransition(stages, start.stage, start.history, start.optimizer_state, origin, start.resumed)
    try:
        transition.fit(make_trainer, module, data)
    except BaseException as end:
        if logger:
            logger.close(describe_end(end))
        raise
    if logger:
        logger.close()
    return write_report(transition.list_reports(module), folder)


def write_report(reports: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Add the last checkpoint of each stage to its report, and write `report.json`; returns what the file holds."""
    for done in reports:
        done["checkpoint"] = str(folder / "checkpoints" / f"{done['name']}-step={done['steps']}.ckpt")
    report = reports[0] if len(reports) == 1 else {"stages": reports}
    if not read_process_rank():
        try:
            write_whole(folder / "report.json", (json.dumps(report, indent=2) + "\n").encode())
        except OSError as error:
            log.error("%s can't be written (%s); all weights are saved", folder / "report.json", error)
    return report


def build_stage(cfg: DictConfig) -> Stage:
    """Build the stage that a config describes."""
    names = ("name", "steps", "samples", "patience", "min_delta", "weight_decay", "clip", "accumulate", "val_every")
    return Stage(
        optimizer=make_part(cfg.optim, "optim", partial=True),
        scheduler=make_part(cfg.schedule, "schedule", partial=True),
        flow=make_part(cfg.flow, "flow"),
        trainable=list(cfg.stage.trainable),
        keep_optimizer=cfg.stage.keep_optimizer,
        callbacks=[*build_reinforcement(cfg), *build_callbacks(cfg)],
        config=hide_secrets(to_plain(cfg)),
        **{name: cfg.stage[name] for name in names},
    )


def build_callbacks(cfg: DictConfig) -> list[Any]:
    """Build the callbacks that a config names."""
    return [make_part(part, f"callbacks.{name}") for name, part in (cfg.callbacks or {}).items()]


def build_reinforcement(cfg: DictConfig) -> list[Reinforce]:
    """Build the callback that makes a stage learn from rewards, with these; nothing for other stages.

    Raises:
        ValueError: without a reward, and for captions of shards that may be empty.
    """
    if not cfg.stage.reinforce:
        return []
    if not cfg.get("reward"):
        there = ", ".join(sorted(file.stem for file in REWARDS.glob("*.yaml")))
        raise ValueError(f"stage.reinforce needs a reward, and there is none of that name: reward=NAME may be {there}")
    options = make_part(cfg.stage.reinforce, "stage.reinforce")
    drops = [name for name, probability in cfg.stage.dropout.items() if str(name)[0] != "_" and probability]
    if options.prompts == FROM_SHARDS and drops:
        raise ValueError(
            f"stage.dropout.{drops[0]}={cfg.stage.dropout[drops[0]]} would leave prompts without their text or image; "
            "with stage.reinforce.prompts=shards it must be 0"
        )
    rewards = []
    for name, given in cfg.reward.items():
        values = to_plain(given)  # what it takes from elsewhere in the config is found now
        weight = values.pop("weight", 1.0)
        part = DictConfig(values)
        rewards.append(WeightedReward(str(name), make_part(part, f"reward.{name}"), weight))
    return [Reinforce(rewards, options, cfg.seed)]


def make_model_config(cfg: DictConfig) -> ModelConfig:
    """Make the options of the model that a run's config describes."""
    return make_part(cfg.model, "model")


def describe_finished(configs: Sequence[DictConfig], folder: Path) -> list[str]:
    """Describe in what the options differ from those that a finished run was trained with.

    Raises:
        ValueError: for options that no run can change when it goes on.
    """
    found = find_newest_readable(folder)
    if found is None:
        return []
    path, checkpoint = found
    model_config = make_model_config(configs[0])
    _, plan = check_config(model_config)
    saved = read_saved_model(checkpoint, str(path), model_config.ladder.own_connector)
    now = replace(model_config, taps=plan)
    return compare_with_checkpoint(checkpoint, str(path), hide_secrets(to_plain(configs[-1])), saved.config, now)


def collect_config(stages: Sequence[Stage]) -> dict[str, Any]:
    """Collect what is logged as the run's config: that of the first stage, and where later stages differ from it."""
    config = dict(stages[0].config)
    if len(stages) > 1:
        config["stages"] = {}
        for stage in stages:
            config["stages"][stage.name] = {key: stage.config[key] for key in PER_STAGE}
    return config


def check_machine(cfg: DictConfig) -> None:
    """Raise ValueError for GPUs that this computer hasn't; a process of a cluster's job asks for those of its node."""
    kind, devices = cfg.machine.accelerator, cfg.machine.devices
    count = torch.cuda.device_count()
    if kind in ("cuda", "gpu") and not count and not torch.backends.mps.is_available():
        raise ValueError(f"machine.accelerator={kind}: torch finds no GPU here; machine=local needs none")
    if kind == "cuda" and isinstance(devices, int) and devices > count and cfg.machine.num_nodes == 1:
        raise ValueError(f"machine.devices={devices}: torch finds {count} GPUs here")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ValueError("machine.accelerator=mps: torch finds no such device here")


def collect_fingerprints(data: StagedDataModule) -> dict[str, str]:
    """Collect what tells the data of all stages from others of the same names."""
    fingerprints: dict[str, str] = {}
    for source in data.stages:
        fingerprints |= source.compute_fingerprints()
    return fingerprints


def try_schedules(configs: Sequence[DictConfig], stages: Sequence[Stage], data: StagedDataModule) -> None:
    """Make the schedule of each stage for a dummy optimizer, so that a wrong one is an error now, not hours later."""
    for cfg, stage, source in zip(configs, stages, data.stages, strict=True):
        total_steps = stage.count_steps(source.batch_size * stage.accumulate)
        stage.scheduler(torch.optim.SGD([torch.zeros(1)], lr=cfg.stage.lr), total_steps=total_steps)
