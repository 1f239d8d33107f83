"""Samples to a `Batch`, through the model's own prompt code."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image

from tbac.data.transforms import to_pixels, to_square
from tbac.types import Batch, Sample

PromptCode = Callable[[list[str], list[list[Image.Image] | None]], Any]


class Collator:
    """Joins samples.

    Args:
        prompt: the model's prompt code: texts and input images -> model inputs.
        image_size: pixels a side of target images.
    """

    def __init__(self, prompt: PromptCode, image_size: int) -> None:
        self.prompt = prompt
        self.image_size = image_size

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Collate; latents are used when every sample has them.

        Raises:
            ValueError: when some samples have cached latents and others only images.
        """
        texts = [s.text for s in samples]
        inputs = self.prompt(texts, [s.sources or None for s in samples])
        batch = Batch(prompt=inputs, keys=[s.key for s in samples], texts=texts)
        if all(s.latents is not None for s in samples):
            batch.latents = torch.stack([s.latents for s in samples if s.latents is not None])
        elif missing := [s for s in samples if s.target is None]:
            raise ValueError(
                f"sample {missing[0].key} of {missing[0].origin} has cached latents and no image, but others of the "
                "same batch have no latents; cache latents for every source of the mixture"
            )
        else:
            batch.pixels = torch.stack(
                [to_pixels(to_square(s.target, self.image_size)) for s in samples if s.target is not None]
            )
        return batch
