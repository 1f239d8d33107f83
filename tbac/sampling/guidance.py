"""Classifier-free guidance with text alone, and with text and image (dual guidance)."""

import math
from dataclasses import dataclass
from numbers import Real

from torch import Tensor


@dataclass(frozen=True)
class Guidance:
    """How far to move away from what the model does without a condition.

    Args:
        text: weight of the prompt; 1 means no guidance.
        image: weight of the input images, for edits; None for text-to-image. At 1 and below it is off, as released:
            the image is then in both branches, and only the text is guided.
        interval: lowest and highest noise level (sigma) with guidance (Kynkäänniemi et al. 2024, arXiv 2404.07724).
            At other levels only the prompt's own prediction is used, which is cheaper and changes the picture.
        batch_branches: predict all branches in one batch; False takes less memory and more time.

    Raises:
        ValueError: for a weight that isn't a finite number, and when the interval isn't two ascending noise levels.
    """

    text: float
    image: float | None = None
    interval: tuple[float, float] = (0.0, 1.0)
    batch_branches: bool = True

    def __post_init__(self) -> None:
        for name, weight in (("guidance_scale", self.text), ("image_guidance_scale", self.image)):
            is_number = isinstance(weight, Real) and not isinstance(weight, bool) and math.isfinite(weight)
            if not is_number and not (weight is None and name == "image_guidance_scale"):
                raise ValueError(f"{name} must be a finite number, got {weight!r}")
        low, high = self.interval
        if not 0 <= low < high <= 1:
            raise ValueError(f"guidance_interval must be two noise levels 0 <= low < high <= 1, got {self.interval}")

    @property
    def branches(self) -> tuple[str, ...]:
        """The predictions that are needed, in the order that `combine` expects; the prompt's own comes last."""
        if self.image is not None and self.image > 1:
            return ("uncond", "image", "full")
        if self.text == 1:
            return ("full",)
        return ("uncond", "full") if self.image is None else ("image", "full")

    def applies(self, sigma: float) -> bool:
        """Whether there is guidance at a noise level."""
        return self.interval[0] <= sigma <= self.interval[1]

    def combine(self, velocities: Tensor) -> Tensor:
        """Combine the branches' velocities to one.

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
