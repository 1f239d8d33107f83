"""Going on after a kill equals never having stopped, bit for bit; files of the final name are always whole."""

import os
import time
from pathlib import Path

import pytest
import torch

from experiments.studies.faults.runs import are_identical
from tbac.models.saved import read_checkpoint
from tbac.training.checkpoint_io import AtomicCheckpointIO, BackgroundCheckpointIO
from tbac.training.checkpoints import find_newest_readable
from tests.helpers.training import start_training

pytestmark = pytest.mark.xdist_group("trainings")  # whose processes are forks of one


def test_a_killed_run_goes_on_exactly(in_world: Path, whole_run: Path, tmp_path: Path) -> None:
    killed = start_training(in_world, tmp_path / "killed")
    while not list((tmp_path / "killed" / "checkpoints").glob("*-step=[69].ckpt")):
        time.sleep(0.05)
        assert killed.poll() is None
    killed.kill()
    assert find_newest_readable(tmp_path / "killed") is not None
    assert start_training(in_world, tmp_path / "killed").wait() == 0
    whole, again = (
        read_checkpoint(f / "checkpoints" / "ti2i_pretrain-step=16.ckpt") for f in (whole_run, tmp_path / "killed")
    )
    for part in ("state_dict", "current_model_state", "optimizer_states", "lr_schedulers", "StagedDataModule"):
        assert are_identical(whole[part], again[part]), part
    guards = [next(v for k, v in c["callbacks"].items() if "Guard" in k) for c in (whole, again)]
    assert are_identical(*guards)


def test_a_torn_checkpoint_is_named_and_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "checkpoints"
    writer = AtomicCheckpointIO()
    for step in (1, 2, 3):
        writer.save_checkpoint({"tbac": {}, "state_dict": {"a": torch.ones(1000)}}, folder / f"s-step={step}.ckpt")
        os.utime(folder / f"s-step={step}.ckpt", (step, step))
    newest = folder / "s-step=3.ckpt"
    newest.write_bytes(newest.read_bytes()[:2000])
    os.utime(newest, (3, 3))
    found = find_newest_readable(tmp_path)
    assert found is not None
    assert found[0] == folder / "s-step=2.ckpt"
    assert "s-step=3.ckpt" in caplog.text


@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_loses_nothing_whole(tmp_path: Path, background: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, path = BackgroundCheckpointIO() if background else AtomicCheckpointIO(), tmp_path / "a.ckpt"
    atomic = writer.writer if isinstance(writer, BackgroundCheckpointIO) else writer
    writer.save_checkpoint({"a": torch.ones(3)}, path)
    writer.teardown()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        writer.save_checkpoint({"a": torch.zeros(3)}, path)
        writer.teardown()
    assert "No space left" in str(atomic.failed)
    assert torch.equal(torch.load(path)["a"], torch.ones(3))
    assert os.listdir(tmp_path) == ["a.ckpt"]
    writer.save_checkpoint({"a": torch.zeros(3)}, path)
    writer.teardown()
    assert atomic.failed is None
    assert torch.equal(torch.load(path)["a"], torch.zeros(3))


def test_what_is_written_is_of_the_moment_of_the_call(tmp_path: Path) -> None:
    writer, weights = BackgroundCheckpointIO(), torch.ones(1_000_000)
    writer.save_checkpoint({"a": weights}, tmp_path / "a.ckpt")
    weights.zero_()
    writer.teardown()
    assert torch.load(tmp_path / "a.ckpt")["a"].min() == 1
