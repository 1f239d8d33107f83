"""Policies beside the one that trains: other values for the weights that a stage trains."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from tbac.distributed import gather_parts, get_local_part, hold_gathered, shard_like
from tbac.files import ForeignFileError
from tbac.training.module import LadderTuningModule


class Policy:
    """A copy of all weights that train. Where the denoiser has adapters, these alone are copied of it.

    Each process holds the copy of its own shards.

    Args:
        module: whose present weights are copied.
    """

    def __init__(self, module: LadderTuningModule) -> None:
        self.weights = [get_local_part(parameter.detach()).clone() for _, parameter in module.list_trained()]

    @contextmanager
    def act(self, module: LadderTuningModule) -> Iterator[None]:
        """Within the block, the module has this policy's weights, and nothing gets a gradient.

        Every process must enter and leave the block.
        """
        self._swap(module)
        try:
            # Shards that were gathered before the swap would be stale after it.
            with torch.no_grad(), hold_gathered(module):
                yield
        finally:
            self._swap(module)

    def _swap(self, module: LadderTuningModule) -> None:
        """Exchange the copy and the module's weights."""
        for own, (_, parameter) in zip(self.weights, module.list_trained(), strict=True):
            current = get_local_part(parameter.data)
            copy_of_current = current.clone()
            current.copy_(own)
            own.copy_(copy_of_current)
        torch.clear_autocast_cache()  # it holds copies of the weights of before in another type

    def approach(self, module: LadderTuningModule, keep: float) -> None:
        """Move towards the module's weights: `keep` of the old values, and 1 - `keep` of the module's."""
        for own, (_, parameter) in zip(self.weights, module.list_trained(), strict=True):
            own.lerp_(get_local_part(parameter.detach()), 1 - keep)

    def collect(self, module: LadderTuningModule) -> dict[str, Tensor]:
        """Collect the whole weights by name, on every process."""
        pairs = zip(self.weights, module.list_trained(), strict=True)
        return {name: gather_parts(parameter.detach(), own) for own, (name, parameter) in pairs}

    def load(self, module: LadderTuningModule, weights: Mapping[str, Tensor], place: str) -> None:
        """Take the weights that `collect` returned.

        Args:
            module: which part of a tensor this process holds is the same as of the module's.
            weights: by name.
            place: where they come from, for messages.

        Raises:
            ForeignFileError: naming tensors that are missing, too many, or of another shape.
        """
        trained = dict(module.list_trained())
        wrong = sorted(weights.keys() ^ trained.keys())
        wrong += [name for name in trained if name in weights and weights[name].shape != trained[name].shape]
        if wrong:
            raise ForeignFileError(f"{place} doesn't fit what this stage trains, such as {wrong[0]}")
        for own, (name, parameter) in zip(self.weights, trained.items(), strict=True):
            own.copy_(get_local_part(shard_like(parameter, weights[name])))
