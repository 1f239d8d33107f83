"""What a Python program may do with a model: threads, failures on the way, wrong values, pickles, forks."""

import math
import multiprocessing
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tbac.models import UniImage
from tbac.sampling import UniImagePipeline
from tests.helpers.pictures import make_noise_image
from tests.helpers.worlds import load_small_model

NAN, INFINITE = math.nan, math.inf


@pytest.fixture
def pipe(model: UniImage) -> UniImagePipeline:
    return UniImagePipeline(model)


def draw(pipe: UniImagePipeline, prompt: str = "a red circle", **options: Any) -> Any:
    generator = torch.Generator().manual_seed(5)
    options = {"num_inference_steps": 2, "output_type": "latent", "generator": generator, **options}
    return pipe(prompt, **options).images


def test_first_calls_from_several_threads_give_what_one_after_the_other_does(in_world: Path) -> None:
    """Nothing has been read yet, and each call has other branches of guidance, sizes of prompts and parts to read."""
    edit = make_noise_image(1)
    calls: list[Callable[[UniImagePipeline], Any]] = [
        lambda pipe: draw(pipe, guidance_scale=1.0),
        lambda pipe: draw(pipe, "two blue squares and a green triangle", guidance_scale=4.5),
        lambda pipe: draw(pipe, "make it blue", image=edit, image_guidance_scale=2.0),
        lambda pipe: np.array(draw(pipe, output_type="pil")[0]),
        lambda pipe: pipe.answer("what is it?", edit, 3),
        lambda pipe: pipe.answer(["what color?", "how many are there?"], max_new_tokens=3),
    ]
    alone = UniImagePipeline(load_small_model(in_world))
    expected = [call(alone) for call in calls]
    shared = UniImagePipeline(load_small_model(in_world))
    with ThreadPoolExecutor(len(calls)) as pool:
        found = list(pool.map(lambda call: call(shared), calls))
    for one, other in zip(expected, found, strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other))


class NoDiskError(OSError):
    pass


def test_an_error_while_the_whole_mllm_is_read_leaves_the_model_as_it_was(
    pipe: UniImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = draw(pipe)

    def fail() -> Any:
        raise NoDiskError

    with monkeypatch.context() as patch:
        patch.setattr(pipe.model.mllm, "_read_full_model", fail)
        for _ in range(2):
            with pytest.raises(NoDiskError):
                pipe.answer("what is it?")
            assert torch.equal(draw(pipe), before)
    assert isinstance(pipe.answer("what is it?", max_new_tokens=2), str)
    assert torch.equal(draw(pipe), before)


def test_a_device_without_room_for_the_whole_mllm_leaves_the_model_as_it_was(
    pipe: UniImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Qwen2_5_VLForConditionalGeneration

    before = draw(pipe)

    def fail(self: Any, *arguments: Any) -> Any:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Qwen2_5_VLForConditionalGeneration, "to", fail)
        with pytest.raises(torch.OutOfMemoryError):
            pipe.answer("what is it?")
    assert torch.equal(draw(pipe), before)
    assert isinstance(pipe.answer("what is it?", max_new_tokens=2), str)


WRONG: list[dict[str, Any]] = [
    *(
        {name: value}
        for name in ("guidance_scale", "image_guidance_scale")
        for value in (NAN, INFINITE, "4", True, None)
    ),
    *({"latents": value} for value in (torch.full((1, 8, 3, 3), NAN), torch.zeros(1, 8, 3, 3).long(), [1], "x")),
    *({"latents": value} for value in (torch.zeros(2, 8, 3, 3), torch.full((1, 8, 3, 3), INFINITE))),
    *({"num_inference_steps": value} for value in (0, -1, 1.5, NAN, "2", None, True)),
    *({"num_images_per_prompt": value} for value in (0, 1.5, None)),
    *({"height": value} for value in (0, 7, 24.0, NAN, "24", True)),
    *({"guidance_interval": value} for value in ((0.5, 0.5), (NAN, 1.0), (0.0, NAN), (-1, 1), (0.0, 2.0))),
    *({"negative_prompt": value} for value in (5, ["a", "b"], [None], "\ud800", [])),
    {"output_type": "jpg"},
    {"guidance_scale": 1e38},
]


@pytest.mark.parametrize(
    "options", WRONG, ids=lambda options: f"{next(iter(options))}={str(next(iter(options.values())))[:20]}"
)
def test_a_value_that_makes_no_picture_is_named(pipe: UniImagePipeline, options: dict[str, Any]) -> None:
    if "image_guidance_scale" in options:
        if None in options.values():
            pytest.skip("None is text-to-image")
        options = options | {"image": make_noise_image(1)}
    name = next(iter(options))
    words = "negative" if name == "negative_prompt" else name
    with pytest.raises(ValueError, match=words):
        draw(pipe, **options)


@pytest.mark.parametrize("prompt", [[], [None], [5], 5, None, "\ud800", ["a", b"b"], [[]]])
def test_a_prompt_that_is_no_text_is_named(pipe: UniImagePipeline, prompt: Any) -> None:
    with pytest.raises(ValueError, match="prompt"):
        draw(pipe, prompt)


def test_empty_lists_have_a_meaning(pipe: UniImagePipeline) -> None:
    assert pipe.answer([]) == []
    assert pipe.model.answer([]) == []
    assert torch.equal(draw(pipe, image=[]), draw(pipe))
    with pytest.raises(ValueError, match="at least one text"):
        pipe.model.prompt([])
    with pytest.raises(ValueError, match="at least one text"):
        pipe.model.prompt("a text alone")  # type: ignore[arg-type]
    for tokens in (0, -1, 1.5, True, None):
        with pytest.raises(ValueError, match="max_new_tokens"):
            pipe.answer("what is it?", max_new_tokens=tokens)  # type: ignore[arg-type]


def test_a_pickle_is_the_same_model(pipe: UniImagePipeline) -> None:
    before = draw(pipe)
    again = UniImagePipeline(pickle.loads(pickle.dumps(pipe.model)))
    assert torch.equal(draw(again), before)
    assert again.answer("what is it?", max_new_tokens=3) == pipe.answer("what is it?", max_new_tokens=3)


def _draw_in_process(pipe: UniImagePipeline, queue: Any) -> None:
    queue.put(draw(pipe).numpy())


@pytest.mark.parametrize("threads", [1, 2])
def test_a_forked_process_draws_the_same_although_another_thread_was_drawing(
    pipe: UniImagePipeline, threads: int
) -> None:
    usual = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        before = draw(pipe)
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        with pipe.lock:  # as if a thread held it that the child doesn't have
            child = context.Process(target=_draw_in_process, args=(pipe, queue))
            child.start()
        found = queue.get(timeout=60)
        child.join(20)
    finally:
        torch.set_num_threads(usual)
    assert child.exitcode == 0
    np.testing.assert_allclose(found, before.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_model_that_was_loaded_and_used_in_inference_mode_can_be_trained(
    in_world: Path, mode: Callable[[], Any], tmp_path: Path
) -> None:
    load_small_model(in_world).save_pretrained(tmp_path / "out")
    with mode():
        model = UniImage.from_pretrained(tmp_path / "out")
        pipe = UniImagePipeline(model)
        draw(pipe, output_type="pil", image=make_noise_image(1))
        pipe.answer("what is it?", max_new_tokens=2)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert [name for name, tensor in tensors.items() if tensor.is_inference()] == []
    model.ladder.requires_grad_(True)
    condition = model.encode_condition(model.prompt(["a red circle"]))
    latents = torch.randn(1, model.latent_channels, 3, 3)
    model.predict_velocity(latents, torch.tensor([0.5]), condition).square().mean().backward()
    gradient = model.ladder.queries.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0
