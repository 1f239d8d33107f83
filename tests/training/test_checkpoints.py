"""Training checkpoints: slim, checked, and averaged weights where an average is kept."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tbac.models import UniImage
from tbac.models.saved import FACTS, read_checkpoint, read_saved_model
from tbac.training.callbacks.ema import EMA
from tbac.training.checkpoints import find_newest_checkpoint, load_weights
from tests.helpers.training import make_data, make_module, make_trainer
from tests.helpers.worlds import load_small_model


@pytest.fixture
def saved(model: UniImage, tmp_path: Path) -> Path:
    module = make_module(model)
    trainer = make_trainer(2)
    trainer.fit(module, datamodule=make_data(model))
    path = tmp_path / "checkpoints" / "t2i_pretrain-step=2.ckpt"
    trainer.save_checkpoint(path)
    return path


def test_a_checkpoint_is_slim_and_names_the_frozen_parts(saved: Path, model: UniImage) -> None:
    checkpoint = torch.load(saved, weights_only=True)
    assert {name.split(".")[0] for name in checkpoint["state_dict"]} == {"ladder", "denoiser"}
    assert checkpoint[FACTS]["frozen"] == model.provenance.digests
    assert checkpoint[FACTS]["stage"] == "t2i_pretrain"
    trained = sum(p.numel() for p in model.get_trained_state().values())
    assert saved.stat().st_size < 3 * 4 * trained * 1.2  # weights and two moments


def test_weights_come_back_bit_for_bit(saved: Path, model: UniImage, in_world: Path) -> None:
    other = load_small_model(in_world, "model.seed=9")
    load_weights(read_saved_model(read_checkpoint(saved), "x"), other)
    state = model.get_trained_state()
    assert all(torch.equal(v, state[k]) for k, v in other.get_trained_state().items())
    assert find_newest_checkpoint(saved.parent.parent, "t2i_pretrain") == saved
    assert find_newest_checkpoint(saved.parent.parent, "finetune") is None


def _break(checkpoint: dict[str, Any], what: str) -> dict[str, Any]:
    checkpoint = copy.deepcopy(checkpoint)
    state = checkpoint["state_dict"]
    if what == "missing":
        del state["ladder.queries"]
    elif what == "unexpected":
        state["ladder.other"] = torch.zeros(1)
    elif what == "misshapen":
        state["ladder.queries"] = state["ladder.queries"][:3]
    elif what == "taps":
        checkpoint[FACTS]["config"]["model"]["taps"]["layers"] = [1, 2, 3, 4]
    else:
        checkpoint[FACTS]["frozen"][what] = "0" * 64
    return checkpoint


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("missing", "ladder.queries"),
        ("unexpected", "ladder.other"),
        ("misshapen", "ladder.queries"),
        ("taps", "trained with taps"),
        ("mllm", "another mllm"),
        ("autoencoder", "another autoencoder"),
    ],
)
def test_a_mismatch_is_refused_by_name_and_changes_nothing(saved: Path, model: UniImage, what: str, words: str) -> None:
    before = {k: v.clone() for k, v in model.get_trained_state().items()}
    with pytest.raises(ValueError, match=words):
        load_weights(read_saved_model(_break(read_checkpoint(saved), what), "x.ckpt"), model)
    assert all(torch.equal(v, before[k]) for k, v in model.get_trained_state().items())


@pytest.mark.parametrize("content", [None, b"", b"nonsense", b"PK\x03\x04 broken"])
def test_what_isn_t_a_checkpoint_is_named(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "x.ckpt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.ckpt"):
        read_checkpoint(file)


def test_a_foreign_checkpoint_is_named(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="isn't a training checkpoint of tbac"):
        read_checkpoint(tmp_path / "x.ckpt")


def test_a_half_written_checkpoint_is_named(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes()[:5000])
    with pytest.raises(ValueError, match="can't be read as a checkpoint"):
        read_checkpoint(saved)


def test_the_average_is_what_is_validated_and_saved(model: UniImage, tmp_path: Path) -> None:
    start = {k: v.clone() for k, v in model.get_trained_state().items()}
    module = make_module(model)
    ema = EMA(decay=0.5)
    path = tmp_path / "checkpoints"
    trainer = make_trainer(2)
    trainer = type(trainer)(
        accelerator="cpu", max_steps=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[ema, ModelCheckpoint(path, filename="x", every_n_train_steps=2)],
    )  # fmt: skip
    weights = []

    class Watch(__import__("lightning").Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            weights.append({k: v.clone() for k, v in model.get_trained_state().items()})

    trainer.callbacks.append(Watch())
    trainer.fit(module, datamodule=make_data(model))
    saved = read_checkpoint(path / "x.ckpt")["state_dict"]
    name = "ladder.queries"
    assert not torch.equal(saved[name], weights[-1][name])
    low, high = (f(start[name], weights[0][name], weights[1][name]) for f in (_lowest, _highest))
    assert bool(((saved[name] >= low - 1e-6) & (saved[name] <= high + 1e-6)).all())
    torch.testing.assert_close(model.get_trained_state()[name], saved[name])  # after training the model is the average


def _lowest(*tensors: torch.Tensor) -> torch.Tensor:
    return torch.stack(tensors).amin(0)


def _highest(*tensors: torch.Tensor) -> torch.Tensor:
    return torch.stack(tensors).amax(0)
