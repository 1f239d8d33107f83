"""Gradient norms: of everything, and of the components that say where a spike came from."""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tbac.distributed import local_part


@dataclass(frozen=True)
class GradientNorms:
    """L2 norms of the gradients of one optimizer step, over all shards.

    Attributes:
        names: of the parameters that have a gradient.
        each: (parameter,), float64.
    """

    names: list[str]
    each: Tensor

    @property
    def total(self) -> Tensor:
        """The global norm."""
        return self.each.square().sum().sqrt()

    def by_component(self) -> dict[str, float]:
        """The norms of queries, connector, each denoiser block, and what remains of the denoiser."""
        groups: dict[str, list[int]] = defaultdict(list)
        for index, name in enumerate(self.names):
            groups[component_of(name)].append(index)
        each = self.each.cpu()
        return {name: each[rows].square().sum().sqrt().item() for name, rows in groups.items()}


def component_of(name: str) -> str:
    """The component that a parameter belongs to: `queries`, `connector`, `mix`, `block_<i>`, or `denoiser`."""
    if name.endswith("ladder.queries"):
        return "queries"
    if "ladder." in name:
        return "mix" if name.endswith("mix_logits") else "connector"
    found = re.search(r"transformer_blocks\.(\d+)\.", name)
    return f"block_{int(found[1]):02d}" if found else "denoiser"


def gradient_norms(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> GradientNorms:
    """Measure gradients, once for the guard, the logs and clipping.

    The result is the same on every process: gradients are already averaged, and those of sharded parameters are
    summed over their shards here.
    """
    found = [(name, p.grad) for name, p in named_parameters if p.grad is not None]
    if not found:
        return GradientNorms([], torch.zeros(0, dtype=torch.float64))
    meshes = {g.device_mesh for _, g in found if isinstance(g, DTensor)}
    with torch.no_grad():
        squares = torch.stack(torch._foreach_norm([local_part(g) for _, g in found])).double().square()
        for mesh in meshes:
            mask = torch.tensor([isinstance(g, DTensor) for _, g in found], device=squares.device)
            of_shards = squares * mask
            torch.distributed.all_reduce(of_shards, group=mesh.get_group())
            squares = torch.where(mask, of_shards, squares)
    return GradientNorms([name for name, _ in found], squares.sqrt())


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, total: Tensor) -> None:
    """Scale gradients by `max_norm / total` where that is below 1, as `torch.nn.utils.clip_grad_norm_` does.

    Args:
        parameters: whose gradients are scaled in place, sharded or not.
        max_norm: norm that is kept.
        total: their norm, over all shards.
    """
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([local_part(p.grad) for p in parameters if p.grad is not None], factor)
