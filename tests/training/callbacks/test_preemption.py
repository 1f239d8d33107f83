"""Signals: the step in hand is finished and saved, and the same command goes on exactly."""

import signal
from pathlib import Path

import pytest

from experiments.studies.faults.runs import same
from tbac.models.saved import read_checkpoint
from tbac.training.callbacks.preemption import Preemption, slurm_job, slurm_job_runs_on
from tests.helpers.processes import start_command
from tests.helpers.training import RUN

pytestmark = pytest.mark.xdist_group("trainings")  # whose processes are forks of one

NAME = "ti2i_pretrain-step=16.ckpt"


def run(world: Path, folder: Path, *overrides: str) -> tuple[int, str]:
    """Exit status of a training, and what it has written."""
    variables = {"TBAC_SHAPES": str(world), "CUDA_VISIBLE_DEVICES": ""}
    arguments = [*RUN, f"hydra.run.dir={folder}", *overrides]
    command = start_command("experiments.train", arguments, folder / "output.txt", variables)
    return command.wait(), command.text


@pytest.mark.parametrize(("name", "batch"), [("SIGTERM", 3), ("SIGINT", 5)])  # 5: a validation follows that step
def test_a_signal_saves_and_ends_and_the_command_goes_on(in_world: Path, tmp_path: Path, name: str, batch: int) -> None:
    fault = f"+callbacks.fault={{_target_:experiments.studies.faults.inject.Signal,batches:[{batch}],name:{name}}}"
    status, text = run(in_world, tmp_path / "stopped", fault)
    assert status == 128 + signal.Signals[name]
    assert f"stopped by {name} after step {batch + 1} of stage ti2i_pretrain" in text
    assert (tmp_path / "stopped" / "checkpoints" / f"ti2i_pretrain-step={batch + 1}.ckpt").is_file()
    assert run(in_world, tmp_path / "stopped")[0] == 0
    assert run(in_world, tmp_path / "whole")[0] == 0
    one, other = (read_checkpoint(tmp_path / f / "checkpoints" / NAME) for f in ("stopped", "whole"))
    for part in ("state_dict", "current_model_state", "optimizer_states", "StagedDataModule", "callbacks"):
        assert same(one[part], other[part]), part


def test_unknown_signals_are_named() -> None:
    with pytest.raises(ValueError, match="'SIGNAL' isn't the name of a signal"):
        Preemption(stop=["SIGNAL"])


def test_outside_of_slurm_there_is_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    assert slurm_job() is None
    assert not slurm_job_runs_on()
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert slurm_job() == "7_3"
