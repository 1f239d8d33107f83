"""Recording the kernels of one prediction of the denoiser as a CUDA graph.

A prediction launches some two thousand short kernels, and at small batches the GPU waits for the launches. A graph
records them once and launches them together. The result has the same bits, since the same kernels run on the same
numbers.
"""

from typing import Any

import torch
from torch import Tensor

from tbac.models import UniImage
from tbac.models.denoiser import ProjectedCondition


class GraphedPrediction:
    """`model.predict_velocity` for one shape of latents and condition, recorded once and replayed.

    Args:
        model: on a CUDA device; its weights must stay where they are in memory.
        condition: what `model.denoiser.project` returned; it is copied.
        latents: (batch, channel, height, width); only their shape, type and device are used.
        branches: number of guidance branches that share the latents.
    """

    def __init__(self, model: UniImage, condition: ProjectedCondition, latents: Tensor, branches: int) -> None:
        self._latents = torch.zeros_like(latents)
        self._sigma = torch.ones(1, device=latents.device)
        pairs = tuple((key.clone(), value.clone()) for key, value in condition.keys_values)
        mask = None if condition.mask is None else condition.mask.clone()
        reference = None if condition.reference is None else condition.reference.clone()
        self._condition = ProjectedCondition(pairs, mask, reference)
        self._read = condition  # the one whose numbers were copied last

        def predict() -> Tensor:
            return model.predict_velocity(self._latents, self._sigma, self._condition, branches)

        # Libraries set themselves up in the first calls, which must not be recorded.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.no_grad():
            for _ in range(2):
                predict()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph), torch.no_grad():
            self._velocity = predict()

    def read(self, condition: ProjectedCondition) -> None:
        """Predict for another condition of the same shapes from now on."""
        if condition is self._read:
            return
        self._read = condition
        for held, new in zip(_list_tensors(self._condition), _list_tensors(condition), strict=True):
            held.copy_(new)

    def __call__(self, latents: Tensor, sigma: Tensor) -> Tensor:
        """Velocity (branch * batch, channel, height, width), overwritten by the next call.

        Args:
            latents: of the shape, type and device that were recorded.
            sigma: (1,), for all rows.
        """
        self._latents.copy_(latents)
        self._sigma.copy_(sigma)
        self._graph.replay()
        return self._velocity


class PredictionGraphs:
    """Takes the place of a model in sampling: `solve(PredictionGraphs(model), …)` gives the same bits.

    There is one recorded prediction for each combination of shapes, and the oldest is dropped when there are too many.
    Make a new object when the model's weights have been moved to other memory.

    Args:
        model: on a CUDA device.
        limit: how many recorded predictions are kept; each holds the memory of its activations.
    """

    def __init__(self, model: UniImage, limit: int = 4) -> None:
        self._model, self._limit = model, limit
        self._graphs: dict[tuple, GraphedPrediction] = {}

    @property
    def scheduler_config(self) -> dict[str, Any]:
        """Config of the model's sampling scheduler."""
        return self._model.scheduler_config

    def predict_velocity(
        self, noisy_latents: Tensor, sigma: Tensor, condition: ProjectedCondition, branches: int = 1
    ) -> Tensor:
        """Predict as `UniImage.predict_velocity` does; the next call overwrites the returned tensor."""
        shapes = (tensor.shape for tensor in _list_tensors(condition))
        key = (noisy_latents.shape, noisy_latents.dtype, branches, *shapes)
        graph = self._graphs.get(key)
        if graph is None:
            while len(self._graphs) >= self._limit:
                del self._graphs[next(iter(self._graphs))]
            graph = GraphedPrediction(self._model, condition, noisy_latents, branches)
            self._graphs[key] = graph
        graph.read(condition)
        return graph(noisy_latents, sigma)


def _list_tensors(condition: ProjectedCondition) -> list[Tensor]:
    pairs = [tensor for pair in condition.keys_values for tensor in pair]
    return pairs + [t for t in (condition.mask, condition.reference) if t is not None]
