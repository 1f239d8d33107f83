"""SANA with one context per block against the stock forward."""

from pathlib import Path

import pytest
import torch
from diffusers import SanaTransformer2DModel

from tbac.models import UniImage
from tbac.types import Condition


@pytest.fixture
def stock(in_world: Path) -> SanaTransformer2DModel:
    """The same weights in the library's own model, untouched."""
    return SanaTransformer2DModel.from_pretrained(in_world / "backbones" / "denoiser", subfolder="transformer")


@pytest.mark.parametrize("size", [(8, 8), (4, 12)])
def test_equal_contexts_equal_the_stock_forward_bit_for_bit(
    model: UniImage, stock: SanaTransformer2DModel, size: tuple[int, int]
) -> None:
    latents, context = torch.randn(3, 8, *size), torch.randn(3, 16, 128)
    timestep = torch.tensor([0.0, 400.0, 999.5])
    expected = stock(latents, context, timestep, return_dict=False)[0]
    ours = model.denoiser(latents, timestep, Condition(context.expand(4, -1, -1, -1)))
    assert torch.equal(ours, expected)


def test_a_mask_equals_the_stock_mask(model: UniImage, stock: SanaTransformer2DModel) -> None:
    latents, context, timestep = torch.randn(2, 8, 8, 8), torch.randn(2, 16, 128), torch.tensor([3.0, 700.0])
    mask = torch.ones(2, 16)
    mask[1, 5:] = 0
    expected = stock(latents, context, timestep, encoder_attention_mask=mask, return_dict=False)[0]
    assert torch.equal(model.denoiser(latents, timestep, Condition(context.expand(4, -1, -1, -1), mask)), expected)


def gradients_of(made: torch.Tensor, transformer: torch.nn.Module) -> dict[str, torch.Tensor]:
    transformer.zero_grad()
    made.square().mean().backward()
    return {k: p.grad.clone() for k, p in transformer.named_parameters()}


def test_without_gradient_it_still_equals_the_stock_forward_bit_for_bit(
    model: UniImage, stock: SanaTransformer2DModel
) -> None:
    latents, context, timestep = torch.randn(3, 8, 8, 8), torch.randn(3, 16, 128), torch.tensor([0.0, 400.0, 999.5])
    condition = Condition(context.expand(4, -1, -1, -1))
    expected = stock(latents, context, timestep, return_dict=False)[0]
    given = latents.clone()
    for enabled in (False, True, False):
        with torch.set_grad_enabled(enabled):
            assert torch.equal(model.denoiser(latents, timestep, condition), expected)
    assert torch.equal(latents, given)


def test_gradients_equal_the_stock_ones(model: UniImage, stock: SanaTransformer2DModel) -> None:
    latents, context, timestep = torch.randn(2, 8, 8, 8), torch.randn(2, 16, 128), torch.tensor([3.0, 700.0])
    expected = gradients_of(stock(latents, context, timestep, return_dict=False)[0], stock)
    made = model.denoiser(latents, timestep, Condition(context.expand(4, -1, -1, -1)))
    gradients = gradients_of(made, model.denoiser.transformer)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-7)


def test_projected_contexts_equal_contexts_bit_for_bit(model: UniImage) -> None:
    latents, timestep = torch.randn(2, 8, 8, 8), torch.tensor([3.0, 700.0])
    mask = torch.ones(2, 16)
    mask[1, 5:] = 0
    for condition in (Condition(torch.randn(4, 2, 16, 128)), Condition(torch.randn(4, 2, 16, 128), mask)):
        projected = model.denoiser.project(condition)
        assert torch.equal(model.denoiser(latents, timestep, projected), model.denoiser(latents, timestep, condition))
        rows = torch.tensor([1, 0])
        assert torch.equal(
            model.denoiser(latents, timestep, projected[rows]), model.denoiser(latents, timestep, condition[rows])
        )


@pytest.mark.parametrize("branches", [2, 3])
def test_branches_of_the_same_latents_equal_rows_of_their_own(model: UniImage, branches: int) -> None:
    latents, condition = torch.randn(2, 8, 8, 8), Condition(torch.randn(4, 2 * branches, 16, 128))
    timestep = torch.tensor([500.0])
    ran: list[int] = []
    first = model.denoiser.transformer.transformer_blocks[0].attn1
    first.to_q.register_forward_hook(lambda _, args, out: ran.append(len(args[0])))
    expected = model.denoiser(latents.repeat(branches, 1, 1, 1), timestep, condition)
    together = model.denoiser(latents, timestep, condition, branches)
    torch.testing.assert_close(together, expected, rtol=1e-5, atol=1e-6)
    assert ran == [2 * branches, 2]
    assert torch.equal(model.denoiser(latents.repeat(branches, 1, 1, 1), timestep, condition), expected)


def test_one_timestep_stands_for_all(model: UniImage) -> None:
    latents, condition = torch.randn(3, 8, 8, 8), Condition(torch.randn(4, 3, 16, 128))
    torch.testing.assert_close(
        model.denoiser(latents, torch.tensor([500.0]), condition),
        model.denoiser(latents, torch.full((3,), 500.0), condition),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("way", ["checkpointing", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_checkpointing_and_compiling_change_neither_prediction_nor_gradients(model: UniImage, way: str) -> None:
    latents, timestep = torch.randn(2, 8, 8, 8), torch.tensor([3.0, 700.0])
    states = torch.randn(4, 2, 16, 128)
    results = []
    for changed in (False, True):
        if changed and way != "checkpointing":
            model.denoiser.compile_blocks(backend=way)
        model.denoiser.checkpointing = changed and way == "checkpointing"
        leaf = states.clone().requires_grad_()
        made = model.denoiser(latents, timestep, Condition(leaf))
        results.append((made.detach(), gradients_of(made, model.denoiser.transformer), leaf.grad))
    (made, gradients, reached), (other, others, other_reached) = results
    torch.testing.assert_close(other, made, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(other_reached, reached, rtol=1e-4, atol=1e-7)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_compiled_blocks_take_pictures_of_any_size(model: UniImage) -> None:
    shapes = [(2, 6, 6), (2, 8, 8), (2, 6, 8), (3, 8, 6), (1, 4, 4)]
    results: list[list[torch.Tensor]] = []
    for compiled in (False, True):
        if compiled:
            model.denoiser.compile_blocks()
        made = []
        for number, (batch, rows, columns) in enumerate(shapes):
            generator = torch.Generator().manual_seed(number)
            latents = torch.randn(batch, 8, rows, columns, generator=generator)
            states = torch.randn(4, batch, 16, 128, generator=generator).requires_grad_()
            predicted = model.denoiser(latents, torch.full((batch,), 300.0), Condition(states))
            predicted.square().sum().backward()
            made += [predicted.detach(), states.grad]
        results.append(made)
    for plain, compiled_result in zip(*results, strict=True):
        torch.testing.assert_close(compiled_result, plain, rtol=1e-4, atol=1e-5)


def test_checkpointing_runs_each_block_twice(model: UniImage) -> None:
    ran = []
    for index, block in enumerate(model.denoiser.transformer.transformer_blocks):
        block.register_forward_pre_hook(lambda *_, i=index: ran.append(i))
    model.set_checkpointing(denoiser=True)
    model.denoiser(torch.randn(2, 8, 8, 8), torch.ones(2), Condition(torch.randn(4, 2, 16, 128))).sum().backward()
    assert ran == [0, 1, 2, 3, 3, 2, 1, 0]


def test_each_block_reads_its_own_context(model: UniImage) -> None:
    read: dict[int, torch.Tensor] = {}
    for index, block in enumerate(model.denoiser.transformer.transformer_blocks):
        block.register_forward_pre_hook(lambda _, args, i=index: read.__setitem__(i, args[2]))
    states = torch.randn(4, 2, 16, 128)
    model.denoiser(torch.randn(2, 8, 8, 8), torch.tensor([1.0, 2.0]), Condition(states))
    transformer = model.denoiser.transformer
    for index in range(4):
        assert torch.equal(read[index], transformer.caption_norm(transformer.caption_projection(states[index])))


def test_too_few_contexts_are_refused(model: UniImage) -> None:
    with pytest.raises(ValueError, match="3 contexts for 4 denoiser blocks"):
        model.denoiser(torch.randn(2, 8, 8, 8), torch.ones(2), Condition(torch.randn(3, 2, 16, 128)))
