"""Which checkpoints are kept."""

from pathlib import Path
from typing import Any

import pytest

from tbac.models import UniImage
from tbac.training.callbacks.checkpoint import Checkpoint
from tbac.training.checkpoint_io import BackgroundCheckpointIO
from tests.helpers.training import make_data, make_module, make_trainer

LOSSES = (5.0, 4.0, 1.0, 3.0, 2.0, 6.0, 7.0)  # of the validations after steps 1 to 7


def kept(model: UniImage, folder: Path, **options: Any) -> tuple[set[int], str, str]:
    """Steps whose checkpoints are left after 7 steps, and what the links name."""
    checkpointing = Checkpoint(str(folder), **({"every": 1} | options))
    trainer = make_trainer(
        7, callbacks=[checkpointing], plugins=[BackgroundCheckpointIO()],
        val_check_interval=1, check_val_every_n_epoch=None, enable_checkpointing=True,
    )  # fmt: skip
    module = make_module(model, steps=7)
    module.validation_step = lambda batch, batch_idx: module.log(  # type: ignore[method-assign]
        "val/loss", LOSSES[module.steps - 1], batch_size=1
    )
    trainer.fit(module, datamodule=make_data(model))
    steps = {int(f.stem.partition("step=")[2]) for f in folder.glob("*-step=*.ckpt")}
    best = folder / "best.ckpt"
    return steps, (folder / "last.ckpt").readlink().name, best.readlink().name if best.exists() else ""


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {6, 7, 3}),  # the two newest and the best
        ({"keep": 1, "monitor": None}, {7}),
        ({"keep": 4, "monitor": None}, {4, 5, 6, 7}),
        ({"keep": 1, "keep_every": 2, "monitor": None}, {2, 4, 6, 7}),
        ({"keep": 1, "every": 3}, {7, 3}),
    ],
)
def test_the_rules_say_which_are_kept(model: UniImage, tmp_path: Path, options: dict, expected: set[int]) -> None:
    steps, last, best = kept(model, tmp_path, **options)
    assert steps == expected
    assert last == "t2i_pretrain-step=7.ckpt"
    assert best == ("" if "monitor" in options else "t2i_pretrain-step=3.ckpt")


@pytest.mark.parametrize("name", ["every", "keep", "keep_every"])
def test_bad_numbers_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"callbacks.checkpoint.{name} must be at least 1, got 0"):
        Checkpoint("x", **({"every": 1} | {name: 0}))


@pytest.mark.parametrize("name", ["symlink_to", "unlink"])
def test_where_no_link_can_be_made_and_no_file_removed_training_goes_on(
    model: UniImage, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path, *args: Any, **options: Any) -> None:
        if path.suffix == ".ckpt" or name == "symlink_to":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, name, refuse)
    checkpointing = Checkpoint(str(tmp_path), every=1, keep=1, monitor=None)
    trainer = make_trainer(3, callbacks=[checkpointing], plugins=[BackgroundCheckpointIO()], enable_checkpointing=True)
    trainer.fit(make_module(model, steps=3), datamodule=make_data(model))
    steps = {int(f.stem.partition("step=")[2]) for f in tmp_path.glob("*-step=*.ckpt")}
    assert steps == ({3} if name == "symlink_to" else {1, 2, 3})
    assert "No space left on device" in caplog.text
