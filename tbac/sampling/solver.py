"""The solver loop: from noise to latents along the predicted velocity."""

import inspect
from typing import Any

import diffusers
import torch
from torch import Tensor
from tqdm.auto import tqdm

from tbac.flow import NUM_TIMESTEPS
from tbac.models import UniImage
from tbac.models.config import check_scheduler
from tbac.models.denoiser import ProjectedCondition
from tbac.sampling.cuda_graph import PredictionGraphs
from tbac.sampling.guidance import Guidance


def make_scheduler(config: dict[str, Any]) -> Any:
    """Make the base model's diffusers scheduler; a new one for each run, since it holds the state of a run.

    Raises:
        ValueError: for a class that isn't in the fixed list of schedulers.
    """
    check_scheduler(config)
    return getattr(diffusers, config["_class_name"]).from_config(config)


@torch.no_grad()
def solve(
    model: UniImage | PredictionGraphs,
    condition: ProjectedCondition,
    guidance: Guidance,
    latents: Tensor,
    num_inference_steps: int,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Tensor:
    """Go from noise to latents along the predicted velocity.

    Args:
        model: predicts velocities; a `PredictionGraphs` of it is faster at small batches on a CUDA device.
        condition: what `model.denoiser.project` made of a condition with rows (branch * batch), in the order of
            `guidance.branches`.
        guidance: how the branches are predicted and joined, and at which noise levels.
        latents: (batch, channel, height, width) of standard normal noise.
        num_inference_steps: solver steps.
        generator: for schedulers that add noise.
        progress: show a progress bar.

    Returns:
        Scaled latents (batch, channel, height, width).
    """
    scheduler = make_scheduler(model.scheduler_config)
    scheduler.set_timesteps(num_inference_steps, device=latents.device)
    levels = (scheduler.timesteps.float() / NUM_TIMESTEPS).tolist()
    latents = latents * scheduler.init_noise_sigma
    count = len(guidance.branches)
    # Single branches are needed where branches are predicted one by one, and where there is no guidance.
    parts = []
    if not guidance.batch_branches or guidance.interval != (0.0, 1.0):
        parts = [condition[slice(i * len(latents), (i + 1) * len(latents))] for i in range(count)]
    # Only some of diffusers' schedulers add noise and take a generator.
    noise_source = {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        noise_source["generator"] = generator
    steps = zip(scheduler.timesteps, levels, strict=True)
    for timestep, level in tqdm(steps, total=len(levels), desc="denoising", disable=not progress, leave=False):
        noisy = scheduler.scale_model_input(latents, timestep)
        sigma = (timestep.float() / NUM_TIMESTEPS).view(1)
        # Without guidance the prompt's own branch, which is the last one, is enough.
        if not guidance.applies(level):
            velocity = model.predict_velocity(noisy, sigma, parts[-1]).float()
        elif guidance.batch_branches:
            velocity = guidance.combine(model.predict_velocity(noisy, sigma, condition, count).float())
        else:
            velocity = guidance.combine(torch.cat([model.predict_velocity(noisy, sigma, p).float() for p in parts]))
        latents = scheduler.step(velocity, timestep, latents, return_dict=False, **noise_source)[0]
    return latents
