"""How several processes train one model: DDP, or FSDP2 with the denoiser sharded."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_only
from torch import distributed

from tbac.distributed import gather_tensor, is_sharded

STRATEGIES = ("auto", "ddp", "fsdp")


def read_process_rank() -> int:
    """Read this process's rank as its launcher has set it, before processes are connected; 0 without a launcher."""
    return getattr(rank_zero_only, "rank", 0)


def make_strategy(name: str, timeout_minutes: float = 15.0) -> Strategy | str:
    """Make the strategy of a trainer.

    Args:
        name: `auto` (one process, or DDP for several), `ddp`, or `fsdp` (FSDP2).
        timeout_minutes: how long a process waits for the others before the job ends.

    Raises:
        ValueError: for another name, or a timeout that isn't positive.
    """
    if timeout_minutes <= 0:
        raise ValueError(f"machine.timeout_minutes must be positive, got {timeout_minutes}")
    timeout = timedelta(minutes=timeout_minutes + 1)  # the watchdog comes first, with a better message
    if name == "auto":
        return name
    if name == "ddp":
        # No buffer ever changes, so none has to be sent.
        return DDPStrategy(timeout=timeout, gradient_as_bucket_view=True, forward_sync_buffers=False)
    if name == "fsdp":
        return ShardedStrategy(timeout=timeout)
    raise ValueError(f"machine.strategy must be one of {', '.join(STRATEGIES)}, got {name!r}")


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all processes; checkpoints are whole files, the same as those of any other strategy.

    `LadderTuningModule.configure_model` shards the denoiser. Queries and connector are small and stay whole on each
    process; their gradients are averaged here, as FSDP averages those of the shards.

    Args:
        timeout: of collective operations.
    """

    def __init__(self, timeout: timedelta) -> None:
        super().__init__(save_distributed_checkpoint=False, timeout=timeout)

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **options: Any) -> Any:
        """Average the gradients of unsharded parameters once per optimizer step, after all micro-batches."""

        def closure_and_average() -> Any:
            result = closure()
            self._average_whole_gradients()
            return result

        return super().optimizer_step(optimizer, closure_and_average, model, **options)

    def _average_whole_gradients(self) -> None:
        assert self.lightning_module is not None
        every = [p.grad for p in self.lightning_module.parameters() if p.grad is not None]
        gradients = [gradient for gradient in every if not is_sharded(gradient)]
        if not gradients:
            return
        # All of them go in one message, since each message costs a delay.
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(flat)
        flat /= self.world_size
        means = flat.split([gradient.numel() for gradient in gradients])
        for gradient, mean in zip(gradients, means, strict=True):
            gradient.copy_(mean.view_as(gradient))

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return {name: gather_tensor(value) for name, value in self.lightning_module.state_dict().items()}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        state = getattr(optimizer, "optimizer", optimizer).state_dict()
        return state | {"state": {i: {k: gather_tensor(v) for k, v in s.items()} for i, s in state["state"].items()}}
