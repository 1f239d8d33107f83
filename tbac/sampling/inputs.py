"""Input images in the forms that users of diffusers give them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tbac.pictures import open_picture, to_upright_rgb

SingleImage = Image.Image | np.ndarray | Tensor | str | Path
ImageInput = SingleImage | Sequence[SingleImage]
SINGLE = (Image.Image, np.ndarray, Tensor, str, Path)


def group_images(image: Any, prompts: int) -> list[list[Image.Image] | None]:
    """Group input images as one list (or None) per prompt.

    Args:
        image: None; one image; for one prompt a list of images; for several prompts one entry per prompt, which is an
            image, a list of images, or None. An array or tensor with one more dimension is a list of images.
        prompts: number of prompts.

    Raises:
        ValueError: when the numbers don't fit, or an entry isn't an image.
    """
    if image is None:
        return [None] * prompts
    entries = _list_entries(image)
    if prompts == 1 and entries and all(isinstance(entry, SINGLE) for entry in entries):
        return [[read_image(entry) for entry in entries]]
    if prompts == 1 and not entries:
        return [None]
    if len(entries) != prompts:
        raise ValueError(f"{len(entries)} input images for {prompts} prompts; give one entry per prompt")
    groups: list[list[Image.Image] | None] = []
    for entry in entries:
        images = [] if entry is None else [read_image(one) for one in _list_entries(entry)]
        groups.append(images or None)
    return groups


def _list_entries(image: Any) -> list[Any]:
    """One image as a list of one; a stack of images as a list."""
    if isinstance(image, np.ndarray | Tensor) and image.ndim == 4:
        return list(image)
    return list(image) if isinstance(image, list | tuple) else [image]


def read_image(image: Any) -> Image.Image:
    """Convert an image to PIL, upright and RGB, as `tbac.pictures` does everywhere.

    Args:
        image: a PIL image; a path; an array (height, width, 3) or a tensor (3, height,
            width), of bytes or of numbers in [0, 1].

    Raises:
        ValueError: when it is something else, has another shape, or the file can't be read.
    """
    if isinstance(image, Image.Image):
        return to_upright_rgb(image)
    if isinstance(image, str | Path):
        return open_picture(image, f"image {image}")
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        image = image.numpy() if image.dtype == torch.uint8 else image.float().numpy()
        image = image.transpose(1, 2, 0) if image.ndim == 3 else image
    if not isinstance(image, np.ndarray) or image.ndim != 3 or image.shape[2] != 3:
        found = f"shape {image.shape}" if isinstance(image, np.ndarray) else f"{type(image).__name__} {image!r:.40}"
        raise ValueError(
            f"an input image must be a PIL image, a path, an array (height, width, 3) or a tensor (3, height, width); "
            f"got {found}"
        )
    if image.dtype == np.uint8:
        return Image.fromarray(np.ascontiguousarray(image))
    if not np.isfinite(image).all() or image.min() < 0 or image.max() > 1:
        raise ValueError(f"an input image of numbers must lie in [0, 1]; got {image.min():.3g} to {image.max():.3g}")
    return Image.fromarray((image * 255).round().astype(np.uint8))
