"""What a step's graphs are recorded from computes what a step computes; recording itself needs a GPU (tests/gpu)."""

from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.speed.training import targets
from tbac.models import UniImage
from tbac.training.cuda_graphs import StepGraphs
from tbac.types import Batch
from tests.helpers.pictures import make_prompt_cases
from tests.helpers.training import make_module
from tests.helpers.worlds import load_all_parts, load_small_model


@pytest.fixture
def unrecorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Modules run as they are where a GPU would record them; the shapes of what would have been recorded."""
    shapes: list[tuple] = []

    def run_as_it_is(module: torch.nn.Module, sample: tuple, **_: Any) -> torch.nn.Module:
        shapes.append((type(module).__name__, *(tuple(t.shape) for t in sample)))
        return module

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", run_as_it_is)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    return shapes


def test_what_is_recorded_computes_a_step(model: UniImage, unrecorded: list[tuple]) -> None:
    model = load_all_parts(model)
    module, graphs, found = make_module(model), StepGraphs(model, None), {}
    for recorded in (False, True):
        module.graphs = graphs if recorded else None
        found[recorded] = []
        for texts, images in make_prompt_cases().values():
            latents, noise, sigma = targets(model, len(texts), 6)
            batch = Batch(model.prompt(texts, images), [""] * len(texts))
            loss = module.compute_loss(batch, noise, sigma, latents)
            loss.backward()
            found[recorded].append((loss, {k: p.grad.clone() for k, p in module.named_parameters() if p.requires_grad}))
            module.zero_grad(set_to_none=True)
    for (loss, gradients), (same_loss, same_gradients) in zip(found[False], found[True], strict=True):
        torch.testing.assert_close(same_loss, loss, rtol=1e-5, atol=0)
        for name, expected in gradients.items():
            assert (same_gradients[name] - expected).norm() <= 1e-4 * expected.norm() + 1e-8, name


def test_prompts_of_many_lengths_need_few_recordings(model: UniImage, unrecorded: list[tuple]) -> None:
    graphs = StepGraphs(load_all_parts(model), None)
    for words in range(1, 12):
        graphs.encode_condition(model.prompt(["red circle " * words]))
    assert len(unrecorded) == len(set(unrecorded)) <= 2


@pytest.mark.parametrize("override", ["ladder.prompt_context=true", "model.reference_latents=true"])
def test_contexts_without_a_fixed_length_are_refused(in_world: Path, override: str) -> None:
    with pytest.raises(ValueError, match="cuda_graphs"):
        StepGraphs(load_small_model(in_world, override), None)
