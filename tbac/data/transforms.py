"""What happens to a sample between decoding and collation: condition dropout, and cropping the target."""

from dataclasses import dataclass, replace
from random import Random

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from tbac.pictures import to_upright_rgb
from tbac.types import Sample


@dataclass(frozen=True)
class ConditionDropout:
    """Drops conditions at random, so that the model also learns to predict without them, as guidance needs.

    At most one of the three happens to a sample. A dropped caption becomes "", a dropped image becomes black.

    Args:
        caption_drop_prob: probability that only the caption is dropped.
        image_drop_prob: that only the input images are dropped; 0 for samples without any.
        both_drop_prob: that caption and input images are dropped; 0 for samples without input images.

    Raises:
        ValueError: when a probability is outside [0, 1], or their sum above 1.
    """

    caption_drop_prob: float = 0.1
    image_drop_prob: float = 0.0
    both_drop_prob: float = 0.0

    def __post_init__(self) -> None:
        for name in ("caption_drop_prob", "image_drop_prob", "both_drop_prob"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"stage.dropout.{name} must be between 0 and 1, got {value}")
        total = self.caption_drop_prob + self.image_drop_prob + self.both_drop_prob
        if total > 1:
            raise ValueError(f"the probabilities of stage.dropout sum to {total}; at most 1 is possible")

    def __call__(self, sample: Sample, rng: Random) -> Sample:
        """Return the sample after dropout; one number of `rng` decides which of the three happens."""
        draw = rng.random()
        caption = draw < self.caption_drop_prob
        image = both = False
        if sample.sources:
            draw -= self.caption_drop_prob
            both = 0 <= draw < self.both_drop_prob
            image = 0 <= draw - self.both_drop_prob < self.image_drop_prob
        return drop_conditions(sample, caption or both, image or both)

    def list_outcomes(self, sample: Sample) -> list[Sample]:
        """List what a sample may become: itself, and what it is without its caption, its input images, or both."""
        chances = {(True, False): self.caption_drop_prob}
        if sample.sources:
            chances |= {(False, True): self.image_drop_prob, (True, True): self.both_drop_prob}
        return [sample, *(drop_conditions(sample, *dropped) for dropped, chance in chances.items() if chance)]


def drop_conditions(sample: Sample, caption: bool, images: bool) -> Sample:
    """Return the sample with its caption empty, or its input images black, or both."""
    text = "" if caption else sample.text
    sources = sample.sources
    if images:
        sources = [make_black_image(source.size) for source in sources]
    return replace(sample, text=text, sources=sources)


def make_black_image(size: tuple[int, int]) -> Image.Image:
    """Make the black RGB image of a (width, height) that stands for "no input image" in guidance."""
    return Image.new("RGB", size)


def crop_part(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Crop the largest central part of a picture that has the aspect ratio of `size` (height, width)."""
    height, width = size
    scale = min(image.width / width, image.height / height)
    rows, columns = min(round(height * scale), image.height), min(round(width * scale), image.width)
    top, left = (image.height - rows) // 2, (image.width - columns) // 2
    return image.crop((left, top, left + columns, top + rows))


def crop_to(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """Crop the largest central part that has the aspect ratio of `size` (height, width), and resize it to `size`.

    Resizing is bicubic with antialiasing, as in SANA's trainer. torch gives what Pillow gives, up to rounding, several
    times faster.

    Returns:
        (height, width, 3), uint8.
    """
    image = crop_part(to_upright_rgb(image), size)
    pixels = torch.from_numpy(np.asarray(image).copy())
    if (image.height, image.width) == size:
        return pixels
    resized = functional.interpolate(pixels.permute(2, 0, 1)[None], size, mode="bicubic", antialias=True)[0]
    return resized.permute(1, 2, 0)
