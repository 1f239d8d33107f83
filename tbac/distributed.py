"""What several processes of one job do together: reductions, and gathering of plain objects."""

from typing import Any

import torch
from torch import Tensor, distributed


def world_size() -> int:
    """Number of processes of this job."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of `values` over all processes: the same bits on each of them."""
    if world_size() > 1:
        values = values.clone()
        distributed.all_reduce(values)
        values /= world_size()
    return values


def gather_objects(value: Any) -> list[Any]:
    """`value` of each process, in the order of ranks, on all of them."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    distributed.all_gather_object(gathered, value)
    return gathered


def local_part(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that this process holds; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, torch.distributed.tensor.DTensor) else tensor
