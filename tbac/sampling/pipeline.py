"""UniImagePipeline: makes pictures from prompts and images, and answers questions."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tbac.models import UniImage
from tbac.models.denoiser import ProjectedCondition
from tbac.sampling.guidance import Guidance
from tbac.sampling.solver import solve

Images = Image.Image | Sequence[Image.Image]
OUTPUT_TYPES = ("pil", "pt", "latent")


@dataclass
class UniImageOutput:
    """The result of a call of the pipeline.

    Attributes:
        images: PIL images; or pixels (image, 3, height, width) in [0, 1]; or scaled latents. Images of one prompt
            follow each other.
    """

    images: Any


class UniImagePipeline:
    """Generates and answers with one model.

    Args:
        model: the model, which is put into evaluation mode.
    """

    def __init__(self, model: UniImage) -> None:
        self.model = model.eval()

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str = torch.float32,
        **options: Any,
    ) -> "UniImagePipeline":
        """Load an exported folder; `options` are further arguments of `UniImage.from_pretrained`."""
        return cls(UniImage.from_pretrained(folder, dtype=dtype, **options).to(device))

    def _branch_inputs(
        self, branch: str, prompts: list[str], images: list[list[Image.Image] | None], negatives: list[str]
    ) -> tuple[list[str], list[list[Image.Image] | None]]:
        """Choose the texts and images that a guidance branch reads."""
        if branch == "full":
            return prompts, images
        if branch == "image":
            return negatives, images
        black = [[Image.new("RGB", i.size) for i in group] if group else None for group in images]
        return negatives, black

    @torch.no_grad()
    def encode(
        self,
        prompts: list[str],
        images: list[list[Image.Image] | None],
        negatives: list[str],
        guidance: Guidance,
        size: tuple[int, int] | None = None,
    ) -> ProjectedCondition:
        """Encode the conditions of all guidance branches in one batch: rows (branch * prompt).

        Inputs that are equal, such as one negative prompt for all, are encoded only once.

        Args:
            prompts: one text per picture that is asked for.
            images: input images of each prompt, or None.
            negatives: negative prompt of each prompt.
            guidance: says which branches there are.
            size: (height, width) in pixels of references, for models that read any; None = the model's own size.
        """
        # What each row of the result has to read.
        asked: list[tuple[str, list[Image.Image] | None]] = []
        for branch in guidance.branches:
            asked += zip(*self._branch_inputs(branch, prompts, images, negatives), strict=True)
        # Two rows are equal when they have the same text and the same image objects.
        keys = [(text, tuple(map(id, group or ()))) for text, group in asked]
        order = list(dict.fromkeys(keys))
        distinct = [asked[keys.index(key)] for key in order]
        texts, groups = [text for text, _ in distinct], [group for _, group in distinct]
        inputs = self.model.prompt(texts, groups, reference_size=size)
        condition = self.model.denoiser.project(self.model.encode_condition(inputs.to(self.model.device)))
        # Each row gets the condition of its input.
        rows = [order.index(key) for key in keys]
        if rows == list(range(len(order))):
            return condition
        return condition[torch.tensor(rows, device=self.model.device)]

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        image: Images | Sequence[Images | None] | None = None,
        negative_prompt: str | Sequence[str] = "",
        num_inference_steps: int = 30,
        guidance_scale: float = 4.5,
        image_guidance_scale: float = 1.5,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        height: int | None = None,
        width: int | None = None,
        progress: bool = False,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        batch_branches: bool = True,
    ) -> UniImageOutput:
        """Generate pictures.

        Args:
            prompt: one text or several.
            image: input image(s) to edit: for one prompt an image or a list of images; for several prompts one entry
                per prompt (an image, a list, or None; a batch is either all edits or all text-to-image).
            negative_prompt: what the unconditional branch reads; one for all or one per prompt.
            num_inference_steps: solver steps.
            guidance_scale: text guidance; 1 turns it off for text-to-image.
            image_guidance_scale: image guidance, for edits; 1 or less turns it off.
            num_images_per_prompt: pictures of each prompt.
            generator: source of the starting noise, or one per picture.
            latents: the starting noise itself (prompt * num_images_per_prompt, channel, height, width).
            output_type: `pil`, `pt` or `latent`.
            height: pixels; default: the denoiser's own size.
            width: pixels; default: the denoiser's own size.
            progress: show a progress bar.
            guidance_interval: noise levels (sigma) between which there is guidance; narrower is faster and changes
                the pictures.
            batch_branches: predict all guidance branches in one batch; False takes less memory and more time.

        Raises:
            ValueError: for numbers that don't fit each other or values that aren't accepted, before anything runs.
        """
        # Everything that the user can get wrong is checked before any weight is used.
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        images = group_images(image, len(prompts))
        negatives = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else list(negative_prompt)
        if len(negatives) != len(prompts):
            raise ValueError(f"{len(negatives)} negative prompts for {len(prompts)} prompts")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}; got {output_type!r}")
        if num_inference_steps < 1 or num_images_per_prompt < 1:
            raise ValueError(
                "num_inference_steps and num_images_per_prompt must be at least 1, got "
                f"{num_inference_steps} and {num_images_per_prompt}"
            )
        # Text-to-image has one guidance scale, edits have two, and one batch can't mix them.
        edits = [bool(group) for group in images]
        low, high = guidance_interval
        image_scale = image_guidance_scale if any(edits) else None
        guidance = Guidance(guidance_scale, image_scale, (low, high), batch_branches)
        if any(edits) and not all(edits):
            raise ValueError("a batch is either all edits or all text-to-image: give every prompt an image, or none")
        shape = self._compute_latent_shape(len(prompts) * num_images_per_prompt, height, width)
        noise = self._draw_noise(shape, generator) if latents is None else latents
        if tuple(noise.shape) != shape:
            raise ValueError(f"latents must have shape {shape}, got {tuple(noise.shape)}")

        factor = self.model.autoencoder.compression
        condition = self.encode(prompts, images, negatives, guidance, (shape[2] * factor, shape[3] * factor))
        # Rows (branch, prompt) -> (branch, prompt, picture): each picture keeps the condition of its own prompt.
        if num_images_per_prompt > 1:
            rows = torch.arange(len(guidance.branches) * len(prompts), device=self.model.device)
            condition = condition[rows.repeat_interleave(num_images_per_prompt)]
        # Schedulers that add noise take one generator, so with one per picture they draw from torch's own.
        single = generator if isinstance(generator, torch.Generator) else None
        noise = noise.to(self.model.device)
        solved = solve(self.model, condition, guidance, noise, num_inference_steps, single, progress)
        if output_type == "latent":
            return UniImageOutput(solved)
        pixels = (self.model.autoencoder.decode(solved) + 1) / 2
        return UniImageOutput(pixels if output_type == "pt" else convert_to_pil(pixels))

    def answer(self, question: str, image: Images | None = None, max_new_tokens: int = 64) -> str:
        """Answer a question, about an image or several if given, with the untouched MLLM."""
        return self.model.answer([question], group_images(image, 1), max_new_tokens)[0]

    def _compute_latent_shape(self, count: int, height: int | None, width: int | None) -> tuple[int, int, int, int]:
        config, factor = self.model.denoiser.transformer.config, self.model.autoencoder.compression
        sides, step = [], self.model.size_multiple
        for name, pixels in (("height", height), ("width", width)):
            pixels = config.sample_size * factor if pixels is None else pixels
            if pixels < step or pixels % step:
                raise ValueError(f"{name} must be a positive multiple of {step} pixels, got {pixels}")
            sides.append(pixels // factor)
        return count, config.in_channels, sides[0], sides[1]

    def _draw_noise(
        self, shape: tuple[int, ...], generator: torch.Generator | Sequence[torch.Generator] | None
    ) -> Tensor:
        """Draw standard normal noise in float32, on the generator's device (the CPU without a generator)."""
        if generator is None or isinstance(generator, torch.Generator):
            device = generator.device if generator else "cpu"
            return torch.randn(shape, generator=generator, device=device)
        if len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators for {shape[0]} pictures; give one, or one per picture")
        return torch.stack([torch.randn(shape[1:], generator=g, device=g.device) for g in generator])


def group_images(image: Any, prompts: int) -> list[list[Image.Image] | None]:
    """Group input images as one list (or None) per prompt."""
    if image is None:
        return [None] * prompts
    if isinstance(image, Image.Image):
        image = [image]
    entries = list(image)
    if prompts == 1 and all(isinstance(e, Image.Image) for e in entries):
        return [entries or None]
    if len(entries) != prompts:
        raise ValueError(f"{len(entries)} input images for {prompts} prompts; give one entry per prompt")
    groups: list[list[Image.Image] | None] = []
    for entry in entries:
        if isinstance(entry, Image.Image):
            groups.append([entry])
        else:
            groups.append(list(entry) if entry else None)
    return groups


def convert_to_pil(pixels: Tensor) -> list[Image.Image]:
    """Convert pixels (image, 3, height, width) in [0, 1] to PIL images."""
    arrays = (pixels.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(np.ascontiguousarray(a)) for a in arrays]
