"""Classifier-free guidance with text alone, and with text and image (dual guidance)."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Guidance:
    """How far to move away from what the model does without a condition.

    Args:
        text: weight of the prompt; 1 means no guidance.
        image: weight of the input images, for edits; None for text-to-image.
    """

    text: float
    image: float | None = None

    @property
    def branches(self) -> tuple[str, ...]:
        """The predictions that are needed, in the order that `combine` expects."""
        if self.image is not None:
            return ("uncond", "image", "full")
        return ("full",) if self.text == 1 else ("uncond", "full")

    def combine(self, velocities: Tensor) -> Tensor:
        """One velocity from the branches' velocities.

        Text: `uncond + text * (full - uncond)`. Dual: `uncond + image * (img - uncond) + text * (full - img)`
        (InstructPix2Pix, equation 3).

        Args:
            velocities: (branch * batch, channel, height, width), branches in order.

        Returns:
            (batch, channel, height, width).
        """
        parts = velocities.chunk(len(self.branches))
        if len(parts) == 1:
            return parts[0]
        if len(parts) == 2:
            uncond, full = parts
            return uncond + self.text * (full - uncond)
        assert self.image is not None
        uncond, image, full = parts
        return uncond + self.image * (image - uncond) + self.text * (full - image)
