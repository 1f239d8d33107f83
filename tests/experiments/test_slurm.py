"""SLURM jobs: their script, and what is refused."""

import os
import stat
from pathlib import Path

import pytest

from experiments.slurm import batch_script
from tbac.app import plain
from tests.helpers.commands import run_app
from tests.helpers.configs import composed


def test_the_script_says_what_the_machine_says(tmp_path: Path) -> None:
    overrides = ["machine.slurm.account=me", "machine.slurm.setup=[module load cuda]", "machine.slurm.mem_gb=64"]
    overrides += ["machine.slurm.container='apptainer exec image.sif'", "+machine.slurm.options.reservation=r"]
    machine = plain(composed("train", "run_dir=.", "machine=slurm_2x8", *overrides).machine)
    lines = batch_script(machine, "name", tmp_path, ["python", "train.py", "a=[1, 2]"]).splitlines()
    assert lines[0] == "#!/bin/bash"
    expected = {
        "requeue", "job-name=name", "nodes=2", "ntasks-per-node=8", "cpus-per-task=12", "gres=gpu:8", "mem=64G",
        "account=me", "time=1440", "signal=USR1@180", f"output={tmp_path}/slurm-%j.log", "open-mode=append",
        "reservation=r",
    }  # fmt: skip
    assert {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")} == expected
    assert lines[-2:] == [
        "module load cuda",
        "srun --kill-on-bad-exit=1 apptainer exec image.sif python train.py 'a=[1, 2]'",
    ]


@pytest.mark.usefixtures("in_world")
def test_a_cluster_without_sbatch_is_said(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    status, text = run_app("train", capfd, "world=shapes", "machine=slurm_2x8")
    assert status == 1
    assert "sbatch isn't here" in text


@pytest.mark.usefixtures("in_world")
def test_what_slurm_refuses_is_said(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    refusing = tmp_path / "bin" / "sbatch"
    refusing.parent.mkdir()
    refusing.write_text("#!/bin/sh\necho 'invalid partition specified: x' >&2\nexit 1\n")
    refusing.chmod(refusing.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{refusing.parent}:{os.environ['PATH']}")
    status, text = run_app("train", capfd, "world=shapes", "machine=slurm_2x8", "hydra.run.dir=run")
    assert status == 1
    assert "sbatch refused" in text
    assert "invalid partition specified: x" in text
    assert "srun" in Path("run/job.sh").read_text()
