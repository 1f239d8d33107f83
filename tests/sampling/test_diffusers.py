"""What users of diffusers expect of a pipeline: the checks of its own pipeline tests, written for ours."""

import copy
import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from tbac.models import UniImage
from tbac.models.checks import SCHEDULERS
from tbac.sampling import UniImagePipeline
from tests.helpers.pictures import make_noise_image
from tests.helpers.worlds import load_small_model

PROMPTS = ["a red circle", "three green squares at the top left and a letter L"]
SHAPE = (2, 8, 6, 6)


@pytest.fixture
def pipeline(model: UniImage) -> UniImagePipeline:
    pipeline = UniImagePipeline(model)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: Any, prompt: Any = PROMPTS, **options: Any) -> Any:
    """Latents of two pictures from fixed noise."""
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    return pipeline(prompt, **{"num_inference_steps": 3, "latents": noise, "output_type": "latent", **options}).images


def test_a_saved_pipeline_draws_the_same(pipeline: UniImagePipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "export", standalone=True)
    again = UniImagePipeline.from_pretrained(tmp_path / "export", torch_dtype=torch.float32, use_safetensors=True)
    assert isinstance(again, DiffusionPipeline)
    torch.testing.assert_close(draw(again), draw(pipeline), rtol=1e-5, atol=1e-5)


def test_diffusers_itself_opens_an_export(
    pipeline: UniImagePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffusers.utils.dynamic_modules_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    pipeline.save_pretrained(tmp_path / "export", standalone=True)
    again = DiffusionPipeline.from_pretrained(tmp_path / "export", trust_remote_code=True)
    again.set_progress_bar_config(disable=True)
    assert isinstance(again, UniImagePipeline)
    torch.testing.assert_close(draw(again), draw(pipeline), rtol=1e-5, atol=1e-5)


def test_nothing_in_an_export_is_run(pipeline: UniImagePipeline, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    pipeline.save_pretrained(folder, standalone=True)
    for file in (folder / "pipeline.py", folder / "model" / "uniimage.py"):
        file.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    UniImagePipeline.from_pretrained(folder)
    assert not (tmp_path / "ran").exists()


def test_components_make_the_pipeline_again(pipeline: UniImagePipeline) -> None:
    assert set(pipeline.components) == {"model", "scheduler"}
    assert torch.equal(draw(UniImagePipeline(**pipeline.components)), draw(pipeline))
    assert torch.equal(draw(UniImagePipeline.from_pipe(pipeline)), draw(pipeline))
    assert pipeline.transformer is pipeline.model.denoiser.transformer
    assert pipeline.vae is pipeline.model.autoencoder.model
    assert (pipeline.device, pipeline.dtype) == (torch.device("cpu"), torch.float32)


def test_types_are_cast_and_back(pipeline: UniImagePipeline) -> None:
    assert pipeline.to(torch.bfloat16).dtype == torch.bfloat16
    assert draw(pipeline).isfinite().all()
    assert pipeline.to("cpu", torch.float32).dtype == torch.float32


def test_a_tuple_holds_what_the_output_holds(pipeline: UniImagePipeline) -> None:
    options = {"num_inference_steps": 2, "output_type": "np", "generator": torch.Generator().manual_seed(1)}
    as_tuple = pipeline(PROMPTS, return_dict=False, **options)
    options["generator"] = torch.Generator().manual_seed(1)
    made = pipeline(PROMPTS, **options)
    assert isinstance(as_tuple, tuple)
    assert made.images.shape == as_tuple[0].shape == (2, 24, 24, 3)
    assert np.array_equal(made.images, as_tuple[0])
    assert np.array_equal(made[0], made["images"])
    assert made.images.min() >= 0
    assert made.images.max() <= 1


def test_callbacks_see_and_replace_latents(pipeline: UniImagePipeline) -> None:
    seen = []

    def look(pipe: UniImagePipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        seen.append((step, float(timestep), pipe.num_timesteps, pipe.guidance_scale))
        return tensors

    assert torch.equal(
        draw(pipeline, callback_on_step_end=look, guidance_scale=3.0), draw(pipeline, guidance_scale=3.0)
    )
    assert [step for step, *_ in seen] == [0, 1, 2]
    assert {rest for *_, rest in seen} == {3.0}
    assert [t for _, t, *_ in seen] == sorted((t for _, t, *_ in seen), reverse=True)

    def erase(pipe: UniImagePipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        return {"latents": torch.zeros_like(tensors["latents"])} if step == pipe.num_timesteps - 1 else {}

    assert not draw(pipeline, callback_on_step_end=erase).any()
    assert torch.equal(draw(pipeline, callback_on_step_end=lambda *_: None), draw(pipeline))
    with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs may hold"):
        draw(pipeline, callback_on_step_end_tensor_inputs=["prompt_embeds"])


def test_an_interrupted_call_takes_no_more_steps(pipeline: UniImagePipeline) -> None:
    steps = []

    def stop(pipe: UniImagePipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        steps.append(tensors["latents"])
        pipe._interrupt = step == 1
        return {}

    made = draw(pipeline, callback_on_step_end=stop, num_inference_steps=5)
    assert len(steps) == 2
    assert torch.equal(made, steps[-1])
    assert len(draw(pipeline, num_inference_steps=2)) == 2  # the next call runs


@pytest.mark.parametrize("overrides", [(), ("ladder.prompt_context=true",)])
def test_encoded_prompts_stand_for_their_texts(in_world: Path, overrides: tuple[str, ...]) -> None:
    pipeline = UniImagePipeline(load_small_model(in_world, *overrides))
    pipeline.set_progress_bar_config(disable=True)
    names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    encoded = dict(zip(names, pipeline.encode_prompt(PROMPTS, "blue"), strict=True))
    made = draw(pipeline, None, **encoded)
    torch.testing.assert_close(made, draw(pipeline, negative_prompt="blue"), rtol=1e-4, atol=1e-4)
    alone = dict(zip(names, pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False), strict=True))
    assert alone["negative_prompt_embeds"] is None
    made = draw(pipeline, None, guidance_scale=1.0, **alone)
    torch.testing.assert_close(made, draw(pipeline, guidance_scale=1.0), rtol=1e-4, atol=1e-4)
    repeated = pipeline.encode_prompt(PROMPTS[0], num_images_per_prompt=3)[0]
    assert torch.equal(repeated[0], repeated[2])
    with pytest.raises(ValueError, match="negative_prompt_embeds must have shape"):
        draw(pipeline, None, **alone)
    with pytest.raises(ValueError, match="prompt or prompt_embeds"):
        draw(pipeline, PROMPTS, **encoded)


def make_forms() -> dict[str, Any]:
    """Forms of the same input image."""
    image = make_noise_image(4)
    array = np.asarray(image)
    return {
        "list": [image],
        "bytes": array,
        "numbers": array / 255,
        "stack": array[None],
        "tensor": torch.tensor(array / 255, dtype=torch.float32).permute(2, 0, 1),
        "path": image,
        "nested": [[image]],
    }


@pytest.mark.parametrize("form", list(make_forms()))
def test_images_come_in_the_forms_of_diffusers(pipeline: UniImagePipeline, form: str, tmp_path: Path) -> None:
    image = make_forms()[form]
    if form == "path":
        image.save(tmp_path / "picture.png")
        image = tmp_path / "picture.png"
    options = {"latents": torch.ones(1, 8, 6, 6), "num_inference_steps": 2}
    made = draw(pipeline, "add a circle", image=image, **options)
    assert torch.equal(made, draw(pipeline, "add a circle", image=make_noise_image(4), **options))


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((4, 4)), r"got shape \(4, 4\)"),
        (np.full((8, 8, 3), 7.0), r"must lie in \[0, 1\]"),
        ([5], "got int 5"),
        ("missing.png", "missing.png can't be opened"),
    ],
)
def test_what_isn_t_an_image_is_refused(pipeline: UniImagePipeline, image: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pipeline("add a circle", image=image)


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


@pytest.mark.parametrize("name", SCHEDULERS)
@torch.no_grad()
def test_schedulers_that_follow_a_flow_equal_a_plain_loop(pipeline: UniImagePipeline, name: str) -> None:
    options = {"shift": 3.0} if "FlowMatch" in name else FLOW
    pipeline.scheduler = getattr(diffusers, name)(**options)
    made = draw(pipeline, num_inference_steps=6, guidance_scale=4.0)
    scheduler = copy.deepcopy(pipeline.scheduler)
    scheduler.set_timesteps(6)
    latents = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    model = pipeline.model
    uncond, full = (model.encode_condition(model.prompt(texts)) for texts in (["", ""], PROMPTS))
    for timestep in scheduler.timesteps:
        sigma = (timestep / 1000).float().expand(2)
        velocities = [model.predict_velocity(latents, sigma, condition) for condition in (uncond, full)]
        velocity = velocities[0] + 4.0 * (velocities[1] - velocities[0])
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    torch.testing.assert_close(made, latents, rtol=1e-4, atol=1e-4)


def test_schedulers_of_one_s_own_levels(pipeline: UniImagePipeline) -> None:
    with pytest.raises(ValueError, match="takes no"):
        draw(pipeline, sigmas=[1.0, 0.5])
    pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    levels = []
    callback = lambda pipe, i, t, tensors: levels.append(float(t)) or {}  # noqa: E731
    draw(pipeline, sigmas=[1.0, 0.6, 0.2], callback_on_step_end=callback)
    assert levels == pytest.approx([1000.0, 600.0, 200.0])
    with pytest.raises(ValueError, match="timesteps or sigmas, not both"):
        draw(pipeline, sigmas=[1.0], timesteps=[1000.0])


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (diffusers.DDIMScheduler(), "'DDIMScheduler'"),
        (diffusers.DPMSolverMultistepScheduler(), "prediction_type='flow_prediction'"),
        (diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction"), "use_flow_sigmas=True"),
        (diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "use_dynamic_shifting must be false"),
    ],
)
def test_schedulers_of_another_kind_are_refused(pipeline: UniImagePipeline, scheduler: Any, words: str) -> None:
    pipeline.scheduler = scheduler
    with pytest.raises(ValueError, match=words):
        draw(pipeline)


def test_a_swapped_scheduler_is_saved(pipeline: UniImagePipeline, tmp_path: Path) -> None:
    pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)
    pipeline.save_pretrained(tmp_path / "export", standalone=True)
    again = UniImagePipeline.from_pretrained(tmp_path / "export")
    assert isinstance(again.scheduler, diffusers.FlowMatchEulerDiscreteScheduler)
    assert again.scheduler.config.shift == 2.0
    torch.testing.assert_close(draw(again), draw(pipeline), rtol=1e-5, atol=1e-5)
    saved = json.loads((tmp_path / "export" / "scheduler" / "scheduler_config.json").read_text())
    assert saved["_class_name"] == "FlowMatchEulerDiscreteScheduler"


def test_offloaded_parts_draw_and_answer_the_same(pipeline: UniImagePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU nothing moves; what is watched is which part was called to the device, and when it went back."""
    expected, answer = draw(pipeline), pipeline.answer("what is it?", make_noise_image(1), 4)
    pipeline.enable_model_cpu_offload(device="cpu")
    assert torch.equal(draw(pipeline), expected)
    assert pipeline.answer("what is it?", make_noise_image(1), 4) == answer
    called: list[str] = []

    def watch(name: str, run: Any) -> Any:
        def watched(*arguments: Any, **options: Any) -> Any:
            called.append(name)
            return run(*arguments, **options)

        return watched

    for name in ("mllm", "denoiser", "autoencoder"):
        hook = getattr(pipeline.model, name)._hf_hook
        monkeypatch.setattr(hook, "pre_forward", watch(name, hook.pre_forward))
    pipeline(PROMPTS, num_inference_steps=2, image=[make_noise_image(1), make_noise_image(2)])
    order = list(dict.fromkeys(called))
    assert order == ["mllm", "denoiser", "autoencoder"]
    pipeline.remove_all_hooks()
    assert not hasattr(pipeline.model.mllm, "_hf_hook")
    for refused in (pipeline.enable_sequential_cpu_offload, pipeline.enable_group_offload):
        with pytest.raises(NotImplementedError, match="enable_model_cpu_offload"):
            refused()


def test_several_questions_are_answered_at_once(pipeline: UniImagePipeline) -> None:
    images = [make_noise_image(1), None]
    answers = pipeline.answer(["what is it?", "how many?"], images, 4)
    assert answers == [pipeline.answer("what is it?", images[0], 4), pipeline.answer("how many?", None, 4)]
    assert pipeline.answer([]) == []


def test_a_progress_bar_can_be_set(pipeline: UniImagePipeline, capfd: pytest.CaptureFixture[str]) -> None:
    draw(pipeline)
    assert "it/s" not in capfd.readouterr().err
    pipeline.set_progress_bar_config(desc="denoising")
    draw(pipeline)
    assert "denoising" in capfd.readouterr().err


def test_pictures_of_calls_at_once_don_t_mix(pipeline: UniImagePipeline) -> None:
    from concurrent.futures import ThreadPoolExecutor

    expected = [draw(pipeline, PROMPTS[i % 2 : i % 2 + 1] * 2, num_inference_steps=4) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda i: draw(pipeline, PROMPTS[i % 2 : i % 2 + 1] * 2, num_inference_steps=4), range(4)))
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))


def test_pil_pictures_have_the_size_that_was_asked_for(pipeline: UniImagePipeline) -> None:
    made = pipeline("a red circle", num_inference_steps=1, height=32, width=64).images[0]
    assert isinstance(made, Image.Image)
    assert made.size == (64, 32)
