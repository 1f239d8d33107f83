"""Groups of pictures, one for each prompt, that a policy draws in a training step.

Which prompt a place in the sequence of draws has, and from which noise each picture starts, follow from seed, stage and
that place alone: not from the number of processes, and not from what was drawn before.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from PIL import Image
from torch import Tensor

from tbac.models import UniImage
from tbac.models.prompt import PromptInputs
from tbac.pictures import open_picture
from tbac.sampling.guidance import Guidance
from tbac.sampling.latents import convert_output
from tbac.sampling.solver import FlowSolver, check_flow_scheduler, make_scheduler, set_timesteps
from tbac.training.randomness import draw_noise
from tbac.types import Batch, PicturePrompt

NO_GUIDANCE = Guidance(text=1.0)


@dataclass(frozen=True)
class DrawingOptions:
    """How groups are drawn: without guidance, in few steps.

    Args:
        group_size: pictures of each prompt.
        num_inference_steps: solver steps.
        scheduler: config of a scheduler of diffusers for flows, such as `{_class_name: FlowMatchEulerDiscreteScheduler,
            shift: 3.0}`; None is the base model's own.

    Raises:
        ValueError: naming the field and its value.
    """

    group_size: int = 24
    num_inference_steps: int = 10
    scheduler: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise ValueError(
                "stage.reinforce.drawing.group_size must be at least 2, since pictures are compared; got "
                f"{self.group_size}"
            )
        if self.num_inference_steps < 1:
            raise ValueError(
                f"stage.reinforce.drawing.num_inference_steps must be at least 1, got {self.num_inference_steps}"
            )
        if self.scheduler is not None:
            check_flow_scheduler(make_scheduler(dict(self.scheduler)))


class PromptOrder:
    """Goes through prompts without end, each pass in another order.

    Args:
        prompts: at least one.
        seed: decides the orders.
    """

    def __init__(self, prompts: Sequence[PicturePrompt], seed: int) -> None:
        self.prompts, self.seed = list(prompts), seed
        self._order: tuple[int, list[int]] = (-1, [])  # number of a pass, and its order

    def find(self, position: int) -> PicturePrompt:
        """Find the prompt of a place in the sequence of draws, counted from 0."""
        number, place = divmod(position, len(self.prompts))
        if self._order[0] != number:
            order = list(range(len(self.prompts)))
            Random(f"prompts/{self.seed}/{number}").shuffle(order)
            self._order = number, order
        return self.prompts[self._order[1][place]]


@dataclass(frozen=True)
class Asked:
    """The prompts of a training step.

    Attributes:
        prompts: of the groups.
        inputs: the same, as the model reads them, on its device.
        names: of the groups, from which their noise follows.
        shape: (channel, height, width) of the latents of a picture.
    """

    prompts: Sequence[PicturePrompt]
    inputs: PromptInputs
    names: Sequence[str]
    shape: tuple[int, int, int]


@dataclass(frozen=True)
class Groups:
    """Pictures that were drawn.

    Attributes:
        latents: (group * picture, channel, height, width), the pictures of a group next to each other.
        pictures: the same, decoded.
        names: of the pictures, from which further noise follows.
    """

    latents: Tensor
    pictures: Sequence[Image.Image]
    names: Sequence[str]


def choose_prompts(model: UniImage, batch: Batch, order: PromptOrder | None, prefix: str) -> Asked:
    """Choose the prompts of a training step.

    Args:
        model: reads them.
        batch: says which places in the sequence of draws this process has, and the size of pictures.
        order: of the prompts; None takes those of the batch.
        prefix: what the names of all groups begin with.
    """
    target = batch.latents if batch.latents is not None else batch.pixels
    assert target is not None
    factor = model.autoencoder.compression
    height, width = (side if batch.latents is not None else side // factor for side in target.shape[-2:])
    if order is None:
        prompts, inputs = [PicturePrompt(text) for text in batch.texts], batch.prompt
    else:
        prompts = [order.find(position) for position in batch.positions]
        images = [[open_picture(path) for path in prompt.images] or None for prompt in prompts]
        size = (height * factor, width * factor)
        inputs = model.prompt([prompt.text for prompt in prompts], images, reference_size=size).to(model.device)
    names = [f"{prefix}/{position}" for position in batch.positions]
    return Asked(prompts, inputs, names, (model.latent_channels, height, width))


def draw_groups(model: UniImage, asked: Asked, options: DrawingOptions) -> Groups:
    """Draw the pictures of each prompt with the weights that the model has now."""
    names = [f"{name}/{number}" for name in asked.names for number in range(options.group_size)]
    # Each picture begins with noise of its own.
    blank = model.ladder.queries.new_zeros((1, *asked.shape)).float()
    noise, _ = draw_noise([f"{name}/start" for name in names], blank)
    # All pictures of a prompt share its condition.
    rows = list_rows(len(asked.prompts), options.group_size)
    condition = model.denoiser.project(model.encode_condition(asked.inputs)[rows])
    scheduler = make_scheduler(dict(options.scheduler or model.scheduler_config))
    set_timesteps(scheduler, options.num_inference_steps, noise.device)
    solver = FlowSolver(model, condition, NO_GUIDANCE, scheduler)
    latents = solver.scale_noise(noise)
    for index in range(len(solver.timesteps)):
        latents = solver.step(latents, index)
    pictures = convert_output(model.autoencoder, latents, "pil")
    return Groups(latents.float(), pictures, names)


def list_rows(groups: int, group_size: int) -> list[int]:
    """List which group each picture belongs to."""
    return [row for row in range(groups) for _ in range(group_size)]
