"""Sampling: the solver against a plain loop, guidance as its equation, pictures paired with their own prompts."""

from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from tbac.models import UniImage
from tbac.sampling import UniImagePipeline
from tbac.sampling.guidance import Guidance
from tests.helpers.pictures import make_noise_image


def latents_of(pipeline: UniImagePipeline, prompt: Any, **options: Any) -> torch.Tensor:
    return pipeline(prompt, output_type="latent", **{"num_inference_steps": 3, **options}).images


def noise_for(count: int) -> torch.Tensor:
    return torch.randn(count, 8, 6, 6, generator=torch.Generator().manual_seed(7))


@pytest.fixture
def pipeline(model: UniImage) -> UniImagePipeline:
    return UniImagePipeline(model)


@torch.no_grad()
def plain_loop(model: UniImage, texts: list[str], images: Any, latents: torch.Tensor, steps: int, combine: Any) -> Any:
    """One branch at a time, with the scheduler of diffusers."""
    scheduler = DPMSolverMultistepScheduler.from_config(model.scheduler_config)
    scheduler.set_timesteps(steps)
    conditions = [model.encode_condition(model.prompt([t], [i])) for t, i in zip(texts, images, strict=True)]
    for timestep in scheduler.timesteps:
        sigma = (timestep / 1000).float().expand(1)
        velocities = [model.predict_velocity(latents, sigma, c) for c in conditions]
        latents = scheduler.step(combine(*velocities), timestep, latents, return_dict=False)[0]
    return latents


def test_text_guidance_equals_the_plain_loop(model: UniImage, pipeline: UniImagePipeline) -> None:
    noise = noise_for(1)
    expected = plain_loop(model, ["bad", "a red circle"], [None, None], noise, 5, lambda u, f: u + 4.0 * (f - u))
    made = latents_of(
        pipeline, "a red circle", negative_prompt="bad", latents=noise, guidance_scale=4.0, num_inference_steps=5
    )
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)


def test_dual_guidance_equals_the_plain_loop(model: UniImage, pipeline: UniImagePipeline) -> None:
    from PIL import Image

    noise, source = noise_for(1), make_noise_image(3)
    black = Image.new("RGB", source.size)
    expected = plain_loop(
        model,
        ["", "", "add a circle"],
        [[black], [source], [source]],
        noise,
        5,
        lambda u, i, f: u + 1.5 * (i - u) + 4.0 * (f - i),
    )
    made = latents_of(
        pipeline, "add a circle", image=source, latents=noise, guidance_scale=4.0, image_guidance_scale=1.5,
        num_inference_steps=5,
    )  # fmt: skip
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)


def test_guidance_of_one_is_no_guidance(model: UniImage, pipeline: UniImagePipeline) -> None:
    noise = noise_for(1)
    expected = plain_loop(model, ["a red circle"], [None], noise, 3, lambda f: f)
    torch.testing.assert_close(
        latents_of(pipeline, "a red circle", latents=noise, guidance_scale=1.0), expected, rtol=1e-4, atol=1e-4
    )
    assert Guidance(1.0).branches == Guidance(1.0, 1.0).branches == ("full",)


def test_image_guidance_of_one_or_less_guides_the_text_alone(model: UniImage, pipeline: UniImagePipeline) -> None:
    noise, source = noise_for(1), make_noise_image(3)
    expected = plain_loop(
        model, ["", "add a circle"], [[source], [source]], noise, 3, lambda i, f: i + 4.0 * (f - i)
    )  # fmt: skip
    for scale in (1.0, 0.5):
        made = latents_of(
            pipeline, "add a circle", image=source, latents=noise, guidance_scale=4.0, image_guidance_scale=scale
        )
        torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("edit", [False, True])
def test_branches_one_by_one_equal_branches_in_one_batch(pipeline: UniImagePipeline, edit: bool) -> None:
    options = {"latents": noise_for(2), "image": [make_noise_image(1), make_noise_image(2)] if edit else None}
    together = latents_of(pipeline, PROMPTS[:2], **options)
    apart = latents_of(pipeline, PROMPTS[:2], batch_branches=False, **options)
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)


def test_outside_its_interval_there_is_no_guidance(model: UniImage, pipeline: UniImagePipeline) -> None:
    noise = noise_for(1)
    whole = latents_of(pipeline, PROMPTS[0], latents=noise, num_inference_steps=6)
    equal = latents_of(pipeline, PROMPTS[0], latents=noise, num_inference_steps=6, guidance_interval=(0, 1))
    assert torch.equal(whole, equal)
    scheduler = DPMSolverMultistepScheduler.from_config(model.scheduler_config)
    scheduler.set_timesteps(6)
    uncond, full = (model.encode_condition(model.prompt([t])) for t in ("", PROMPTS[0]))
    latents = noise
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            sigma = (timestep / 1000).float().expand(1)
            u, f = (model.predict_velocity(latents, sigma, c) for c in (uncond, full))
            velocity = u + 4.5 * (f - u) if 0.3 <= sigma.item() <= 0.9 else f
            latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    made = latents_of(
        pipeline, PROMPTS[0], latents=noise, num_inference_steps=6, guidance_interval=(0.3, 0.9), guidance_scale=4.5
    )
    torch.testing.assert_close(made, latents, rtol=1e-4, atol=1e-4)
    assert (made - whole).abs().max() > 1e-3


def test_a_picture_s_keys_and_values_are_made_once(
    model: UniImage, pipeline: UniImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, read = [], []
    for block in model.denoiser.transformer.transformer_blocks:
        block.attn2.to_k.register_forward_hook(lambda *args: made.append(len(args[1][0])))
    original = model.mllm.read_prefix
    monkeypatch.setattr(
        model.mllm,
        "read_prefix",
        lambda inputs, *how: (read.append(len(inputs["input_ids"])), original(inputs, *how))[1],
    )
    latents_of(pipeline, PROMPTS, num_inference_steps=5, num_images_per_prompt=2)
    assert read == [4]  # three prompts, and one negative prompt for all of them
    assert made == [4] * model.denoiser.num_blocks


PROMPTS = ["a red circle", "three green squares at the top left and a letter L", "a blue triangle"]


def test_a_batch_of_prompts_equals_one_by_one(pipeline: UniImagePipeline) -> None:
    noise = noise_for(3)
    together = latents_of(pipeline, PROMPTS, latents=noise)
    for row, prompt in enumerate(PROMPTS):
        alone = latents_of(pipeline, prompt, latents=noise[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-3, atol=1e-3)


def test_a_batch_of_edits_equals_one_by_one(pipeline: UniImagePipeline) -> None:
    noise = noise_for(3)
    images = [make_noise_image(1), make_noise_image(2, (20, 48)), [make_noise_image(3), make_noise_image(4)]]
    together = latents_of(pipeline, PROMPTS, image=images, latents=noise)
    for row, (prompt, image) in enumerate(zip(PROMPTS, images, strict=True)):
        alone = latents_of(pipeline, prompt, image=image, latents=noise[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("edit", [False, True])
def test_several_pictures_per_prompt_keep_their_prompt_and_their_image(pipeline: UniImagePipeline, edit: bool) -> None:
    noise = noise_for(6)
    images = [make_noise_image(1), make_noise_image(2), make_noise_image(3)] if edit else [None] * 3
    together = latents_of(pipeline, PROMPTS, image=images if edit else None, latents=noise, num_images_per_prompt=2)
    for index in range(6):
        row = index // 2
        alone = latents_of(pipeline, PROMPTS[row], image=images[row], latents=noise[index : index + 1])
        torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-3, atol=1e-3)
        other = latents_of(pipeline, PROMPTS[row - 1], image=images[row - 1], latents=noise[index : index + 1])
        assert (other - alone).abs().max() > 1e-2  # the pairing matters


def test_the_generator_decides(pipeline: UniImagePipeline) -> None:
    made = [latents_of(pipeline, PROMPTS[0], generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
    each = latents_of(pipeline, PROMPTS[:2], generator=[torch.Generator().manual_seed(s) for s in (5, 1)])
    torch.testing.assert_close(each[1], latents_of(pipeline, PROMPTS[1], generator=torch.Generator().manual_seed(1))[0],
                               rtol=1e-3, atol=1e-3)  # fmt: skip


def test_output_types(pipeline: UniImagePipeline, model: UniImage) -> None:
    noise = noise_for(1)
    latents = latents_of(pipeline, PROMPTS[0], latents=noise)
    tensors = pipeline(PROMPTS[0], latents=noise, num_inference_steps=3, output_type="pt").images
    pictures = pipeline(PROMPTS[0], latents=noise, num_inference_steps=3).images
    torch.testing.assert_close(tensors, (model.autoencoder.decode(latents) + 1) / 2)
    assert pictures[0].size == (24, 24)
    assert torch.equal(
        torch.tensor(list(pictures[0].tobytes())).view(24, 24, 3), (tensors[0] * 255).round().permute(1, 2, 0).long()
    )


def test_other_sizes(pipeline: UniImagePipeline) -> None:
    image = pipeline(PROMPTS[0], num_inference_steps=1, height=16, width=48).images[0]
    assert image.size == (48, 16)


def test_answering_through_the_pipeline(pipeline: UniImagePipeline, model: UniImage) -> None:
    image = make_noise_image(5)
    assert pipeline.answer("what is it?", image, 4) == model.answer(["what is it?"], [[image]], 4)[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"output_type": "jpeg"}, "output_type must be one of"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt"),
        ({"height": 30}, "height must be a positive multiple of 8"),
        ({"width": 0}, "width must be"),
        ({"latents": torch.zeros(1, 8, 6, 6)}, "latents must have shape"),
        ({"negative_prompt": ["a"]}, "1 negative prompts for 2 prompts"),
        ({"image": [make_noise_image(1), None]}, "all edits or all text-to-image"),
        ({"image": [make_noise_image(1)]}, "1 input images for 2 prompts"),
        ({"generator": [torch.Generator()]}, "1 generators for 2 pictures"),
        ({"guidance_interval": (0.5, 0.2)}, "guidance_interval must be two noise levels"),
        ({"guidance_interval": (0.0, 1.5)}, "guidance_interval must be two noise levels"),
    ],
)
def test_what_doesn_t_fit_is_refused_before_anything_runs(
    pipeline: UniImagePipeline, monkeypatch: pytest.MonkeyPatch, options: dict, words: str
) -> None:
    monkeypatch.setattr(UniImage, "predict_velocity", lambda *_: pytest.fail("ran"))
    with pytest.raises(ValueError, match=words):
        pipeline(["a", "b"], **options)


def test_an_unknown_scheduler_is_named() -> None:
    from tbac.sampling.solver import make_scheduler

    with pytest.raises(ValueError, match="'NoSuchScheduler'"):
        make_scheduler({"_class_name": "NoSuchScheduler"})
