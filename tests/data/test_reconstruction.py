"""Pictures that are prompt and target at once, as the stage of reconstruction reads them."""

from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from safetensors.torch import save

from tbac.data.decoding import CorruptSampleError, decode_picture_alone
from tbac.data.shards import Source
from tbac.models import UniImage
from tbac.models.saved import read_checkpoint
from tests.helpers.commands import FEW, run_to_success
from tests.helpers.configs import compose_config
from tests.helpers.pictures import encode_image, make_noise_image
from tests.helpers.worlds import load_small_model

WIDE = make_noise_image(1, (48, 24))
LATENTS = torch.full((8, 6, 6), 0.5)


def fields(**content: Any) -> dict[str, Any]:
    """Fields of a sample; pictures are encoded, latents packed."""
    raw: dict[str, Any] = {"__key__": "k", "__url__": "x.tar"}
    for name, value in content.items():
        name = name.replace("__", ".")
        packed = save({"latents": value}) if isinstance(value, torch.Tensor) else value
        raw[name] = packed if isinstance(packed, bytes) else encode_image(packed, "PNG")
    return raw


def decode(raw: dict[str, Any], seed: int = 0, **options: Any) -> Any:
    return decode_picture_alone(raw, Random(seed), **options)


def test_a_picture_is_its_own_prompt_without_its_caption() -> None:
    sample = decode(fields(png=WIDE, txt=b"a cat"))
    assert (sample.key, sample.text, sample.origin, sample.reconstructs) == ("k", "", "x.tar", True)
    assert sample.target.tobytes() == sample.sources[0].tobytes() == WIDE.tobytes()


def test_the_prompt_shows_the_part_that_is_drawn() -> None:
    sample = decode(fields(png=WIDE), size=(8, 8))
    assert np.array_equal(np.asarray(sample.sources[0]), np.asarray(WIDE)[:, 12:36])
    assert sample.target is sample.sources[0]


def test_any_picture_of_an_edit_is_chosen() -> None:
    pictures = {"source": make_noise_image(2), "source_1": make_noise_image(3), "target": make_noise_image(4)}
    raw = fields(**{f"{name}__png": picture for name, picture in pictures.items()}, json=b'{"instruction": "x"}')
    chosen = [decode(raw, seed).target.tobytes() for seed in range(40)]
    assert set(chosen) == {picture.tobytes() for picture in pictures.values()}
    assert chosen == [decode(raw, seed).target.tobytes() for seed in range(40)]


def test_cached_latents_are_taken_and_decide_which_pictures_can_be() -> None:
    raw = fields(source__png=make_noise_image(2), target__png=make_noise_image(4), target__latent__safetensors=LATENTS)
    for seed in range(8):
        sample = decode(raw, seed)
        assert sample.target is None
        assert torch.equal(sample.latents, LATENTS)
        assert sample.sources[0].tobytes() == make_noise_image(4).tobytes()
    without = {decode(raw, seed, use_latents=False).target.tobytes() for seed in range(20)}
    assert len(without) == 2


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (fields(txt=b"a cat"), "no picture to reconstruct"),
        (fields(latent__safetensors=LATENTS), "cached latents alone can't be seen"),
        (fields(png=b"garbage"), "png"),
        (fields(png=WIDE, latent__safetensors=b"garbage"), "latent"),
    ],
)
def test_what_can_t_be_reconstructed_is_refused_by_name(raw: dict, words: str) -> None:
    with pytest.raises(CorruptSampleError, match=words):
        decode(raw)


@pytest.mark.parametrize("task", ["draw", None, 3])
def test_a_task_that_there_isn_t_is_named(task: Any) -> None:
    with pytest.raises(ValueError, match="the task of source x must be generate or reconstruct"):
        Source("x", task=task)


def test_a_mixture_has_both_tasks_in_one_batch(model: UniImage) -> None:
    data = instantiate(compose_config("train", "run_dir=.", "stage=reconstruct", "stage.batch_size=32").data)
    data.bind(model.prompt)
    batch = next(iter(data.train_dataloader()))
    empty = sum(not text for text in batch.texts)
    assert 8 < empty < 32
    assert batch.latents.shape == (32, 8, 6, 6)
    assert len(batch.prompt["image_grid_thw"]) >= empty


def test_what_is_reconstructed_is_no_reference(in_world: Path) -> None:
    reading = load_small_model(in_world, "model.reference_latents=true")
    options = ["stage=reconstruct", "stage.batch_size=32", "data.dropout=null"]
    data = instantiate(compose_config("train", "run_dir=.", *options).data)
    data.bind(reading.prompt)
    batch = next(iter(data.train_dataloader()))
    given = batch.prompt["has_reference"].bool().tolist()
    # Edits that are trained as they are keep their references.
    assert any(given)
    assert not any(reference for reference, text in zip(given, batch.texts, strict=True) if not text)


@pytest.mark.usefixtures("in_world")
def test_the_stage_trains_after_the_three(capfd: pytest.CaptureFixture[str]) -> None:
    run_to_success("train", capfd, *FEW, "stage=finetune", "stage.previous=null", "hydra.run.dir=outputs/train/three")
    run_to_success("train", capfd, *FEW, "stage=reconstruct", "hydra.run.dir=late")
    before, after = read_checkpoint("outputs/train/three"), read_checkpoint("late")
    assert after["tbac"]["stage"] == "reconstruct"
    assert before["state_dict"].keys() == after["state_dict"].keys()
