"""What the processes of one job do together: sums and means, gathering objects, and sharding modules."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def get_world_size() -> int:
    """Return the number of processes of this job."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def get_rank() -> int:
    """Return the number of this process, counted from 0."""
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum `values` over all processes; every process gets the same bits."""
    if get_world_size() > 1:
        values = values.clone()
        distributed.all_reduce(values)
    return values


def average_over_ranks(values: Tensor) -> Tensor:
    """Average `values` over all processes; every process gets the same bits."""
    return sum_over_ranks(values) / get_world_size()


def find_max_over_ranks(value: int, device: torch.device) -> int:
    """Return the greatest `value` of all processes.

    Args:
        value: what this process has.
        device: where the reduction runs; all processes must give the same kind of device.
    """
    if get_world_size() == 1:
        return value
    tensor = torch.tensor(value, device=device)
    distributed.all_reduce(tensor, op=distributed.ReduceOp.MAX)
    return int(tensor)


def gather_objects(value: Any) -> list[Any]:
    """Collect the `value` of every process, in the order of their ranks, on all of them."""
    if get_world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * get_world_size()
    distributed.all_gather_object(gathered, value)
    return gathered


def is_sharded(tensor: Tensor) -> bool:
    """Whether each process holds only a part of the tensor."""
    return isinstance(tensor, DTensor)


def get_local_part(tensor: Tensor) -> Tensor:
    """Return the part of a sharded tensor that this process holds; any other tensor is returned as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather_tensor(value: Any) -> Any:
    """Put the parts of a sharded tensor together on every process; anything else is returned as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def gather_parts(tensor: Tensor, part: Tensor) -> Tensor:
    """Put a tensor together from a `part` on each process.

    Args:
        tensor: shows how the result is sharded; where it isn't, `part` is the whole result.
        part: what this process holds of the result, shaped as its part of `tensor`.
    """
    if not isinstance(tensor, DTensor):
        return part
    mesh, placements = tensor.device_mesh, tensor.placements
    sharded = DTensor.from_local(part, mesh, placements, shape=tensor.shape, stride=tensor.stride())
    return sharded.full_tensor()


def shard_like(tensor: Tensor, value: Any) -> Any:
    """Shard `value` as `tensor` is sharded.

    It is returned as it is where `tensor` isn't sharded, where it is sharded already, and where it isn't a tensor of
    the same shape, such as an optimizer's count of steps.
    """
    if not isinstance(tensor, DTensor) or not isinstance(value, Tensor) or value.shape != tensor.shape:
        return value
    if isinstance(value, DTensor):
        return value
    # Every process holds the whole value, so none has to send its copy to the others.
    return distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None)


def shard(module: nn.Module, blocks: nn.ModuleList, device_type: str) -> None:
    """Shard a module's parameters over all processes: each block by itself, then what is outside of the blocks."""
    if isinstance(module, FSDPModule):  # a later stage trains the module that an earlier one has sharded
        return
    mesh = init_device_mesh(device_type, (get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)


@contextmanager
def hold_gathered(module: nn.Module) -> Iterator[None]:
    """Within the block, every process holds all parameters whole, so that one process can use the module alone.

    Every process must enter and leave the block.
    """
    parts = [submodule for submodule in module.modules() if isinstance(submodule, FSDPModule)]
    for part in parts:
        # Otherwise a forward pass would free the gathered parameters, and the next one would wait for all processes.
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(True, recurse=False)
