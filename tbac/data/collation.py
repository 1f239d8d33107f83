"""Samples to a `Batch`, through the model's own prompt code."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import default_collate as join  # in a worker, straight into the memory that it shares

from tbac.data.shards import DataError
from tbac.data.transforms import crop_to
from tbac.types import Batch, Sample

PromptCode = Callable[..., Any]  # texts, images, reference_size=(height, width) -> model inputs


class Collator:
    """Joins samples.

    Args:
        prompt: the model's prompt code: texts and input images -> model inputs.
    """

    def __init__(self, prompt: PromptCode) -> None:
        self.prompt = prompt

    def __call__(self, samples: Sequence[Sample], size: tuple[int, int]) -> Batch:
        """Collate; latents are used when every sample has them.

        Args:
            samples: of the batch.
            size: (height, width) of target images in pixels.

        Raises:
            DataError: when some samples have cached latents and others only images, or their latents differ in shape.
        """
        texts = [s.text for s in samples]
        inputs = self.prompt(texts, [s.sources or None for s in samples], reference_size=size)
        batch = Batch(prompt=inputs, keys=[s.key for s in samples], texts=texts)
        if all(s.latents is not None for s in samples):
            latents = [s.latents for s in samples if s.latents is not None]
            if len(shapes := {tuple(one.shape) for one in latents}) > 1:
                raise DataError(
                    f"sample {samples[0].key} of {samples[0].origin} and others of its batch have cached latents of "
                    f"the shapes {sorted(shapes)}; give the buckets that they were cached with as data.buckets"
                )
            batch.latents = torch.stack(latents)
        elif missing := [s for s in samples if s.target is None]:
            raise DataError(
                f"sample {missing[0].key} of {missing[0].origin} has cached latents and no image, but others of the "
                "same batch have no latents; cache latents for every source of the mixture"
            )
        else:
            batch.pixels = join([crop_to(s.target, size) for s in samples if s.target is not None]).permute(0, 3, 1, 2)
        return batch
