"""How several processes train one model: DDP, or FSDP2 with the denoiser sharded."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, distributed

from tbac.distributed import is_sharded, sharded_like, whole

STRATEGIES = ("auto", "ddp", "fsdp")


def make_strategy(name: str, timeout_minutes: float = 15.0) -> Strategy | str:
    """Strategy of a trainer.

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
        return DDPStrategy(
            timeout=timeout, gradient_as_bucket_view=True, forward_sync_buffers=False
        )  # no buffer changes
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
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, timeout=timeout)

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def post_backward(self, closure_loss: Tensor) -> None:
        """Average the gradients of what isn't sharded, once per optimizer step."""
        super().post_backward(closure_loss)
        assert self.lightning_module is not None
        if self.lightning_module.trainer.fit_loop._should_accumulate():
            return
        gradients = [
            p.grad for p in self.lightning_module.parameters() if p.grad is not None and not is_sharded(p.grad)
        ]
        if gradients:
            flat = torch._utils._flatten_dense_tensors(gradients)
            distributed.all_reduce(flat)
            flat /= self.world_size
            for gradient, mean in zip(gradients, torch._utils._unflatten_dense_tensors(flat, gradients), strict=True):
                gradient.copy_(mean)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return {name: whole(value) for name, value in self.lightning_module.state_dict().items()}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        state = getattr(optimizer, "optimizer", optimizer).state_dict()
        return state | {"state": {i: {k: whole(v) for k, v in s.items()} for i, s in state["state"].items()}}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        state = {k: sharded_like(own[k], v) if k in own else v for k, v in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            sharded = {
                i: {k: sharded_like(parameters[i], v) for k, v in values.items()}
                for i, values in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": sharded})
