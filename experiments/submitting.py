"""Submits a run to SLURM: what can be checked is checked first, and stages may be jobs that follow each other."""

import logging
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from experiments.budget import build_on_meta, plan_run
from experiments.copied_code import copy_code
from experiments.slurm import Job, show_script, submit
from experiments.stage_configs import OF_THE_RELEASE
from experiments.starting import find_init
from experiments.training_run import check_without_model
from tbac.app import compose_checked, get_run_folder, quote, record_config, to_plain
from tbac.data.datamodule import StagedDataModule
from tbac.models.saved import read_checkpoint

log = logging.getLogger(__name__)
OF_THE_PLANNER = ("world", "model", "taps", "ladder", "optim", "machine", "stage")  # groups that it has too
OF_STAGES = ("init", "stage", "stages", "submit")  # options that each job gets for itself


def submit_run(cfg: DictConfig, configs: Sequence[DictConfig], overrides: Sequence[str]) -> None:
    """Submit one job for all stages, or one for each (`machine.slurm.chain`); with `submit=false` only print scripts.

    Args:
        cfg: of the run.
        configs: of each stage.
        overrides: of the command line.

    Raises:
        ValueError: for whatever would end the job, before anything is submitted.
    """
    folder = get_run_folder().absolute()
    # What is wrong is said here, and not by a job that has waited for hours.
    check_before_submission(configs, overrides)
    if "%" in str(folder):
        raise ValueError(f"the run folder {folder} has a % in its name, which SLURM replaces in the names of logs")
    chained = cfg.stages is not None and cfg.machine.slurm.chain and len(configs) > 1
    if chained and cfg.resume not in (None, "auto"):
        raise ValueError(
            f"resume={cfg.resume} is of one stage, and each of stages=[{', '.join(cfg.stages)}] is a job of its own; "
            "submit the stage that goes on by itself, or give machine.slurm.chain=false"
        )
    # The checkpoint to start from is chosen now, so that all processes of the job take the same.
    init = find_init(configs[0])
    if init and not Path(init).expanduser().exists():
        raise ValueError(f"init={init} doesn't exist; it must be a checkpoint, a run folder or an exported folder")
    if init and Path(init).is_file():
        read_checkpoint(init)
    start = [f"init={quote(str(Path(init).absolute()))}"] if init else []
    common = [o for o in overrides if o.lstrip("+").split("=")[0] not in OF_STAGES]
    if chained:
        jobs = list_chained_jobs(cfg, configs, folder, common, start)
    else:
        stages = [o for o in overrides if o.lstrip("+").split("=")[0] in ("stage", "stages")]
        jobs = [make_job(configs[0].stage.name, folder, [*common, *stages, *start])]
    if not cfg.submit:
        for job in jobs:
            print(show_script(job), end="\n\n")
        return
    record_config(cfg)
    code = copy_code(folder) if cfg.machine.slurm.copy_code else None
    numbers: list[str] = []
    for job in jobs:
        numbers.append(submit(job, code, after=numbers[-1] if numbers else None))
        print(f"submitted job {numbers[-1]}; its log is {job.folder / f'slurm-{numbers[-1]}.log'}")
    print_commands(jobs, numbers)


def check_before_submission(configs: Sequence[DictConfig], overrides: Sequence[str]) -> None:
    """Check what can be checked without a GPU: parts, data, shapes, memory.

    Args:
        configs: of each stage.
        overrides: of the run.

    Raises:
        ValueError: for whatever would end the job.
    """
    check_cluster(configs[0])
    check_shapes(configs[0], check_without_model(configs))
    check_memory(configs, overrides)


def check_cluster(cfg: DictConfig) -> None:
    """Check that what a job asks the cluster for fits together.

    Raises:
        ValueError: for options with which it would end, or be put back for ever.
    """
    machine, slurm = cfg.machine, cfg.machine.slurm
    if not isinstance(machine.devices, int) or machine.devices < 1:
        raise ValueError(
            f"machine.devices={machine.devices} must be a whole number of at least 1 on a cluster: GPUs of each node, "
            "each of which gets a task"
        )
    if slurm.signal_seconds >= 60 * slurm.minutes:
        raise ValueError(
            f"machine.slurm.signal_seconds={slurm.signal_seconds} must be less than the job's time, machine.slurm."
            f"minutes={slurm.minutes}: a job that is told to end as it begins goes back into its queue for ever"
        )
    asked = re.fullmatch(r"gpu(?::[A-Za-z][\w.-]*)?:(\d+)", slurm.gres or "")
    if asked and int(asked[1]) < machine.devices:
        raise ValueError(
            f"machine.slurm.gres={slurm.gres} gives a node fewer GPUs than machine.devices={machine.devices} use"
        )


def make_job(stage: str, folder: Path, arguments: Sequence[str]) -> Job:
    """Make a job of this machine that trains in a folder."""
    launcher = {**to_plain(HydraConfig.get().launcher), "name": f"tbac-{stage}"}
    return Job(launcher, folder, arguments)


def list_chained_jobs(
    cfg: DictConfig, configs: Sequence[DictConfig], folder: Path, common: Sequence[str], start: Sequence[str]
) -> list[Job]:
    """List a job for each stage; each but the first starts from the newest checkpoint of the one before."""
    jobs: list[Job] = []
    # Overrides of single stages belong to the run as a whole, so each job is told its own ones.
    shared = [override for override in common if not override.lstrip("+").startswith("stage_overrides")]
    for config, group in zip(configs, cfg.stages, strict=True):
        own = list(cfg.stage_overrides.get(group, []))
        begin = [f"init={quote(str(jobs[-1].folder))}"] if jobs else list(start)
        place = folder / config.stage.name
        jobs.append(make_job(config.stage.name, place, [f"stage={group}", *shared, *own, *begin]))
    return jobs


def print_commands(jobs: Sequence[Job], numbers: Sequence[str]) -> None:
    """Print the lines with which one watches jobs and ends them."""
    print(f"  state:  squeue --jobs={','.join(numbers)}")
    print(f"  log:    tail -F {shlex.quote(str(jobs[0].folder / f'slurm-{numbers[0]}.log'))}")
    print(f"  end:    scancel {' '.join(numbers)}")


def check_shapes(cfg: DictConfig, data: StagedDataModule) -> None:
    """Hold the sizes of the data against the model's, on tensors without numbers.

    Raises:
        ValueError: for sides of pictures that the model can't take.
    """
    model = build_on_meta(to_plain(cfg.model))
    for stage in data.stages:
        stage.bind(read_no_prompt, multiple=model.size_multiple)


def read_no_prompt(*_: Any, **__: Any) -> NoReturn:
    """Stand in for the model's prompt code, where sizes alone are checked."""
    raise RuntimeError("no sample is read before a job is submitted")


def check_memory(configs: Sequence[DictConfig], overrides: Sequence[str]) -> None:
    """Compare what the planner estimates with `machine.slurm.gpu_memory_gb`, if that is given.

    Raises:
        ValueError: for a stage that doesn't fit.
    """
    limit = configs[0].machine.slurm.gpu_memory_gb
    if limit is None:
        return
    known = [o for o in overrides if o.lstrip("+~").split("=")[0].split(".")[0] in OF_THE_PLANNER]
    known = [o for o in known if not o.startswith("stage=")]
    for config in configs:
        if config.stage.name not in OF_THE_RELEASE:
            continue
        stage = compose_checked("plan", [*known, f"stage={config.stage.name}"])
        found: dict[str, Any] = plan_run(stage.model, [stage])["stages"][0]
        needed = found["memory_total_gib"] * 1024**3 / 1e9
        if needed > limit:
            raise ValueError(
                f"stage {config.stage.name} needs about {needed:.1f} GB on each GPU, and machine.slurm.gpu_memory_gb "
                f"is {limit}; python experiments/plan.py says what for, and which settings need less"
            )
