"""What the parts of the library hand to each other: samples, batches, conditions and rewards."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

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
        reconstructs: the input image is the target itself, so the denoiser mustn't read its latents as a reference.
    """

    key: str
    text: str
    sources: list[Image.Image] = field(default_factory=list)
    target: Image.Image | None = None
    latents: Tensor | None = None
    origin: str = ""
    reconstructs: bool = False


@dataclass
class Batch:
    """Samples of one training step, collated.

    Attributes:
        prompt: the model's inputs, made of texts and input images: a mapping of tensors.
        keys: `__key__` of each sample.
        pixels: target images (batch, 3, height, width), uint8, or None where latents are given.
        latents: scaled latents (batch, channel, height, width), or None.
        texts: captions after dropout, for logs.
        positions: each sample's number in the sequence of draws, unique within a stage; in validation, within one pass.
        after: state of the training order when all processes have used their batches of this step.
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
        """Return the batch with its tensors on `device`; the prompt decides which of its tensors stay on the CPU."""
        return self._change_tensors(
            lambda tensor: tensor.to(device, non_blocking=non_blocking),
            self.prompt.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory, from which it can be copied to a device without waiting."""
        pinned = {}
        for name, value in self.prompt.items():
            # A tensor that was made by `expand` repeats its rows without storing them, and can't be pinned like that.
            pinned[name] = value.contiguous().pin_memory() if isinstance(value, Tensor) else value
        return self._change_tensors(lambda tensor: tensor.pin_memory(), type(self.prompt)(pinned))

    def _change_tensors(self, change: Callable[[Tensor], Tensor], prompt: Any) -> "Batch":
        pixels = None if self.pixels is None else change(self.pixels)
        latents = None if self.latents is None else change(self.latents)
        return replace(self, prompt=prompt, pixels=pixels, latents=latents)


@dataclass
class Condition:
    """One cross-attention context per denoiser block.

    Attributes:
        states: (tap, batch, query, channel); entry i is the context of block i. With `ladder.prompt_context` the tokens
            of the prompt follow the queries.
        mask: (batch, query), 1 where a query takes part, or None when all do.
        reference: scaled latents (batch, channel, height, width) of the input images, 0 where there is none; or None.
    """

    states: Tensor
    mask: Tensor | None = None
    reference: Tensor | None = None

    def __getitem__(self, rows: Any) -> "Condition":
        """Return the condition of some rows of the batch."""
        mask = None if self.mask is None else self.mask[rows]
        reference = None if self.reference is None else self.reference[rows]
        return Condition(self.states[:, rows], mask, reference)

    @staticmethod
    def cat(conditions: list["Condition"]) -> "Condition":
        """Join conditions along the batch."""
        joined: dict[str, Tensor | None] = {}
        for name in ("mask", "reference"):
            parts = [getattr(condition, name) for condition in conditions]
            parts = [part for part in parts if part is not None]
            if parts and len(parts) != len(conditions):
                raise ValueError(f"either all conditions carry a {name} or none does")
            joined[name] = torch.cat(parts) if parts else None
        states = torch.cat([condition.states for condition in conditions], dim=1)
        return Condition(states, **joined)


@dataclass(frozen=True)
class PicturePrompt:
    """What a picture is asked for with.

    Attributes:
        text: caption or edit instruction.
        images: files of the input images, for edits.
    """

    text: str
    images: tuple[Path, ...] = ()


class RewardError(RuntimeError):
    """A reward can't be told for the moment, such as while an endpoint doesn't answer; it may be asked again."""


class Reward(Protocol):
    """Says how good pictures are; `tbac/evaluation/rewards.py` has some."""

    def list_prompts(self) -> Sequence[PicturePrompt] | None:
        """List the only prompts whose pictures it can score; None when it can score those of any prompt."""
        ...

    def score(self, prompts: Sequence[PicturePrompt], pictures: Sequence[Image.Image]) -> Sequence[float | None]:
        """Score pictures, the higher the better; None for a picture that no score can be had for.

        Args:
            prompts: one of each picture.
            pictures: in RGB.

        Raises:
            RewardError: when it may be asked again later.
            ValueError: when asking again would bring nothing else.
        """
        ...
