"""Parts of a model that are on the device only while they run."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import cpu_offload_with_hook
from torch import nn


class PartOffload:
    """Keeps parts on the CPU; one that runs is moved to the device, and the one that ran before it back.

    Args:
        parts: in the order in which they run.
        device: where they run.
    """

    def __init__(self, parts: Sequence[nn.Module], device: torch.device) -> None:
        self.hooks: list[Any] = []
        for part in parts:
            previous = self.hooks[-1] if self.hooks else None
            self.hooks.append(cpu_offload_with_hook(part, device, previous)[1])

    def free(self) -> None:
        """Move the part that ran last back to the CPU."""
        for hook in self.hooks:
            hook.offload()

    def remove(self) -> None:
        """End offloading; the parts stay where they are."""
        for hook in self.hooks:
            hook.remove()
