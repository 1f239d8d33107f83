"""The solver loop: from noise to latents along the predicted velocity."""

from typing import Any

import diffusers
import torch
from torch import Tensor
from tqdm.auto import tqdm

from tbac.flow import NUM_TIMESTEPS
from tbac.models import UniImage
from tbac.sampling.guidance import Guidance
from tbac.types import Condition


def make_scheduler(config: dict[str, Any]) -> Any:
    """The base model's diffusers scheduler, fresh, so that no state of an earlier run is left in it.

    Raises:
        ValueError: when diffusers has no scheduler of that name.
    """
    name = config.get("_class_name", "")
    if not name or not hasattr(diffusers, name):
        raise ValueError(f"the scheduler config names the class {name!r}, which diffusers doesn't have")
    return getattr(diffusers, name).from_config(config)


@torch.no_grad()
def solve(
    model: UniImage,
    condition: Condition,
    guidance: Guidance,
    latents: Tensor,
    num_inference_steps: int,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Tensor:
    """Denoise.

    Args:
        model: predicts velocities.
        condition: rows (branch * batch), in the order of `guidance.branches`.
        guidance: how the branches are joined.
        latents: (batch, channel, height, width) of standard normal noise.
        num_inference_steps: solver steps.
        generator: for schedulers that add noise.
        progress: show a progress bar.

    Returns:
        Scaled latents (batch, channel, height, width).
    """
    scheduler = make_scheduler(model.provenance.scheduler)
    scheduler.set_timesteps(num_inference_steps, device=latents.device)
    latents = latents * scheduler.init_noise_sigma
    branches = len(guidance.branches)
    for timestep in tqdm(scheduler.timesteps, desc="denoising", disable=not progress, leave=False):
        noisy = scheduler.scale_model_input(torch.cat([latents] * branches), timestep)
        sigma = (timestep / NUM_TIMESTEPS).to(torch.float32).expand(noisy.shape[0])
        velocity = guidance.combine(model.predict_velocity(noisy, sigma, condition).float())
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    return latents
