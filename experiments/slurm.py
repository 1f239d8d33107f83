"""Submitting training to SLURM, as `train.py` does where the machine is a cluster and no job is running yet.

The job's script goes into the run folder. A job that is put back into its queue goes on in the same folder, and in the
same MLflow run.
"""

import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def batch_script(machine: dict[str, Any], name: str, folder: Path, command: Sequence[str]) -> str:
    """The script of a job that runs `command` once per device.

    Args:
        machine: the config group, with `num_nodes`, `devices` and `slurm`.
        name: of the job.
        folder: where its log goes.
        command: of each process.
    """
    slurm = machine["slurm"]
    options = {
        "job-name": name,
        "nodes": machine["num_nodes"],
        "ntasks-per-node": machine["devices"],
        "cpus-per-task": slurm["cpus_per_task"],
        "gres": slurm["gres"],
        "mem": slurm["mem_gb"] and f"{slurm['mem_gb']}G",
        "account": slurm["account"],
        "partition": slurm["partition"],
        "qos": slurm["qos"],
        "constraint": slurm["constraint"],
        "time": slurm["minutes"],
        "signal": f"USR1@{slurm['signal_seconds']}",
        "output": folder / "slurm-%j.log",
        "open-mode": "append",
        **slurm["options"],
    }
    lines = ["#!/bin/bash", "#SBATCH --requeue"]
    lines += [f"#SBATCH --{key}={value}" for key, value in options.items() if value is not None]
    lines += slurm["setup"]
    container = f"{slurm['container']} " if slurm["container"] else ""
    lines.append(f"srun --kill-on-bad-exit=1 {container}{shlex.join(command)}")
    return "\n".join(lines) + "\n"


def submit(machine: dict[str, Any], name: str, folder: Path, arguments: Sequence[str]) -> str:
    """Write the script that trains in `folder` and submit it; returns the job's number.

    Args:
        machine: the config group.
        name: of the job.
        folder: the run folder.
        arguments: of train.py.

    Raises:
        ValueError: without `sbatch`, and when SLURM refuses.
    """
    if shutil.which("sbatch") is None:
        raise ValueError("this machine is a SLURM cluster and sbatch isn't here; submit from one of its login nodes")
    train = Path(__file__).with_name("train.py")
    command = [sys.executable, str(train), *arguments, f"hydra.run.dir='{folder}'", "hydra.output_subdir=null"]
    script = folder / "job.sh"
    script.write_text(batch_script(machine, name, folder, command))
    done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"sbatch refused {script}: {done.stderr.strip()}")
    return done.stdout.strip().split(";")[0]
