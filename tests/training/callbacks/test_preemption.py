"""Signals: the step in hand is finished and saved, and the same command goes on exactly."""

import signal
from pathlib import Path

import pytest

from experiments.studies.faults.runs import are_identical
from tbac.models.saved import read_checkpoint
from tbac.training.callbacks.preemption import Preemption, read_slurm_job, slurm_job_runs_on
from tests.helpers.training import start_training

pytestmark = pytest.mark.xdist_group("trainings")  # whose processes are forks of one

NAME = "ti2i_pretrain-step=16.ckpt"


@pytest.mark.parametrize(("name", "batch"), [("SIGTERM", 3), ("SIGINT", 5)])  # 5: a validation follows that step
def test_a_signal_saves_and_ends_and_the_command_goes_on(
    in_world: Path, whole_run: Path, tmp_path: Path, name: str, batch: int
) -> None:
    fault = f"+callbacks.fault={{_target_:experiments.studies.faults.inject.Signal,batches:[{batch}],name:{name}}}"
    folder = tmp_path / "stopped"
    stopped = start_training(in_world, folder, fault)
    assert stopped.wait() == 128 + signal.Signals[name]
    assert f"stopped by {name} after step {batch + 1} of stage ti2i_pretrain" in stopped.text
    assert (folder / "checkpoints" / f"ti2i_pretrain-step={batch + 1}.ckpt").is_file()
    assert start_training(in_world, folder).wait() == 0
    one, other = (read_checkpoint(f / "checkpoints" / NAME) for f in (folder, whole_run))
    for part in ("state_dict", "current_model_state", "optimizer_states", "StagedDataModule", "callbacks"):
        assert are_identical(one[part], other[part]), part


def test_unknown_signals_are_named() -> None:
    with pytest.raises(ValueError, match="'SIGNAL' isn't the name of a signal"):
        Preemption(stop=["SIGNAL"])


def test_outside_of_slurm_there_is_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    assert read_slurm_job() is None
    assert not slurm_job_runs_on()
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert read_slurm_job() == "7_3"
