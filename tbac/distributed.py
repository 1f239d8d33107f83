"""What several processes of one job do together: reductions, and gathering of plain objects."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def get_world_size() -> int:
    """Number of processes of this job."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def get_rank() -> int:
    """Number of this process, from 0."""
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of `values` over all processes: the same bits on each of them."""
    if get_world_size() > 1:
        values = values.clone()
        distributed.all_reduce(values)
    return values


def average_over_ranks(values: Tensor) -> Tensor:
    """The mean of `values` over all processes: the same bits on each of them."""
    return sum_over_ranks(values) / get_world_size()


def find_max_over_ranks(value: int, device: torch.device) -> int:
    """The greatest `value` of all processes, which must have agreed on `device`'s kind."""
    if get_world_size() == 1:
        return value
    tensor = torch.tensor(value, device=device)
    distributed.all_reduce(tensor, op=distributed.ReduceOp.MAX)
    return int(tensor)


def gather_objects(value: Any) -> list[Any]:
    """`value` of each process, in the order of ranks, on all of them."""
    if get_world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * get_world_size()
    distributed.all_gather_object(gathered, value)
    return gathered


def is_sharded(tensor: Tensor) -> bool:
    """Whether each process holds a part of it."""
    return isinstance(tensor, DTensor)


def get_local_part(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that this process holds; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather_tensor(value: Any) -> Any:
    """All parts of a sharded tensor, put together on every process; anything else as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def gather_parts(tensor: Tensor, part: Tensor) -> Tensor:
    """The whole tensor of which this process holds `part`, as it holds a part of `tensor`."""
    if not isinstance(tensor, DTensor):
        return part
    placed = tensor.device_mesh, tensor.placements
    return DTensor.from_local(part, *placed, shape=tensor.shape, stride=tensor.stride()).full_tensor()


def shard_like(tensor: Tensor, value: Any) -> Any:
    """`value`, whole on every process or sharded already, sharded as `tensor` is where the two have one shape."""
    if not isinstance(tensor, DTensor) or not isinstance(value, Tensor) or value.shape != tensor.shape:
        return value
    if isinstance(value, DTensor):
        return value
    return distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None)


def shard(module: nn.Module, blocks: nn.ModuleList, device_type: str) -> None:
    """Shard a module's parameters over all processes, each block on its own and then what remains; only once."""
    if isinstance(module, FSDPModule):
        return
    mesh = init_device_mesh(device_type, (get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)


@contextmanager
def hold_gathered(module: nn.Module) -> Iterator[None]:
    """Hold all parameters whole on every process meanwhile, so that one of them can use the module alone.

    Every process must enter and leave.
    """
    parts = [m for m in module.modules() if isinstance(m, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(True, recurse=False)
