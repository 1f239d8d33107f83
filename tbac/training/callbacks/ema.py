"""An exponential moving average of the trained weights; what a stage doesn't train is its own average.

The arithmetic is torch's. The callback is written here because Lightning's (`WeightAveraging`) copies the whole module,
and by its own account does not work where it is sharded; this one keeps the average of the shards that a process holds.
"""

import logging
import math
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from tbac.distributed import find_max_over_ranks, gather_parts, get_local_part, shard_like
from tbac.training.module import LadderTuningModule

log = logging.getLogger(__name__)
CURRENT = "current_model_state"
LARGEST = 100.0  # an average with a value above this multiple of the largest weight is broken


class EMA(L.Callback):
    """Keeps the average; validation and checkpoints' `state_dict` use it, `current_model_state` is what trains.

    The first step's weights are taken as they are. A rejected step leaves the average untouched. Before the average is
    used or saved it is looked at: one that isn't finite, or is far larger than the weights, starts anew from them.

    Args:
        decay: share of the old average that a step keeps.
    """

    def __init__(self, decay: float = 0.9999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"stage.ema_decay must be in [0, 1), got {decay}")
        self.decay = decay
        self.average: list[Tensor] = []
        self.updates = 0
        self._current: dict[str, Tensor] | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the average from the model's weights, and then load the weights that train from the checkpoint."""
        self.average = [get_local_part(p.detach()).clone() for _, p in _list_trained(pl_module)]
        if self._current is not None:
            for name, parameter in pl_module.named_parameters():
                get_local_part(parameter.data).copy_(get_local_part(shard_like(parameter, self._current[name])))
            self._current = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, LadderTuningModule)
        if not pl_module.stepped:
            return
        current = [get_local_part(p.detach()) for _, p in pl_module.list_trained()]
        update = get_ema_multi_avg_fn(self.decay if self.updates else 0.0)
        update(self.average, current, self.updates)
        self.updates += 1

    def restart_if_broken(self, pl_module: L.LightningModule) -> None:
        """Start the average anew from the weights if it can't be an average of them."""
        weights = [get_local_part(p.detach()) for _, p in _list_trained(pl_module)]
        broken = []
        for (name, _), average, weight in zip(_list_trained(pl_module), self.average, weights, strict=True):
            largest = weight.abs().max() if weight.numel() else weight.new_zeros(())  # a process may hold no part of it
            limit = LARGEST * (1.0 + largest.nan_to_num(nan=math.inf))
            broken.append((name, ~(average.abs() <= limit).all()))
        flags = torch.stack([flag for _, flag in broken])
        if not find_max_over_ranks(int(flags.any()), pl_module.device):
            return
        names = [name for (name, _), flag in zip(broken, flags.tolist(), strict=True) if flag]
        log.error("the weight average is broken in %s; it starts anew from the weights", ", ".join(names[:5]))
        for average, weight in zip(self.average, weights, strict=True):
            average.copy_(weight)

    def swap(self, pl_module: L.LightningModule) -> None:
        """Exchange average and current weights."""
        for average, (_, parameter) in zip(self.average, _list_trained(pl_module), strict=True):
            current = get_local_part(parameter.data)
            copy_of_current = current.clone()
            current.copy_(average)
            average.copy_(copy_of_current)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.average:
            self.restart_if_broken(pl_module)
            self.swap(pl_module)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.average:
            self.swap(pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the average in the model."""
        if self.average:
            self.restart_if_broken(pl_module)
            self.swap(pl_module)
            self.average = []

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.updates = state_dict["updates"]

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if not self.average:
            return
        self.restart_if_broken(pl_module)
        checkpoint[CURRENT] = checkpoint["state_dict"]
        averaged = {
            name: gather_parts(parameter.detach(), average)
            for (name, parameter), average in zip(_list_trained(pl_module), self.average, strict=True)
        }
        checkpoint["state_dict"] = checkpoint[CURRENT] | averaged

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._current = checkpoint.get(CURRENT)


def _list_trained(pl_module: L.LightningModule) -> list[tuple[str, nn.Parameter]]:
    assert isinstance(pl_module, LadderTuningModule)
    return pl_module.list_trained()
