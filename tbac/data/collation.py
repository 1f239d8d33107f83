"""Joins samples into a `Batch`, with the prompt code of the model that will train."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import default_collate as join  # in a worker, straight into the memory that it shares

from tbac.data.shards import DataError
from tbac.data.transforms import crop_to
from tbac.types import Batch, Sample

PromptCode = Callable[..., Any]  # texts, images, reference_size=(height, width) -> model inputs


class Collator:
    """Joins samples into a batch.

    Args:
        prompt: the model's prompt code, which turns texts and input images into model inputs.
    """

    def __init__(self, prompt: PromptCode) -> None:
        self.prompt = prompt

    def __call__(self, samples: Sequence[Sample], size: tuple[int, int]) -> Batch:
        """Join samples into a batch, which holds latents when every sample has them, and pixels otherwise.

        Args:
            samples: of the batch.
            size: (height, width) of target images in pixels.

        Raises:
            DataError: when some samples have cached latents and others only images, or their latents differ in shape.
        """
        texts = [s.text for s in samples]
        inputs = self.prompt(texts, [s.sources or None for s in samples], reference_size=size)
        # A picture that is to be reconstructed is seen by the MLLM alone: its latents would give it away.
        if "has_reference" in inputs:
            given = [not s.reconstructs for s in samples]
            inputs["has_reference"] = inputs["has_reference"] * torch.tensor(given, dtype=inputs["has_reference"].dtype)
        batch = Batch(prompt=inputs, keys=[s.key for s in samples], texts=texts)
        # Latents of several shapes come from other buckets than those of this training.
        latents = [s.latents for s in samples if s.latents is not None]
        if len(latents) == len(samples):
            shapes = {tuple(sample_latents.shape) for sample_latents in latents}
            if len(shapes) > 1:
                raise DataError(
                    f"sample {samples[0].key} of {samples[0].origin} and others of its batch have cached latents of "
                    f"the shapes {sorted(shapes)}; give the buckets that they were cached with as data.buckets"
                )
            batch.latents = torch.stack(latents)
            return batch
        # A mixed batch can only be trained on as pixels, so each of its samples needs its image.
        without_image = [s for s in samples if s.target is None]
        if without_image:
            raise DataError(
                f"sample {without_image[0].key} of {without_image[0].origin} has cached latents and no image, but "
                "others of the same batch have no latents; cache latents for every source of the mixture"
            )
        targets = [crop_to(s.target, size) for s in samples if s.target is not None]
        batch.pixels = join(targets).permute(0, 3, 1, 2)
        return batch
