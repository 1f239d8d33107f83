"""Composes the configs of the stages of one run, and says whether the run is finished."""

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from experiments.reports import read_run_report
from tbac.app import check, compose_as_given, to_plain

OF_THE_RELEASE = ("t2i_pretrain", "ti2i_pretrain", "finetune")  # for which stage_overrides has a place always
# What stages of a run may differ in.
PER_STAGE = ("stage", "reward", "data", "optim", "schedule", "flow", "callbacks", "guard")


def compose_stages(cfg: DictConfig, overrides: Sequence[str]) -> list[DictConfig]:
    """Compose the config of each stage of this run, just as for a job that trains that stage alone.

    Raises:
        ValueError: when stages disagree in what belongs to the whole run.
    """
    known = [*OF_THE_RELEASE, *(cfg.stages or [])]
    unknown = [name for name in cfg.stage_overrides if name not in known]
    if unknown:
        raise ValueError(f"stage_overrides.{unknown[0]} is of no stage of this run; it may be of {', '.join(known)}")
    if cfg.stages is None:
        return [cfg]
    # The command's overrides hold for every stage; what names the stages themselves is replaced.
    common = [override for override in overrides if override.lstrip("+").split("=")[0] not in ("stage", "stages")]
    configs = []
    for name in cfg.stages:
        configs.append(compose_as_given("train", [*common, f"stage={name}", *cfg.stage_overrides.get(name, [])]))
    names = [config.stage.name for config in configs]
    pairs = zip(cfg.stages, names, strict=True)
    changed = [name for name, own in pairs if cfg.stage_overrides.get(name) and own != name]
    if changed:
        raise ValueError(f"stage_overrides.{changed[0]} makes another stage of it; stages= says which there are")
    if len(set(names)) < len(names):
        raise ValueError(
            f"stages= has two stages of one name ({', '.join(names)}), which would share their checkpoints"
        )
    # One model, one trainer and one logger serve all stages, so only some parts may differ.
    first = to_plain(configs[0], resolve=False)
    for name, config in zip(cfg.stages, configs, strict=True):
        values = to_plain(config, resolve=False)
        differing = [key for key in values if key not in PER_STAGE and values[key] != first[key]]
        if differing:
            raise ValueError(
                f"stage_overrides.{name} changes {', '.join(differing)}, which all stages of a run share; a stage may "
                f"have its own {', '.join(PER_STAGE)}"
            )
    for config in configs:
        check("train", config)
    return configs


def lies_within(path: str | Path, folder: Path) -> bool:
    """Whether a path is a folder or lies below it."""
    place = Path(path).expanduser().resolve()
    return folder.resolve() in (place, *place.parents)


def is_finished(stages: Sequence[DictConfig], folder: Path) -> bool:
    """Whether the run in this folder has taken all steps of its last stage and has kept the last checkpoint."""
    resume = stages[0].resume
    begins_elsewhere = resume == "auto" or (resume and not lies_within(resume, folder))
    reports = read_run_report(folder / "report.json") if begins_elsewhere else None
    if reports is None:
        return False
    last, steps = reports[-1], stages[-1].stage.steps
    if last["name"] != stages[-1].stage.name or steps is None or last["steps"] < steps:
        return False
    return (folder / "checkpoints" / Path(last["checkpoint"]).name).is_file()


def has_unsent_records(folder: Path) -> bool:
    """Whether an earlier start of the run has left records that MLflow didn't take."""
    return (folder / "mlflow_unsent.jsonl").is_file()
