"""Training with kept prompts is training with prompts that run each time; it goes on bit for bit after a kill."""

import time
from pathlib import Path
from typing import Any

import pytest

from experiments.studies.faults.runs import are_identical
from tbac.models.prompt_cache import PromptCacheConfig, make_prompt_cache
from tbac.models.saved import read_checkpoint
from tests.helpers.training import make_data, start_training, train_and_list_losses
from tests.helpers.worlds import load_small_model

EDITS = ("stage=ti2i_pretrain", "stage.dropout.caption_drop_prob=0.3", "stage.dropout.image_drop_prob=0.3")
LADDER = ("ladder.prompt_context=true", "taps=final")


def train(world: Path, keep: str | None, folder: str | None, steps: int, options: tuple[str, ...]) -> Any:
    """Train on the edits of the world, with conditions dropped; returns losses, captions of batches and the cache."""
    model = load_small_model(world, *options)
    data = make_data(model, *EDITS, "machine.num_workers=1")
    cache = make_prompt_cache(PromptCacheConfig(keep, folder), model, "32-true")
    if cache is not None:
        data.bind(cache)
    seen: list[list[str]] = []
    inner = data.on_before_batch_transfer
    data.on_before_batch_transfer = lambda batch, index: seen.append(batch.texts) or inner(batch, index)
    return train_and_list_losses(model, data, steps), seen, cache


@pytest.mark.parametrize(
    ("keep", "folder", "options", "steps"),
    [
        ("prompts", "kept", (), 5),
        pytest.param("prompts", None, LADDER, 50, marks=pytest.mark.slow),
        pytest.param("prompts", "kept", (), 50, marks=pytest.mark.slow),
        pytest.param("images", "kept", (), 50, marks=pytest.mark.slow),
    ],
)
def test_training_on_kept_prompts_is_training_on_prompts(
    in_world: Path, keep: str, folder: str | None, options: tuple[str, ...], steps: int
) -> None:
    plain, texts, _ = train(in_world, None, None, steps, options)
    kept, same_texts, cache = train(in_world, keep, folder, steps, options)
    assert kept == pytest.approx(plain, rel=1e-5)
    assert len(set(plain)) == steps
    assert same_texts == texts
    assert any("" in batch for batch in texts)
    # Training on what an earlier run has kept computes nothing, and gives its very losses.
    if folder:
        again, _, cache = train(in_world, keep, folder, steps, options)
        assert cache.computed == 0
        assert again == kept


@pytest.mark.slow
@pytest.mark.xdist_group("trainings")
def test_a_killed_run_goes_on_exactly(in_world: Path, tmp_path: Path) -> None:
    """The cache is in memory, so the run that goes on begins with an empty one, in other batches."""
    options = ["prompt_cache.keep=prompts", "stage.dropout.caption_drop_prob=0.3"]
    assert start_training(in_world, tmp_path / "whole", *options).wait() == 0
    killed = start_training(in_world, tmp_path / "killed", *options)
    while not list((tmp_path / "killed" / "checkpoints").glob("*-step=[69].ckpt")):
        time.sleep(0.05)
        assert killed.poll() is None
    killed.kill()
    assert start_training(in_world, tmp_path / "killed", *options).wait() == 0
    name = "checkpoints/ti2i_pretrain-step=16.ckpt"
    whole, again = (read_checkpoint(tmp_path / run / name) for run in ("whole", "killed"))
    for part in ("state_dict", "current_model_state", "optimizer_states", "StagedDataModule"):
        assert are_identical(whole[part], again[part]), part
