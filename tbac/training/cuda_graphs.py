"""Training steps as CUDA graphs: the query pass and the denoiser, forward and backward, recorded once and replayed.

A step launches five to ten thousand short kernels, and a GPU finishes them faster than Python can launch them. A
recorded graph is launched as a whole and computes the same, since the same kernels run on the same numbers. Prompts are
padded on the right to a multiple of `LENGTH_STEP` tokens, which changes no result, so that few lengths have to be
recorded. The vision tower isn't recorded, since each batch of pictures is cut into other windows.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from tbac.flow import compute_timestep
from tbac.models import UniImage
from tbac.models.mllm import pad_right
from tbac.types import Condition

LENGTH_STEP = 64


class QueryPass(nn.Module):
    """Prompt pass, query pass and connector; only the ladder's parameters are this module's own.

    Args:
        model: the whole model, held by reference.
        shared_ids: the tokens that all prompts begin with.
    """

    def __init__(self, model: UniImage, shared_ids: tuple[int, ...]) -> None:
        super().__init__()
        self.ladder = model.ladder
        self._frozen = (model.mllm,)  # in a tuple, so that its parameters aren't registered
        # The graph reads these tensors at their place in memory, so they must live as long as the graph.
        self._shared = model.mllm.read_shared(shared_ids, model.ladder.plan.deepest)

    def forward(self, embeddings: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """(batch, token, hidden), (3, batch, token), (batch, token) -> contexts (block, batch, query, channel)."""
        mllm, plan = self._frozen[0], self.ladder.plan
        prefix = mllm.read_prompt(embeddings, positions, mask, self._shared, plan.deepest)
        return self.ladder(mllm.read_queries(self.ladder.queries, prefix, plan.layers))


class Prediction(nn.Module):
    """The denoiser, on contexts that were computed before."""

    def __init__(self, model: UniImage) -> None:
        super().__init__()
        self.denoiser = model.denoiser

    def forward(self, noisy: Tensor, timestep: Tensor, states: Tensor) -> Tensor:
        """(batch, channel, height, width), (batch,), (block, batch, query, channel) -> velocity, as `noisy`."""
        return self.denoiser(noisy, timestep, Condition(states))


class StepGraphs:
    """What `UniImage.encode_condition` and `predict_velocity` compute, by recorded graphs, one for each shape.

    Gradients stay in the memory that was recorded, so they must be used before the next step: there is no accumulation
    over batches. When a shape is recorded, nothing of an earlier step's computation, such as its loss with its history,
    may be alive, or PyTorch would record its gradients on another stream and fail.

    Args:
        model: trains on a CUDA device; without prompt context and references.
        dtype: of autocast, or None.

    Raises:
        ValueError: for a model whose contexts have no fixed length.
    """

    def __init__(self, model: UniImage, dtype: torch.dtype | None) -> None:
        if model.ladder.prompt_layers or model.denoiser.reference_embed is not None:
            raise ValueError(
                "cuda_graphs record contexts of one length: ladder.prompt_context and model.reference_latents must be "
                "false"
            )
        self._model, self._dtype = model, dtype
        self._recorded: dict[Any, Callable[..., Tensor]] = {}
        # Between the forward and the backward pass of the queries the denoiser runs, so each has memory of its own.
        self._pools: dict[str, Any] = {}

    def encode_condition(self, inputs: Any) -> Condition:
        """Encode a condition as `UniImage.encode_condition` does."""
        mllm = self._model.mllm
        with torch.no_grad():
            inputs = pad_right(inputs)
            embeddings, positions = mllm.embed(inputs), mllm.compute_positions(inputs)
        mask = inputs["attention_mask"].bool()
        missing = -mask.shape[1] % LENGTH_STEP
        embeddings = pad(embeddings, (0, 0, 0, missing))
        positions, mask = pad(positions, (0, missing)), pad(mask, (0, missing))
        shared_ids = tuple(inputs["shared_ids"].tolist()) if "shared_ids" in inputs else ()
        key = ("queries", shared_ids, embeddings.shape, embeddings.dtype)
        if key not in self._recorded:
            with self._precision():
                query_pass = QueryPass(self._model, shared_ids)
            self._recorded[key] = self._record(query_pass, embeddings, positions, mask)
        return Condition(self._recorded[key](embeddings, positions, mask))

    def predict_velocity(self, noisy: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """Predict a velocity as `UniImage.predict_velocity` does."""
        arguments = noisy, compute_timestep(sigma), condition.states
        key = ("denoiser", *(t.shape for t in arguments), condition.states.dtype)
        if key not in self._recorded:
            sample = condition.states.detach().clone().requires_grad_()
            self._recorded[key] = self._record(Prediction(self._model), *arguments[:2], sample)
        return self._recorded[key](*arguments)

    def forget(self) -> None:
        """Drop all recorded graphs, because other parameters train now or weights have moved in memory."""
        self._recorded.clear()
        self._pools.clear()  # memory that no graph uses any more is gone

    def _precision(self) -> torch.autocast:
        """Make an autocast without a cache of cast weights, which a graph would read after they have been freed."""
        enabled = self._dtype is not None
        return torch.autocast("cuda", self._dtype or torch.bfloat16, enabled=enabled, cache_enabled=False)

    def _record(self, module: nn.Module, *sample: Tensor) -> Callable[..., Tensor]:
        """Record a module's forward and backward pass for the shapes of a sample."""
        name = type(module).__name__
        if name not in self._pools:
            self._pools[name] = torch.cuda.graph_pool_handle()
        with self._precision():
            held = tuple(t.clone() if not t.requires_grad else t for t in sample)
            recorded: Any = torch.cuda.make_graphed_callables(
                module, held, allow_unused_input=True, pool=self._pools[name]
            )
        return recorded
