"""Between decoding and collation: condition dropout, and target images to tensors."""

from dataclasses import dataclass, replace
from random import Random

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from tbac.types import Sample


@dataclass(frozen=True)
class ConditionDropout:
    """Drop conditions at random, so that the model learns to be guided.

    At most one of the three happens to a sample. A dropped caption is "", a dropped image is black.

    Args:
        caption_drop_prob: only the caption.
        image_drop_prob: only the input images; for samples without any this one is never drawn.
        both_drop_prob: caption and input images; for samples without any this one is never drawn.

    Raises:
        ValueError: when a probability is outside [0, 1], or their sum above 1.
    """

    caption_drop_prob: float = 0.1
    image_drop_prob: float = 0.0
    both_drop_prob: float = 0.0

    def __post_init__(self) -> None:
        for name in ("caption_drop_prob", "image_drop_prob", "both_drop_prob"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"stage.dropout.{name} must be between 0 and 1, got {value}")
        if (total := self.caption_drop_prob + self.image_drop_prob + self.both_drop_prob) > 1:
            raise ValueError(f"the probabilities of stage.dropout sum to {total}; at most 1 is possible")

    def __call__(self, sample: Sample, rng: Random) -> Sample:
        """The sample with what `rng` says dropped."""
        draw = rng.random()
        caption = draw < self.caption_drop_prob
        image = both = False
        if sample.sources:
            draw -= self.caption_drop_prob
            both = 0 <= draw < self.both_drop_prob
            image = 0 <= draw - self.both_drop_prob < self.image_drop_prob
        text = "" if caption or both else sample.text
        sources = [black_like(i) for i in sample.sources] if image or both else sample.sources
        return replace(sample, text=text, sources=sources)


def black_like(image: Image.Image) -> Image.Image:
    """A black RGB image of the same size: the image condition of unconditional guidance."""
    return Image.new("RGB", image.size)


def crop_to(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """The largest central part of the aspect ratio of `size` (height, width), resized to it.

    Bicubic with antialiasing, as in SANA's trainer: Pillow's filter up to rounding, several times faster.

    Returns:
        (height, width, 3), uint8.
    """
    height, width = size
    scale = min(image.width / width, image.height / height)
    part = min(round(height * scale), image.height), min(round(width * scale), image.width)
    top, left = (image.height - part[0]) // 2, (image.width - part[1]) // 2
    if image.mode != "RGB":
        image = image.convert("RGB")
    pixels = torch.from_numpy(np.asarray(image)[top : top + part[0], left : left + part[1]].copy())
    if part == size:
        return pixels
    resized = functional.interpolate(pixels.permute(2, 0, 1)[None], size, mode="bicubic", antialias=True)[0]
    return resized.permute(1, 2, 0)
