"""Submitting training to SLURM, as `train.py` does where the machine is a cluster and no job is running yet.

What a job asks for is written once, in `conf/hydra/launcher/slurm.yaml`: Hydra's launcher reads it for a sweep, this
file for a single job, and submitit writes the job's script from it, into `.submitit` of the run folder. A job that goes
back into its queue goes on in the same folder, and in the same MLflow run.
"""

import runpy
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import submitit
from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
from submitit.core.utils import FailedJobError

from tbac.app import quote

TRAIN = Path(__file__).with_name("train.py")
OF_THE_LAUNCHER = ("_target_", "submitit_folder")  # keys of the file that only Hydra's launcher understands


def build_job_parameters(launcher: Mapping[str, Any], log_file: Path) -> dict[str, Any]:
    """Build the parameters of a job for submitit's executor.

    Args:
        launcher: `conf/hydra/launcher/slurm.yaml`, resolved.
        log_file: where all processes write, also after the job was requeued; `%j` in it is the job's number.
    """
    options = {name: value for name, value in launcher.items() if name not in OF_THE_LAUNCHER}
    options["stderr_to_stdout"] = True
    options["srun_args"] = ["--output", str(log_file), "--open-mode=append", *options["srun_args"]]
    options["additional_parameters"] = {**options["additional_parameters"], "output": str(log_file)}
    # Submitit shares some options between all kinds of clusters; those of SLURM alone get a prefix.
    shared = {field.name for field in fields(BaseQueueConf)}
    return {name if name in shared else f"slurm_{name}": value for name, value in options.items()}


def submit(launcher: Mapping[str, Any], folder: Path, arguments: Sequence[str]) -> str:
    """Submit a job that trains in `folder`; returns its number.

    Args:
        launcher: `conf/hydra/launcher/slurm.yaml`, resolved.
        folder: the run folder; the job's log is `slurm-<number>.log` in it.
        arguments: of train.py.

    Raises:
        ValueError: without SLURM's programs, where the machine names no SLURM launcher, and when SLURM refuses.
    """
    if "srun_args" not in launcher:
        raise ValueError("a machine with `slurm` needs conf/hydra/launcher/slurm.yaml too: give hydra/launcher=slurm")
    # Submitit looks for srun, which a cluster has on its login nodes only.
    job_folder = folder / ".submitit"
    try:
        executor = submitit.AutoExecutor(folder=job_folder, cluster="slurm")
    except RuntimeError as error:
        raise ValueError(
            "this machine is a SLURM cluster and its programs aren't here; submit from one of its login nodes"
        ) from error
    executor.update_parameters(**build_job_parameters(launcher, folder / "slurm-%j.log"))
    # The job trains in this run folder.
    words = [*arguments, f"hydra.run.dir={quote(str(folder))}"]
    try:
        return executor.submit(train_in_job, words).job_id
    except FailedJobError as error:
        raise ValueError(f"sbatch refused the job that is written in {job_folder}: {error}") from error


def train_in_job(arguments: Sequence[str]) -> None:
    """Train in a process of a job, as `python experiments/train.py ARGUMENTS` does."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # submitit ignores it; before training begins it ends the job
    sys.argv = [str(TRAIN), *arguments]
    runpy.run_path(str(TRAIN), run_name="__main__")
