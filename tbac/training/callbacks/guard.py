"""The guard judges the gradient norm and the loss of each optimizer step before the step is taken."""

import logging
import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from tbac.distributed import average_over_ranks, gather_objects, get_local_part
from tbac.training.callbacks.ema import EMA
from tbac.training.gradients import GradientNorms, are_finite
from tbac.training.module import LadderTuningModule
from tbac.training.spikes import KEPT, SpikeRule
from tbac.types import Batch

log = logging.getLogger(__name__)
VAL_RATIO = 3.0  # a validation loss above this multiple of the usual one is reported


class DivergedError(ValueError):
    """Training was stopped because too many steps were rejected."""


class Guard(L.Callback):
    """Rejects steps that a rule calls spikes; every process comes to the same decision.

    The norm is that of the gradients as the optimizer would see them: after accumulation and averaging over processes,
    before clipping. The loss is the mean over micro-batches and processes. A rejected step changes nothing but the
    position in the data: weights, moments, step counts, schedule and weight average stay as they are.

    Args:
        rule: tells spikes from ordinary steps.
        patience: number of rejected steps in a row after which `then` is done.
        then: `skip` only goes on; `lower_lr` multiplies the learning rate by `lr_factor`; `rewind` restores weights and
            optimizer of the newest checkpoint and goes on with the data after the spike. For this a copy of both is
            held in CPU memory: 12 bytes per trained parameter, and 4 more for the weight average.
        lr_factor: factor of the learning rate with `then=lower_lr`.
        max_rejects: training stops when this many of the last `over` steps were rejected.
        over: number of steps that `max_rejects` looks back on.
        log_every: optimizer steps between logs of the norms of all components.

    Raises:
        ValueError: for values outside of their range.
    """

    def __init__(
        self,
        rule: SpikeRule,
        patience: int = 5,
        then: Literal["skip", "lower_lr", "rewind"] = "rewind",
        lr_factor: float = 0.5,
        max_rejects: int = 50,
        over: int = 1000,
        log_every: int = 25,
    ) -> None:
        # The rule may be the user's own, so it is checked before training and not at the first spike.
        needed = ("judge", "reset", "state_dict", "load_state_dict")
        missing = [name for name in needed if not callable(getattr(rule, name, None))]
        if missing:
            raise ValueError(f"guard: {type(rule).__name__} isn't a spike rule, it has no {', '.join(missing)}")
        if then not in ("skip", "lower_lr", "rewind"):
            raise ValueError(f"callbacks.guard.then must be skip, lower_lr or rewind, got {then!r}")
        for name, value in (("patience", patience), ("max_rejects", max_rejects), ("log_every", log_every)):
            if value < 1:
                raise ValueError(f"callbacks.guard.{name} must be at least 1, got {value}")
        if not 0 < lr_factor < 1:
            raise ValueError(f"callbacks.guard.lr_factor must be between 0 and 1, got {lr_factor}")
        self.rule, self.patience, self.then, self.lr_factor = rule, patience, then, lr_factor
        self.max_rejects, self.log_every = max_rejects, log_every
        self.recent: deque[bool] = deque(maxlen=over)
        self.in_a_row = 0
        self.val_losses: deque[float] = deque(maxlen=16)
        # Keys and losses of the micro-batches since the last optimizer step.
        self._keys: list[str] = []
        self._losses: list[Tensor] = []
        self._snapshot: dict[str, Any] | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LadderTuningModule)
        pl_module.measure_taps = True
        self._take_snapshot(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        self._keys.extend(batch.keys)

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        self._losses.append(loss.detach())

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        assert isinstance(pl_module, LadderTuningModule)
        norms = pl_module.measure_gradients()
        # Lightning divides the loss by the number of micro-batches, so their sum is the mean.
        both = torch.stack([norms.total, torch.stack(self._losses).sum().double()])
        norm, loss = average_over_ranks(both).tolist()
        verdict = self.rule.judge(norm, loss)
        self.recent.append(verdict.reason is not None)
        metrics = {"guard/norm": norm, "guard/loss": loss}
        if math.isfinite(verdict.threshold):  # during the warm-up there is none
            metrics["guard/threshold"] = verdict.threshold
        if verdict.reason is not None:
            self._reject(trainer, pl_module, verdict.reason, metrics | self._components(pl_module, norms))
        else:
            self.in_a_row = 0
            if (pl_module.steps + 1) % self.log_every == 0:
                self._log(trainer, metrics | self._components(pl_module, norms))
        self._keys, self._losses = [], []

    @staticmethod
    def _components(pl_module: LadderTuningModule, norms: GradientNorms) -> dict[str, float]:
        """List the gradient norm of each component's parameters, and of the contexts of each tap."""
        named_norms = norms.by_component() | pl_module.compute_tap_norms()
        return {f"guard/norm/{name}": norm for name, norm in named_norms.items()}

    def _log(self, trainer: L.Trainer, metrics: dict[str, float]) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)

    def _reject(
        self, trainer: L.Trainer, pl_module: LadderTuningModule, reason: str, metrics: dict[str, float]
    ) -> None:
        self.in_a_row += 1
        # Each process names its own samples, so that whoever reads the log can look at all of them.
        keys_of_ranks = gather_objects(self._keys)
        pl_module.reject_step()
        self._log(trainer, metrics | {"guard/rejected": 1.0})
        components = {k.rsplit("/")[-1]: v for k, v in metrics.items() if k.startswith("guard/norm/")}
        if trainer.is_global_zero:
            log.warning(
                "rejected the step after %d of stage %s: %s; norm %.4g, threshold %.4g, loss %.4g; by component: %s; "
                "samples: %s",
                pl_module.steps,
                pl_module.stage.name,
                reason,
                metrics["guard/norm"],
                metrics.get("guard/threshold", math.inf),
                metrics["guard/loss"],
                ", ".join(f"{name} {norm:.3g}" for name, norm in components.items()),
                "; ".join(f"rank {rank}: {' '.join(keys)}" for rank, keys in enumerate(keys_of_ranks)),
            )
        # So many rejected steps are no rare spikes: something is wrong with the run.
        if sum(self.recent) >= self.max_rejects:
            raise DivergedError(
                f"{sum(self.recent)} of the last {len(self.recent)} steps were rejected, the limit is "
                f"callbacks.guard.max_rejects={self.max_rejects}; the last one because the {reason}. The checkpoints "
                "hold no rejected step; lower stage.lr, or look at the samples that the log names"
            )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if self.in_a_row < self.patience or self.then == "skip":
            return
        self.in_a_row = 0
        if self.then == "rewind":
            assert isinstance(pl_module, LadderTuningModule)
            here = pl_module.steps
            self._rewind(trainer, pl_module)
            log.warning(
                "%d rejected steps in a row: back from step %d to step %d", self.patience, here, pl_module.steps
            )
            return
        # The scheduler computes each rate from the base rate, so that one is lowered too.
        for group in trainer.optimizers[0].param_groups:
            for name in ("lr", "initial_lr"):
                group[name] *= self.lr_factor
        for config in trainer.lr_scheduler_configs:
            config.scheduler.base_lrs = [lr * self.lr_factor for lr in config.scheduler.base_lrs]
        log.warning("%d rejected steps in a row: learning rate times %g", self.patience, self.lr_factor)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Watch the loss of the average model, which no training step sees."""
        value = trainer.callback_metrics.get("val/loss")
        if value is None:
            return
        assert isinstance(pl_module, LadderTuningModule)
        loss, step = float(value), pl_module.steps
        if not math.isfinite(loss):
            raise DivergedError(
                f"the validation loss after step {step} of stage {pl_module.stage.name} is {loss}, although every step "
                "before was finite; look at the validation samples and at model.dtype and machine.precision"
            )
        usual = median(self.val_losses) if len(self.val_losses) >= 2 else math.inf
        if loss > VAL_RATIO * usual:
            log.warning("the validation loss after step %d is %.4g, that of others %.4g", step, loss, usual)
        self.val_losses.append(loss)

    def _list_averages(self, trainer: L.Trainer) -> list[EMA]:
        return [c for c in trainer.callbacks if isinstance(c, EMA)]  # type: ignore[attr-defined]

    def _list_others(self, trainer: L.Trainer) -> list[Any]:
        """List other callbacks that keep what must go back with the weights."""
        return [c for c in trainer.callbacks if hasattr(c, "copy_state")]  # type: ignore[attr-defined]

    def _take_snapshot(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.then != "rewind":
            return
        assert isinstance(pl_module, LadderTuningModule)
        # Whoever goes back must find weights that work. Where these don't, the snapshot before them is kept.
        if self._snapshot is not None and not are_finite(pl_module.parameters(), pl_module.device):
            log.error("the weights after step %d aren't finite; a rewind leads to those before", pl_module.steps)
            return
        state = trainer.optimizers[0].state
        trained = [parameter for _, parameter in pl_module.list_trained()]
        self._snapshot = {
            "weights": [_copy(parameter.data) for parameter in trained],
            "optimizer": [_copy_moments(state.get(parameter, {})) for parameter in trained],
            "schedulers": [dict(c.scheduler.state_dict()) for c in trainer.lr_scheduler_configs],
            "rates": [g["lr"] for g in trainer.optimizers[0].param_groups],
            "averages": [(c.updates, [_copy(a) for a in c.average]) for c in self._list_averages(trainer)],
            "others": [callback.copy_state() for callback in self._list_others(trainer)],
            "rule": self.rule.state_dict(),
            "steps": pl_module.steps,
        }

    def _rewind(self, trainer: L.Trainer, pl_module: LadderTuningModule) -> None:
        assert self._snapshot is not None
        snapshot, state_of = self._snapshot, trainer.optimizers[0].state
        # Weights and moments are copied in place: the optimizer and CUDA graphs hold these very tensors.
        parameters = zip(pl_module.list_trained(), snapshot["weights"], snapshot["optimizer"], strict=True)
        for (_, parameter), weights, moments in parameters:
            get_local_part(parameter.data).copy_(weights)
            if not moments:  # at the snapshot the optimizer had taken no step yet
                state_of.pop(parameter, None)
            for name, value in moments.items():
                if isinstance(value, Tensor):
                    get_local_part(state_of[parameter][name]).copy_(value)
                else:
                    state_of[parameter][name] = value
        # Schedule and learning rates go back with them.
        for config, scheduler in zip(trainer.lr_scheduler_configs, snapshot["schedulers"], strict=True):
            config.scheduler.load_state_dict(dict(scheduler))
        for group, rate in zip(trainer.optimizers[0].param_groups, snapshot["rates"], strict=True):
            group["lr"] = rate
        # So does the weight average, or it would still hold the weights that are given up.
        for callback, (updates, values) in zip(self._list_averages(trainer), snapshot["averages"], strict=True):
            callback.updates = updates
            for average, value in zip(callback.average, values, strict=True):
                average.copy_(value)
        for other, state in zip(self._list_others(trainer), snapshot["others"], strict=True):
            other.restore_state(state)
        kept = {name: part for name, part in self.rule.state_dict().items() if name == KEPT}
        self.rule.load_state_dict({**snapshot["rule"], **kept})
        pl_module.steps = snapshot["steps"]

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take a snapshot with each checkpoint: a run that goes on from it later rewinds to the same state."""
        if trainer.training or trainer.validating:
            self._take_snapshot(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"rule": self.rule.state_dict(), "recent": list(self.recent), "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rule.load_state_dict(state_dict["rule"])
        self.recent.clear()
        self.recent.extend(state_dict["recent"])
        self.in_a_row = state_dict["in_a_row"]


def _copy_moments(state: Mapping[str, Any]) -> dict[str, Any]:
    """Copy what an optimizer keeps of one parameter."""
    return {name: _copy(value) for name, value in state.items()}


def _copy(value: Any) -> Any:
    return get_local_part(value.detach()).to("cpu", copy=True) if isinstance(value, Tensor) else value
