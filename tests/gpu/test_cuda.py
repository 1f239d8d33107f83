"""What only a GPU can show: it computes what the CPU does, never waits within a step, and its fast paths are exact."""

import copy
from typing import Any

import pytest
import torch

from experiments.costs import Case, make_inputs
from experiments.speed.training import BASELINE, OURS, Side, check_equal, make_model, targets
from tbac.app import to_plain
from tbac.models import UniImage
from tbac.sampling.cuda_graph import PredictionGraphs
from tbac.sampling.guidance import Guidance
from tbac.sampling.solver import solve
from tbac.training.cuda_graphs import StepGraphs
from tbac.types import Batch
from tests.helpers.configs import compose_config
from tests.helpers.pictures import make_prompt_cases
from tests.helpers.training import make_data, make_module, make_trainer
from tests.helpers.worlds import load_all_parts

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _whole_float32() -> Any:
    """Products of float32 stay float32, as on a CPU."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = True


def loss_and_gradients(model: UniImage, case: str, device: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Of one step on prompts of a kind, on a device."""
    texts, images = make_prompt_cases()[case]
    module = make_module(model).to(device)
    model.to(device)
    latents, noise, sigma = targets(model, len(texts), 6)
    inputs = model.prompt(texts, images).to(device)
    loss = module.compute_loss(Batch(inputs, [""] * len(texts)), noise, sigma, latents)
    loss.backward()
    return loss.item(), {k: p.grad.cpu() for k, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("case", ["text", "mixed", "several_images"])
def test_a_step_has_the_loss_and_gradients_of_the_cpu(model: UniImage, case: str) -> None:
    other = copy.deepcopy(load_all_parts(model))
    there, here = loss_and_gradients(other, case, "cuda"), loss_and_gradients(model, case, "cpu")
    assert there[0] == pytest.approx(here[0], rel=1e-4)
    assert there[1].keys() == here[1].keys()
    for name, expected in here[1].items():
        assert (there[1][name] - expected).norm() <= 2e-3 * expected.norm() + 1e-7, name


@pytest.mark.parametrize("stage", ["t2i_pretrain", "ti2i_pretrain"])
def test_a_step_never_waits_for_the_device(model: UniImage, stage: str) -> None:
    """PyTorch itself raises where it would wait."""
    module = make_module(load_all_parts(model)).to("cuda")
    model.to("cuda")
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    batches = [b.pin_memory() for b in (next(iter(make_data(model, f"stage={stage}").train_dataloader())),) * 2]
    module.training_step(batches[0].to("cuda", non_blocking=True), 0).backward()  # libraries set themselves up
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        module.training_step(batches[1].to("cuda", non_blocking=True), 1).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_lowers_the_loss_and_leaves_frozen_parts_alone(model: UniImage, precision: str) -> None:
    before = {k: v.clone() for k, v in load_all_parts(model).state_dict().items()}
    module = make_module(model, steps=8)
    trainer = make_trainer(8, accelerator="cuda", devices=1, precision=precision)
    trainer.fit(module, datamodule=make_data(model))
    assert torch.isfinite(trainer.callback_metrics["train/loss"])
    for name, value in model.state_dict().items():
        if name.startswith(("mllm.", "autoencoder.")):
            assert torch.equal(value.cpu(), before[name]), name


@pytest.mark.parametrize("case", [Case("text", 20, 3), Case("image + text", 24, 2, 3)])
def test_the_release_s_way_computes_the_same(case: Case) -> None:
    config = to_plain(compose_config("bench", "experiment=bench_gpu_small", "device=cuda"))
    model = make_model(config["model"], "cuda")
    torch.nn.init.normal_(model.ladder.queries, std=0.5)
    arguments = (make_inputs(model, case, 4), *targets(model, case.batch, 4))
    check_equal(Side(BASELINE, model, config), Side(OURS, model, config), arguments)


def test_compiled_layers_change_nothing(model: UniImage) -> None:
    plain = loss_and_gradients(model, "mixed", "cuda")
    model.zero_grad()
    model.compile_parts()
    compiled = loss_and_gradients(model, "mixed", "cuda")
    assert compiled[0] == pytest.approx(plain[0], rel=1e-4)
    for name, expected in plain[1].items():
        assert (compiled[1][name] - expected).norm() <= 2e-3 * expected.norm() + 1e-7, name


@pytest.mark.parametrize("guidance", [Guidance(4.5), Guidance(4.5, 1.5)])
def test_recorded_predictions_give_the_same_bits(model: UniImage, guidance: Guidance) -> None:
    load_all_parts(model).to("cuda").eval()
    graphs = PredictionGraphs(model)
    noise = targets(model, 2, 6)[0]
    for texts in (["a red circle", "two blue squares"], ["a letter L", "three green crosses"]):
        rows = [""] * (2 * (len(guidance.branches) - 1)) + texts
        with torch.no_grad():
            condition = model.denoiser.project(model.encode_condition(model.prompt(rows).to("cuda")))
        expected = solve(model, condition, guidance, noise, 6)
        assert torch.equal(solve(graphs, condition, guidance, noise, 6), expected)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_recorded_steps_compute_the_same(model: UniImage, dtype: torch.dtype | None, compiled: bool) -> None:
    """Several lengths in turn, each replayed after the others; padding to the recorded length changes nothing."""
    model = load_all_parts(model).to("cuda")
    module = make_module(model).to("cuda")
    if compiled:
        model.compile_parts()
    graphs, found = StepGraphs(model, dtype), {}
    words = "three green squares and a letter L at the top left on a black background and "

    def step(texts: list[str], images: Any, seed: int) -> tuple[float, torch.Tensor, torch.Tensor]:
        """Loss and gradients; of its computation nothing may live on when the next step is recorded."""
        inputs = model.prompt(texts, images).to("cuda")
        latents, noise, sigma = targets(model, len(texts), 6, seed=seed)
        with torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None):
            loss = module.compute_loss(Batch(inputs, [""] * len(texts)), noise, sigma, latents)
        loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in module.parameters()])
        queries = module.ladder.queries.grad.clone()
        module.zero_grad(set_to_none=True)
        return loss.item(), gradients, queries

    cases = [*make_prompt_cases().values(), ([words * 5, "a red circle"], None)]
    for recorded in (False, True):
        module.graphs = graphs if recorded else None
        found[recorded] = [step(texts, images, seed) for seed in range(2) for texts, images in cases]
    limit = 2e-3 if dtype is None else 0.1
    for computed, replayed in zip(found[False], found[True], strict=True):
        assert replayed[0] == pytest.approx(computed[0], rel=limit)
        for expected, got in zip(computed[1:], replayed[1:], strict=True):
            assert (got - expected).norm() <= limit * expected.norm()
