"""The command that fills a prompt cache ahead of training: with the same entries that training would keep."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from tbac.models.prompt_cache import PromptCacheConfig, make_prompt_cache
from tests.helpers.commands import run_app, run_to_success
from tests.helpers.training import make_data, train_and_list_losses
from tests.helpers.worlds import load_small_model

TENSOR = {"prompts": "keys_values", "images": "features"}
EDITS = ["world=shapes", "stage=ti2i_pretrain", "stage.dropout.caption_drop_prob=0.3", "stage.val_samples=8"]


def read_files(folder: str) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path(folder).glob("*/??/*.safetensors")}


@pytest.mark.parametrize("keep", ["prompts", pytest.param("images", marks=pytest.mark.slow)])
def test_training_finds_all_prompts_and_computes_none(
    keep: str, in_world: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = [*EDITS, f"prompt_cache.keep={keep}", "prompt_cache.folder=kept"]
    # Two processes share the work: the second one does what is left.
    run_to_success("data_prep.cache_prompts", capfd, *options, "rank=0", "world_size=2")
    assert ": 0 weren't kept yet" not in run_to_success("data_prep.cache_prompts", capfd, *options)
    assert {load(content)[TENSOR[keep]].dtype for content in read_files("kept").values()} == {torch.float32}
    model = load_small_model(in_world)
    data = make_data(model, *EDITS)
    caches = {}
    for folder in ("kept", "own"):
        cache = make_prompt_cache(PromptCacheConfig(keep, folder), model, "32-true")
        assert cache is not None
        data.bind(cache)
        train_and_list_losses(model, data, 4)
        caches[folder] = cache
    assert caches["kept"].computed == 0
    assert caches["own"].computed > 4
    kept, own = read_files("kept"), read_files("own")
    assert own.items() <= kept.items()


@pytest.mark.slow
def test_it_computes_in_the_precision_of_training(in_world: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = [*EDITS, "prompt_cache.folder=kept", "machine.precision=bf16-mixed"]
    run_to_success("data_prep.cache_prompts", capfd, *options)
    assert {load(content)["keys_values"].dtype for content in read_files("kept").values()} == {torch.bfloat16}
    before = read_files("kept")
    run_to_success("train", capfd, *options, "debug=few_steps", "stage.previous=null", "prompt_cache.keep=prompts")
    assert read_files("kept") == before
    assert len(list(Path("kept").glob("*/about.json"))) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["prompt_cache.keep=null", "prompt_cache.folder=kept"], "prompt_cache.keep must be prompts or images"),
        (["rank=2", "world_size=2", "prompt_cache.folder=kept"], "rank=2 must be at least 0 and below world_size=2"),
        (["machine.precision=bf16-true", "prompt_cache.folder=kept"], "machine.precision must be one of 32-true"),
        ([], "prompt_cache.folder=DIR is needed"),
    ],
)
def test_bad_input_is_named(
    arguments: list[str], words: str, in_world: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    status, text = run_app("data_prep.cache_prompts", capfd, *EDITS, *arguments)
    assert status == 1
    assert words in text
