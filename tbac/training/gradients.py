"""Gradient norms: of everything, and of the components that say where a spike came from."""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

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
    sharded = [isinstance(g, torch.distributed.tensor.DTensor) for _, g in found]
    with torch.no_grad():
        squares = torch.stack(torch._foreach_norm([local_part(g) for _, g in found])).double().square()
        if any(sharded):
            mask = torch.tensor(sharded, device=squares.device)
            of_shards = squares * mask
            mesh = next(g for _, g in found if isinstance(g, torch.distributed.tensor.DTensor)).device_mesh
            torch.distributed.all_reduce(of_shards, group=mesh.get_group())
            squares = torch.where(mask, of_shards, squares)
    return GradientNorms([name for name, _ in found], squares.sqrt())
