"""The denoiser's kernels of one prediction as a CUDA graph.

At small batches a GPU waits for the launches of some two thousand short kernels a prediction. A graph records them once
and launches them together; it computes the same bits, since it runs the same kernels on the same numbers.
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
        condition: of `model.denoiser.project`; copied.
        latents: (batch, channel, height, width): their shape, type and device.
        branches: as in `predict_velocity`.
    """

    def __init__(self, model: UniImage, condition: ProjectedCondition, latents: Tensor, branches: int) -> None:
        self._latents = torch.zeros_like(latents)
        self._sigma = torch.ones(1, device=latents.device)
        pairs = tuple((key.clone(), value.clone()) for key, value in condition.keys_values)
        mask, reference = (None if t is None else t.clone() for t in (condition.mask, condition.reference))
        self._condition = ProjectedCondition(pairs, mask, reference)
        self._read = condition  # whose numbers were copied last

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
        for held, new in zip(_tensors(self._condition), _tensors(condition), strict=True):
            held.copy_(new)

    def __call__(self, latents: Tensor, sigma: Tensor) -> Tensor:
        """Velocity (branch * batch, channel, height, width), overwritten by the next call.

        Args:
            latents: as given when it was recorded, with other values.
            sigma: (1,), for all.
        """
        self._latents.copy_(latents)
        self._sigma.copy_(sigma)
        self._graph.replay()
        return self._velocity


class PredictionGraphs:
    """Stands in for a model where velocities are predicted: `solve(PredictionGraphs(model), …)` gives the same bits.

    Predictions are recorded by the shapes that they are asked for; the oldest go first. Ask for none after the model's
    weights have been moved to other memory.

    Args:
        model: on a CUDA device.
        limit: how many recorded predictions are kept; each holds the activations of one.
    """

    def __init__(self, model: UniImage, limit: int = 4) -> None:
        self._model, self._limit = model, limit
        self._graphs: dict[tuple, GraphedPrediction] = {}

    @property
    def scheduler_config(self) -> dict[str, Any]:
        """As of the model."""
        return self._model.scheduler_config

    def predict_velocity(
        self, noisy_latents: Tensor, sigma: Tensor, condition: ProjectedCondition, branches: int = 1
    ) -> Tensor:
        """As of the model; what is returned is overwritten by the next call."""
        shapes = (tensor.shape for tensor in _tensors(condition))
        wanted = (noisy_latents.shape, noisy_latents.dtype, branches, *shapes)
        graph = self._graphs.get(wanted)
        if graph is None:
            while len(self._graphs) >= self._limit:
                del self._graphs[next(iter(self._graphs))]
            graph = self._graphs[wanted] = GraphedPrediction(self._model, condition, noisy_latents, branches)
        graph.read(condition)
        return graph(noisy_latents, sigma)


def _tensors(condition: ProjectedCondition) -> list[Tensor]:
    pairs = [tensor for pair in condition.keys_values for tensor in pair]
    return pairs + [t for t in (condition.mask, condition.reference) if t is not None]
