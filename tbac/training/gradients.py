"""Gradient norms: of everything, and of the components that say where a spike came from.

Norms and clipping are torch's own. Only what its functions can't do is written here: adding up the norms of shards over
the processes, and scaling sharded gradients beside whole ones.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from tbac.distributed import get_local_part, is_sharded


@dataclass(frozen=True)
class GradientNorms:
    """L2 norms of the gradients of one optimizer step, over all shards.

    Attributes:
        components: names of those that have a gradient; see `component_of`.
        each: (component,), float64.
    """

    components: list[str]
    each: Tensor

    @property
    def total(self) -> Tensor:
        """The global norm."""
        return self.each.square().sum().sqrt()

    def by_component(self) -> dict[str, float]:
        """The norms of queries, connector, each denoiser block, and what remains of the denoiser."""
        return dict(zip(self.components, self.each.tolist(), strict=True))


def find_component(name: str) -> str:
    """The component that a parameter belongs to: `queries`, `connector`, `mix`, `block_<i>`, or `denoiser`."""
    if name.endswith("ladder.queries"):
        return "queries"
    if "ladder." in name:
        return "mix" if name.endswith("mix_logits") else "connector"
    found = re.search(r"transformer_blocks\.(\d+)\.", name)
    return f"block_{int(found[1]):02d}" if found else "denoiser"


def measure_gradient_norms(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> GradientNorms:
    """Measure gradients, once for the guard, the logs and clipping.

    The result is the same on every process: gradients are already averaged, and those of sharded parameters are
    summed over their shards here.
    """
    # All parameters of a component are sharded, or none is: whole ones come first, then sharded ones.
    whole: dict[str, list[Tensor]] = defaultdict(list)
    sharded: dict[str, list[DTensor]] = defaultdict(list)
    for name, parameter in named_parameters:
        if isinstance(parameter.grad, DTensor):
            sharded[find_component(name)].append(parameter.grad)
        elif parameter.grad is not None:
            whole[find_component(name)].append(parameter.grad)
    squares = [get_total_norm(own).double().square() for own in whole.values()]
    # Squares of shards are summed over the processes that hold them.
    if sharded:
        shards = [get_total_norm([gradient.to_local() for gradient in own]) for own in sharded.values()]
        of_shards = torch.stack(shards).double().square()
        mesh = next(iter(sharded.values()))[0].device_mesh
        torch.distributed.all_reduce(of_shards, group=mesh.get_group())
        squares += of_shards.unbind()
    if not squares:
        return GradientNorms([], torch.zeros(0, dtype=torch.float64))
    return GradientNorms([*whole, *sharded], torch.stack(squares).sqrt())


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, total: Tensor) -> None:
    """Scale gradients by `max_norm / total` where that is below 1, as `torch.nn.utils.clip_grad_norm_` does.

    Args:
        parameters: whose gradients are scaled in place, sharded or not.
        max_norm: norm that is kept.
        total: their norm, over all shards.
    """
    held = [p for p in parameters if p.grad is not None]
    clip_grads_with_norm_([p for p in held if not is_sharded(p)], max_norm, total)
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for parameter in held:
        if is_sharded(parameter):
            assert parameter.grad is not None
            get_local_part(parameter.grad).mul_(factor)
