"""SLURM jobs: what is asked for, and what is refused."""

import os
from pathlib import Path

import pytest

from tests.helpers.commands import run_app

pytestmark = pytest.mark.usefixtures("in_world")


def put_on_path(monkeypatch: pytest.MonkeyPatch, folder: Path, **programs: str) -> None:
    """Programs of these names and shell texts come before all others."""
    folder.mkdir()
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_a_job_asks_for_what_the_machine_says(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    put_on_path(monkeypatch, tmp_path / "bin", srun="", sbatch="echo Submitted batch job 7")
    overrides = ["machine.slurm.account=me", "machine.slurm.setup=[module load cuda]", "machine.slurm.mem_gb=64"]
    overrides += ["machine.slurm.container='apptainer exec image.sif'", "+machine.slurm.options.reservation=r"]
    run = tmp_path / "run"
    status, text = run_app("train", capfd, "world=shapes", "machine=slurm_2x8", *overrides, f"hydra.run.dir={run}")
    assert status == 0, text
    assert f"submitted job 7; its log is {run}/slurm-7.log" in text
    lines = (run / ".submitit" / "7_submission.sh").read_text().splitlines()
    assert lines[0] == "#!/bin/bash"
    expected = {
        "requeue", "job-name=tbac-t2i_pretrain", "nodes=2", "ntasks-per-node=8", "cpus-per-task=12", "gres=gpu:8",
        "mem=64GB", "account=me", "time=1440", "signal=USR1@180", f"output={run}/slurm-%j.log", "open-mode=append",
        "reservation=r", "wckey=submitit",
    }  # fmt: skip
    assert {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")} == expected
    (command,) = (line for line in lines if line.startswith("srun "))
    assert lines.index("module load cuda") < lines.index(command)
    options, python = command.split(" apptainer exec image.sif ")
    assert {"--kill-on-bad-exit=1", "--open-mode=append"} < set(options.split())
    assert options.rpartition("--output ")[2].startswith(f"{run}/slurm-%j.log")
    assert "-m submitit.core._submit" in python


def test_a_cluster_without_sbatch_is_said(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    status, text = run_app("train", capfd, "world=shapes", "machine=slurm_2x8")
    assert status == 1
    assert "its programs aren't here" in text


def test_what_slurm_refuses_is_said(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    refusal = "echo 'invalid partition specified: x' >&2\nexit 1"
    put_on_path(monkeypatch, tmp_path / "bin", srun="", sbatch=refusal)
    status, text = run_app("train", capfd, "world=shapes", "machine=slurm_2x8", "hydra.run.dir=run")
    assert status == 1
    assert "sbatch refused" in text
    assert "invalid partition specified: x" in text
    (script,) = Path("run/.submitit").glob("*.sh")
    assert "srun" in script.read_text()
