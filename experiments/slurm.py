"""Submitting training to SLURM, as `train.py` does where the machine is a cluster and no job is running yet.

What a job asks for is written once, in `conf/hydra/launcher/slurm.yaml`: Hydra's launcher reads it for a sweep, this
file for a single job, and submitit writes the job's script from it, into `.submitit` of the run folder. A job that goes
back into its queue goes on in the same folder, and in the same MLflow run.
"""

import os
import re
import runpy
import shlex
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import submitit
from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
from submitit.core.utils import FailedJobError, FailedSubmissionError

from experiments.copied_code import export_path
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


@dataclass(frozen=True)
class Job:
    """A job that trains.

    Attributes:
        launcher: `conf/hydra/launcher/slurm.yaml`, resolved.
        folder: the run folder; the job's log is `slurm-<number>.log` in it.
        arguments: of train.py.
    """

    launcher: Mapping[str, Any]
    folder: Path
    arguments: Sequence[str]

    def __post_init__(self) -> None:
        if "srun_args" not in self.launcher:
            raise ValueError(
                "a machine with `slurm` needs conf/hydra/launcher/slurm.yaml too: give hydra/launcher=slurm"
            )

    @property
    def words(self) -> list[str]:
        """The arguments with the folder that the job trains in."""
        return [*self.arguments, f"hydra.run.dir={quote(str(self.folder))}"]


def submit(job: Job, code: Path | None = None, after: str | None = None) -> str:
    """Submit a job; returns its number.

    Args:
        job: the job.
        code: folder of a copy of this code that it runs; None runs this code as it is then.
        after: number of another job that must have succeeded before.

    Raises:
        ValueError: without SLURM's programs, and when SLURM refuses.
    """
    # Submitit looks for srun, which a cluster has on its login nodes only.
    job_folder = job.folder / ".submitit"
    try:
        executor = submitit.AutoExecutor(folder=job_folder, cluster="slurm")
    except RuntimeError as error:
        raise ValueError(
            "this machine is a SLURM cluster and its programs aren't here; submit from one of its login nodes"
        ) from error
    parameters = build_job_parameters(job.launcher, job.folder / "slurm-%j.log")
    if code is not None:
        parameters["slurm_setup"] = [*(parameters["slurm_setup"] or []), export_path(code)]
    if after is not None:
        depends = {"dependency": f"afterok:{after}", "kill-on-invalid-dep": "yes"}
        parameters["slurm_additional_parameters"] = {**parameters["slurm_additional_parameters"], **depends}
    executor.update_parameters(**parameters)
    try:
        return executor.submit(train_in_job, job.words).job_id
    except FailedJobError as error:
        raise ValueError(f"sbatch refused the job that is written in {job_folder}: {error}") from error
    except FailedSubmissionError as error:
        raise ValueError(
            f"sbatch took the job that is written in {job_folder}, and what it printed has no number ({error}); "
            "squeue --me says whether it waits"
        ) from error


def show_script(job: Job) -> str:
    """Show the script that would be submitted.

    Submitit writes it and gives it to `sbatch`, in whose place there is a program here that does nothing.
    """
    before = os.environ.get("PATH", "")
    with tempfile.TemporaryDirectory() as place:
        for name, does in (("sbatch", "echo Submitted batch job 0"), ("srun", "true")):
            program = Path(place) / name
            program.write_text(f"#!/bin/sh\n{does}\n")
            program.chmod(0o755)
        os.environ["PATH"] = f"{place}:{before}"
        try:
            submit(replace(job, folder=Path(place)))
        finally:
            os.environ["PATH"] = before
        script = (Path(place) / ".submitit" / "0_submission.sh").read_text()

    # The folder of the run stands where the temporary one was, in quotes where a shell needs them.
    def name_path(found: re.Match[str]) -> str:
        return shlex.quote(found[0].replace(place, str(job.folder)))

    shown = re.sub(rf"{re.escape(place)}[^\s'\"]*", name_path, script)
    command = shlex.join(["python", "experiments/train.py", *job.words])
    return f"{shown.rstrip()}\n# each process runs: {command}"


def train_in_job(arguments: Sequence[str]) -> None:
    """Train in a process of a job, as `python experiments/train.py ARGUMENTS` does."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # submitit ignores it; before training begins it ends the job
    sys.argv = [str(TRAIN), *arguments]
    runpy.run_path(str(TRAIN), run_name="__main__")
