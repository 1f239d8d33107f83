"""What travels between the rooms of the library: samples, batches and conditions."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor


@dataclass
class Sample:
    """One training example, decoded.

    Attributes:
        key: name of the sample in its shard (`__key__`).
        text: caption or edit instruction.
        sources: input images (empty for text-to-image).
        target: image to generate; None where only its latents are stored.
        latents: scaled latents of the target (channel, height, width), where the shard holds them.
        origin: path of the shard that it came from.
    """

    key: str
    text: str
    sources: list[Image.Image] = field(default_factory=list)
    target: Image.Image | None = None
    latents: Tensor | None = None
    origin: str = ""


@dataclass
class Batch:
    """Samples of one training step, collated.

    Attributes:
        prompt: what the model's prompt code made of texts and input images: a mapping of tensors.
        keys: `__key__` of each sample.
        pixels: target images (batch, 3, height, width), uint8, or None where latents are given.
        latents: scaled latents (batch, channel, height, width), or None.
        texts: captions after dropout, for logs.
        positions: numbers of the draws that gave the samples, unique within a stage; in validation, within the pass.
        after: state of the training order once all processes have used their batches of this step.
    """

    prompt: Any
    keys: list[str]
    pixels: Tensor | None = None
    latents: Tensor | None = None
    texts: list[str] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    after: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same batch with its tensors on `device`; the prompt says itself which of its own stay."""
        return self._each(
            lambda tensor: tensor.to(device, non_blocking=non_blocking),
            self.prompt.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, from which copies to the device don't wait."""
        # Page-locked memory is written as it lies, so a tensor that repeats its rows has to hold them first.
        pinned = {k: v.contiguous().pin_memory() if isinstance(v, Tensor) else v for k, v in self.prompt.items()}
        return self._each(lambda tensor: tensor.pin_memory(), type(self.prompt)(pinned))

    def _each(self, change: Callable[[Tensor], Tensor], prompt: Any) -> "Batch":
        pixels, latents = (None if t is None else change(t) for t in (self.pixels, self.latents))
        return replace(self, prompt=prompt, pixels=pixels, latents=latents)


@dataclass
class Condition:
    """One cross-attention context per denoiser block.

    Attributes:
        states: (tap, batch, query, channel); entry i is the context of block i. Where the prompt's own states are part
            of the context, its tokens follow the queries.
        mask: (batch, query), 1 where a query takes part, or None when all do.
        reference: scaled latents (batch, channel, height, width) of the input images, 0 where there is none; or None.
    """

    states: Tensor
    mask: Tensor | None = None
    reference: Tensor | None = None

    def __getitem__(self, rows: Any) -> "Condition":
        """The condition of some rows of the batch."""
        mask, reference = (None if t is None else t[rows] for t in (self.mask, self.reference))
        return Condition(self.states[:, rows], mask, reference)

    @staticmethod
    def cat(conditions: list["Condition"]) -> "Condition":
        """Join conditions along the batch."""
        joined: dict[str, Tensor | None] = {}
        for name in ("mask", "reference"):
            parts = [getattr(c, name) for c in conditions if getattr(c, name) is not None]
            if parts and len(parts) != len(conditions):
                raise ValueError(f"either all conditions carry a {name} or none does")
            joined[name] = torch.cat(parts) if parts else None
        return Condition(torch.cat([c.states for c in conditions], dim=1), **joined)
