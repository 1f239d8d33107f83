"""SANA with one context per block against the stock forward."""

import pytest
import torch

from tbac.models import UniImage
from tbac.types import Condition


@pytest.mark.parametrize("size", [(8, 8), (4, 12)])
def test_equal_contexts_equal_the_stock_forward_bit_for_bit(model: UniImage, size: tuple[int, int]) -> None:
    latents, context = torch.randn(3, 8, *size), torch.randn(3, 16, 128)
    timestep = torch.tensor([0.0, 400.0, 999.5])
    stock = model.denoiser.transformer(latents, context, timestep, return_dict=False)[0]
    ours = model.denoiser(latents, timestep, Condition(context.expand(4, -1, -1, -1)))
    assert torch.equal(ours, stock)


def test_a_mask_equals_the_stock_mask(model: UniImage) -> None:
    latents, context, timestep = torch.randn(2, 8, 8, 8), torch.randn(2, 16, 128), torch.tensor([3.0, 700.0])
    mask = torch.ones(2, 16)
    mask[1, 5:] = 0
    stock = model.denoiser.transformer(latents, context, timestep, encoder_attention_mask=mask, return_dict=False)[0]
    assert torch.equal(model.denoiser(latents, timestep, Condition(context.expand(4, -1, -1, -1), mask)), stock)


def test_gradients_equal_the_stock_ones(model: UniImage) -> None:
    latents, context, timestep = torch.randn(2, 8, 8, 8), torch.randn(2, 16, 128), torch.tensor([3.0, 700.0])
    transformer = model.denoiser.transformer
    gradients = []
    for ours in (False, True):
        transformer.zero_grad()
        if ours:
            made = model.denoiser(latents, timestep, Condition(context.expand(4, -1, -1, -1)))
        else:
            made = transformer(latents, context, timestep, return_dict=False)[0]
        made.square().mean().backward()
        gradients.append({k: p.grad.clone() for k, p in transformer.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-7)


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
