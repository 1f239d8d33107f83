"""Signals: the step in hand is finished and saved, and the same command goes on exactly."""

import errno
import io
import os
import signal
import subprocess
from pathlib import Path

import pytest

from experiments.studies.faults.runs import are_identical
from tbac.models.saved import read_checkpoint
from tbac.training.callbacks.preemption import Preemption, read_slurm_job, slurm_job_runs_on
from tbac.training.interruptions import InterruptedRun, Interruption, outlast_terminal
from tests.helpers.configs import ROOT
from tests.helpers.shared import build_once
from tests.helpers.training import RUN, TRAIN, start_training

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


STAGES = "stages=[t2i_pretrain,ti2i_pretrain,finetune]"
THREE = [STAGES, "stage.steps=6", "stage.val_every=3"]  # where they differ from RUN
LAST = "finetune-step=6.ckpt"


@pytest.fixture(scope="session")
def three_stages(world_folder: Path, session_folder: Path) -> Path:
    """A run of three stages that nothing stopped."""

    def train(folder: Path) -> None:
        command = start_training(world_folder, folder, *THREE)
        assert command.wait() == 0, command.text

    return build_once(session_folder / "three_stages", train)


MOMENTS = [
    ("t2i_pretrain", "setup", {}), ("t2i_pretrain", "first_validation", {"name": "SIGINT"}),
    ("t2i_pretrain", "train_start", {"name": "SIGHUP"}), ("t2i_pretrain", "batch", {"times": 2}),
    ("t2i_pretrain", "validation", {"group": True}), ("t2i_pretrain", "last_batch", {"group": True, "times": 2}),
    ("t2i_pretrain", "train_end", {}), ("t2i_pretrain", "fit_end", {"name": "SIGINT", "times": 2}),
    ("t2i_pretrain", "teardown", {"group": True}), ("ti2i_pretrain", "setup", {"group": True, "times": 2}),
    ("ti2i_pretrain", "first_validation", {}), ("ti2i_pretrain", "last_batch", {"name": "SIGINT", "group": True}),
    ("finetune", "batch", {"name": "SIGHUP", "group": True}), ("finetune", "validation", {"times": 2}),
    ("finetune", "last_batch", {}), ("finetune", "train_end", {"group": True}), ("finetune", "teardown", {}),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "moment", "options"), MOMENTS)
def test_a_signal_is_obeyed_whenever_it_comes_and_the_command_goes_on(
    in_world: Path, three_stages: Path, tmp_path: Path, stage: str, moment: str, options: dict
) -> None:
    chosen = {"stage": stage, "moment": moment, "once": tmp_path / "once", **options}
    fault = ",".join(f"{key}:{value}" for key, value in chosen.items())
    folder = tmp_path / "run"
    arguments = [*THREE, f"+callbacks.fault={{_target_:experiments.studies.faults.inject.SignalAt,{fault}}}"]
    stopped = start_training(in_world, folder, *arguments)
    assert stopped.wait(120) == 128 + signal.Signals[options.get("name", "SIGTERM")], stopped.text
    assert "Traceback" not in stopped.text
    again = start_training(in_world, folder, *arguments)
    assert again.wait(120) == 0, again.text
    one, other = (read_checkpoint(f / "checkpoints" / LAST) for f in (folder, three_stages))
    for part in ("state_dict", "current_model_state", "optimizer_states", "StagedDataModule", "callbacks"):
        assert are_identical(one[part], other[part]), part


@pytest.mark.parametrize("batches", ["[4]", "[2,9]"])
def test_a_killed_loader_process_is_started_anew_and_no_sample_is_lost(
    in_world: Path, whole_run: Path, tmp_path: Path, batches: str
) -> None:
    fault = f"+callbacks.fault={{_target_:experiments.studies.faults.inject.KilledWorker,batches:{batches}}}"
    run = start_training(in_world, tmp_path / "run", fault, "machine.num_workers=2")
    assert run.wait() == 0, run.text
    assert "the loader's processes are started anew" in run.text
    one, other = (read_checkpoint(f / "checkpoints" / NAME) for f in (tmp_path / "run", whole_run))
    for part in ("state_dict", "current_model_state", "optimizer_states"):
        assert are_identical(one[part], other[part]), part


def test_a_signal_that_comes_twice_at_once_is_one_and_a_later_one_ends_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent: list[int] = []
    interruption = Interruption()
    monkeypatch.setattr("tbac.training.interruptions.os.kill", lambda pid, number: sent.append(number))
    now = [100.0]
    monkeypatch.setattr("tbac.training.interruptions.time.monotonic", lambda: now[0])
    before = signal.getsignal(signal.SIGTERM)
    with interruption.watch([signal.SIGTERM, signal.SIGHUP]):
        interruption.may_end = False
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
        assert (interruption.received, sent) == (signal.SIGTERM, [])
        now[0] += 2
        signal.raise_signal(signal.SIGHUP)
        assert sent == [signal.SIGHUP]
    assert signal.getsignal(signal.SIGTERM) == before


def test_where_nothing_is_unsaved_a_signal_ends_the_run_at_once() -> None:
    interruption = Interruption()
    with interruption.watch([signal.SIGTERM]), pytest.raises(InterruptedRun) as ended:
        signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 143


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    interruption, before = Interruption(), signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruption.watch([signal.SIGHUP]):
            signal.raise_signal(signal.SIGHUP)
            assert interruption.received is None
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("code", [errno.EPIPE, errno.ENOSPC, errno.EIO, errno.EBADF])
def test_output_that_nobody_reads_any_more_ends_nothing(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(code, "broken")

        def flush(self) -> None:
            raise OSError(code, "broken")

    monkeypatch.setattr("sys.stdout", Broken())
    with outlast_terminal():
        print("a line", flush=True)
        print("another")


def test_a_run_whose_output_is_cut_off_goes_on(in_world: Path, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    arguments = [*RUN, "stage.steps=2", "callbacks.sample_grid.prompts=[]", f"hydra.run.dir={tmp_path}/run"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    assert subprocess.run([*TRAIN, *arguments], env=environment, stdout=writing, cwd=ROOT).returncode == 0
    assert (tmp_path / "run" / "report.json").is_file()
