"""The solver loop: from noise to latents along the predicted velocity."""

import inspect
from collections.abc import Sequence
from typing import Any

import diffusers
import torch
from torch import Tensor

from tbac.flow import NUM_TIMESTEPS
from tbac.models import UniImage
from tbac.models.checks import check_scheduler
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


def check_flow_scheduler(scheduler: Any) -> None:
    """Raise ValueError for a scheduler of diffusers that doesn't follow a flow from noise to latents.

    The model predicts `noise - latents`, which schedulers for flow matching integrate. Those for diffusion do so only
    with `prediction_type="flow_prediction"` and `use_flow_sigmas=True`.
    """
    name, config = type(scheduler).__name__, scheduler.config
    check_scheduler({"_class_name": name})
    if config.get("use_dynamic_shifting", False):
        raise ValueError(f"{name}: use_dynamic_shifting must be false; shift={config.get('shift', 1.0)} stays the same")
    if "FlowMatch" in name:
        if config.get("stochastic_sampling", False):
            raise ValueError(f"{name}: stochastic_sampling must be false")
        return
    found = {key: config.get(key) for key in ("prediction_type", "use_flow_sigmas")}
    if found != {"prediction_type": "flow_prediction", "use_flow_sigmas": True}:
        raise ValueError(
            f"{name} must have prediction_type='flow_prediction' and use_flow_sigmas=True to follow a flow; got {found}"
        )


def set_timesteps(
    scheduler: Any,
    num_inference_steps: int,
    device: torch.device | str = "cpu",
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
) -> None:
    """Set the noise levels that a scheduler visits.

    Args:
        scheduler: one of diffusers.
        num_inference_steps: solver steps, at the scheduler's own levels; not read with one of the next two.
        device: where the scheduler keeps its timesteps.
        timesteps: your own levels, descending, 1000 = pure noise.
        sigmas: the same in [0, 1].

    Raises:
        ValueError: when the scheduler takes no levels of one's own in this form, or both forms are given.
    """
    if timesteps is not None and sigmas is not None:
        raise ValueError("give timesteps or sigmas, not both")
    accepted = inspect.signature(scheduler.set_timesteps).parameters
    for name, levels in (("timesteps", timesteps), ("sigmas", sigmas)):
        if levels is None:
            continue
        if name not in accepted:
            raise ValueError(f"{type(scheduler).__name__} takes no {name}; give num_inference_steps")
        scheduler.set_timesteps(**{name: list(levels)}, device=device)
        return
    scheduler.set_timesteps(num_inference_steps, device=device)


class FlowSolver:
    """Takes the steps from noise to latents along the predicted velocity.

    Args:
        model: predicts velocities; a `PredictionGraphs` of it is faster at small batches on a CUDA device.
        condition: what `model.denoiser.project` made of a condition with rows (branch * batch), in the order of
            `guidance.branches`.
        guidance: how the branches are predicted and joined, and at which noise levels.
        scheduler: of diffusers, with its timesteps set; it holds the state of this run.
        generator: for schedulers that add noise.
    """

    def __init__(
        self,
        model: UniImage | PredictionGraphs,
        condition: ProjectedCondition,
        guidance: Guidance,
        scheduler: Any,
        generator: torch.Generator | None = None,
    ) -> None:
        self._model, self._condition, self._guidance, self._scheduler = model, condition, guidance, scheduler
        self.timesteps: Tensor = scheduler.timesteps
        # Read once: a value that is on a GPU would be waited for at each step.
        self._levels = (self.timesteps.float() / NUM_TIMESTEPS).tolist()
        # Only some of diffusers' schedulers add noise and take a generator.
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        self._noise_source = {"generator": generator} if takes_generator else {}

    def scale_noise(self, noise: Tensor) -> Tensor:
        """Turn standard normal noise into what the first step begins with; schedulers for flows change nothing."""
        return noise * getattr(self._scheduler, "init_noise_sigma", 1.0)

    @torch.no_grad()
    def step(self, latents: Tensor, index: int) -> Tensor:
        """Take the step `index` of `timesteps`; latents are (batch, channel, height, width)."""
        scheduler, guidance, timestep = self._scheduler, self._guidance, self.timesteps[index]
        noisy = latents
        if hasattr(scheduler, "scale_model_input"):
            noisy = scheduler.scale_model_input(latents, timestep)
        sigma = (timestep.float() / NUM_TIMESTEPS).view(1)
        count = len(guidance.branches)
        # Without guidance the prompt's own branch, which is the last one, is enough.
        if not guidance.applies(self._levels[index]):
            velocity = self._predict(noisy, sigma, self._get_branch(count - 1, len(latents)))
        elif guidance.batch_branches:
            velocity = guidance.combine(self._predict(noisy, sigma, self._condition, count))
        else:
            parts = [self._predict(noisy, sigma, self._get_branch(i, len(latents))) for i in range(count)]
            velocity = guidance.combine(torch.cat(parts))
        return scheduler.step(velocity, timestep, latents, return_dict=False, **self._noise_source)[0]

    def _predict(self, noisy: Tensor, sigma: Tensor, condition: ProjectedCondition, branches: int = 1) -> Tensor:
        return self._model.predict_velocity(noisy, sigma, condition, branches).float()

    def _get_branch(self, index: int, batch: int) -> ProjectedCondition:
        """Rows of one guidance branch; the whole condition where there is only one."""
        if len(self._guidance.branches) == 1:
            return self._condition
        return self._condition[slice(index * batch, (index + 1) * batch)]


@torch.no_grad()
def solve(
    model: UniImage | PredictionGraphs,
    condition: ProjectedCondition,
    guidance: Guidance,
    noise: Tensor,
    num_inference_steps: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Go from noise to latents with the model's own scheduler.

    Args:
        model: as of `FlowSolver`.
        condition: as of `FlowSolver`.
        guidance: as of `FlowSolver`.
        noise: (batch, channel, height, width) of standard normal noise.
        num_inference_steps: solver steps.
        generator: for schedulers that add noise.

    Returns:
        Scaled latents (batch, channel, height, width).
    """
    scheduler = make_scheduler(model.scheduler_config)
    set_timesteps(scheduler, num_inference_steps, noise.device)
    solver = FlowSolver(model, condition, guidance, scheduler, generator)
    latents = solver.scale_noise(noise)
    for index in range(len(solver.timesteps)):
        latents = solver.step(latents, index)
    return latents
