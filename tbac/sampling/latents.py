"""The latents of a call: their shape, the noise that they begin as, and the pictures that they become."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tbac.models import UniImage
from tbac.models.autoencoder import FrozenAutoencoder
from tbac.sampling.arguments import check_finite, is_count


def compute_latent_shape(
    model: UniImage, count: int, height: int | None, width: int | None
) -> tuple[int, int, int, int]:
    """Compute the shape (picture, channel, height, width) of the latents of pictures of a size in pixels.

    Args:
        model: that draws them; None for height or width is its own size.
        count: how many pictures.
        height: pixels.
        width: pixels.

    Raises:
        ValueError: for a side that isn't a multiple of what the model can draw.
    """
    config, factor = model.denoiser.transformer.config, model.autoencoder.compression
    sides, step = [], model.size_multiple
    for name, pixels in (("height", height), ("width", width)):
        pixels = config.sample_size * factor if pixels is None else pixels
        if not is_count(pixels) or pixels < step or pixels % step:
            raise ValueError(f"{name} must be a positive multiple of {step} pixels, got {pixels}")
        sides.append(pixels // factor)
    return count, config.in_channels, sides[0], sides[1]


def draw_noise(shape: tuple[int, ...], generator: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
    """Draw standard normal noise in float32, on the generator's device (the CPU without a generator)."""
    if generator is None or isinstance(generator, torch.Generator):
        device = generator.device if generator else "cpu"
        return torch.randn(shape, generator=generator, device=device)
    if len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} generators for {shape[0]} pictures; give one, or one per picture")
    return torch.stack([torch.randn(shape[1:], generator=g, device=g.device) for g in generator])


def check_noise(noise: Any, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless it is a tensor of this shape and of finite numbers."""
    if not isinstance(noise, Tensor):
        raise ValueError(f"latents must be a tensor, got {type(noise).__name__}")
    if tuple(noise.shape) != shape:
        raise ValueError(f"latents must have shape {shape}, got {tuple(noise.shape)}")
    check_finite("latents", noise)


def convert_output(autoencoder: FrozenAutoencoder, latents: Tensor, output_type: str) -> Any:
    """Convert scaled latents to what was asked for: `pil`, `np`, `pt` or `latent`."""
    if output_type == "latent":
        return latents
    pixels = (autoencoder.decode(latents) + 1) / 2
    if output_type == "pt":
        return pixels
    if output_type == "np":
        return pixels.float().permute(0, 2, 3, 1).cpu().numpy()
    return convert_to_pil(pixels)


def convert_to_pil(pixels: Tensor) -> list[Image.Image]:
    """Convert pixels (image, 3, height, width) in [0, 1] to PIL images."""
    arrays = (pixels.float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(np.ascontiguousarray(a)) for a in arrays]
