"""Measuring gradient norms, of the whole model and of the components that show where a spike came from, and clipping.

Norms and clipping are torch's own. This file adds what its functions can't do: adding up the norms of shards over the
processes, and clipping sharded gradients together with whole ones.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from tbac.distributed import find_max_over_ranks, get_local_part, is_sharded


@dataclass(frozen=True)
class GradientNorms:
    """L2 norms of the gradients of one optimizer step, over all shards.

    Attributes:
        components: names of the components that have a gradient, as `find_component` gives them.
        each: norm of each component: (component,), float64.
    """

    components: list[str]
    each: Tensor

    @property
    def total(self) -> Tensor:
        """The global norm."""
        return self.each.square().sum().sqrt()

    def by_component(self) -> dict[str, float]:
        """Map the names of the components to their norms."""
        return dict(zip(self.components, self.each.tolist(), strict=True))


def find_component(name: str) -> str:
    """Return the component that a parameter belongs to: `queries`, `connector`, `mix`, `block_<i>`, or `denoiser`."""
    if name.endswith("ladder.queries"):
        return "queries"
    if "ladder." in name:
        return "mix" if "ladder.mix_" in name else "connector"
    block = re.search(r"transformer_blocks\.(\d+)\.", name)
    return f"block_{int(block[1]):02d}" if block else "denoiser"


def measure_gradient_norms(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> GradientNorms:
    """Measure the gradients of all components; guard, logs and clipping share the result.

    It is the same on every process: gradients have been averaged already, and the squares of shards are added up here.
    """
    # Either all parameters of a component are sharded or none. Components of whole parameters come first.
    unsharded: dict[str, list[Tensor]] = defaultdict(list)
    sharded: dict[str, list[DTensor]] = defaultdict(list)
    for name, parameter in named_parameters:
        if isinstance(parameter.grad, DTensor):
            sharded[find_component(name)].append(parameter.grad)
        elif parameter.grad is not None:
            unsharded[find_component(name)].append(parameter.grad)
    squares = [get_total_norm(gradients).double().square() for gradients in unsharded.values()]
    # Each process measures its shards; the sum of the squares over all processes is that of the whole gradients.
    if sharded:
        shard_norms = []
        for gradients in sharded.values():
            shard_norms.append(get_total_norm([gradient.to_local() for gradient in gradients]))
        of_shards = torch.stack(shard_norms).double().square()
        mesh = next(iter(sharded.values()))[0].device_mesh
        torch.distributed.all_reduce(of_shards, group=mesh.get_group())
        squares += of_shards.unbind()
    if not squares:
        return GradientNorms([], torch.zeros(0, dtype=torch.float64))
    return GradientNorms([*unsharded, *sharded], torch.stack(squares).sqrt())


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, total: Tensor) -> None:
    """Scale gradients by `max_norm / total` where that is below 1, as `torch.nn.utils.clip_grad_norm_` does.

    Args:
        parameters: whose gradients are scaled in place, sharded or not.
        max_norm: greatest norm that gradients keep.
        total: the global norm, over all shards.
    """
    with_gradient = [p for p in parameters if p.grad is not None]
    clip_grads_with_norm_([p for p in with_gradient if not is_sharded(p)], max_norm, total)
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for parameter in with_gradient:
        if is_sharded(parameter):
            assert parameter.grad is not None
            get_local_part(parameter.grad).mul_(factor)


def are_finite(tensors: Iterable[Tensor], device: torch.device) -> bool:
    """Whether every value of tensors is finite, and every value of their shards on all processes.

    Args:
        tensors: sharded or not.
        device: where the processes' answers are compared.
    """
    finite = [get_local_part(tensor.detach()).isfinite().all() for tensor in tensors]
    return find_max_over_ranks(int(not torch.stack(finite).all()), device) == 0
