"""What a ladder's rungs do: pictures with taps switched off, norms, mixes, and where a query looks."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tbac.models import UniImage
from tbac.pictures import decode_picture
from tbac.sampling import Guidance, UniImagePipeline
from tbac.sampling.conditions import encode_branches
from tbac.sampling.recipe import Recipe


def list_taps(model: UniImage) -> list[str]:
    """Name the context of each block by what it reads: a layer, several that are joined, or a mix."""
    names = model.ladder.plan.name_readings()
    return [f"block {block}: {'' if 'mix' in name else 'layer '}{name}" for block, name in enumerate(names)]


@torch.no_grad()
def draw_weighted(
    pipeline: UniImagePipeline, recipe: Recipe, weights: Sequence[float], callback: Any = None
) -> Image.Image:
    """Draw a picture whose blocks read their contexts times a weight; 0 switches a block's tap off.

    Args:
        pipeline: draws.
        recipe: of the picture, without input images.
        weights: one for each block; all 1 is the picture as it is.
        callback: as `callback_on_step_end` of the pipeline.
    """
    embeds, mask, negative, negative_mask = pipeline.encode_prompt(recipe.prompt, recipe.negative_prompt)
    assert negative is not None
    scale = torch.tensor(weights, dtype=embeds.dtype, device=embeds.device).view(1, -1, 1, 1)
    made = pipeline(
        prompt_embeds=embeds * scale,
        prompt_attention_mask=mask,
        negative_prompt_embeds=negative * scale,
        negative_prompt_attention_mask=negative_mask,
        generator=torch.Generator().manual_seed(recipe.seed),
        callback_on_step_end=callback,
        **recipe.to_arguments(),
    )
    return made.images[0]


@torch.no_grad()
def measure_norms(model: UniImage, prompt: str) -> Tensor:
    """Measure the root mean square of each block's context, query by query: (block, query)."""
    condition = model.encode_condition(model.prompt([prompt]).to(model.device))
    return condition.states[:, 0].float().square().mean(-1).sqrt().cpu()


@torch.no_grad()
def measure_mix(model: UniImage, prompts: Sequence[str]) -> Tensor:
    """Measure the share of each tapped layer in what each block reads, (block, layer), where taps are mixed.

    Where blocks attend over layers, it is the mean over the tokens of these prompts.
    """
    taps = model.read_taps(model.prompt(list(prompts)).to(model.device))[0]
    return model.ladder.compute_mix_weights(taps).float().cpu()


@torch.no_grad()
def compute_attention(pipeline: UniImagePipeline, recipe: Recipe, query: int) -> Tensor:
    """Compute how much each place of the picture reads a query, block by block, in the last step of drawing.

    Args:
        pipeline: draws.
        recipe: of the picture, without input images.
        query: its index; where prompts are part of the context, their tokens follow the queries.

    Returns:
        (block, row, column) of patches, the mean over heads of the attention's weights.
    """
    model = pipeline.model
    blocks = model.denoiser.transformer.transformer_blocks
    # What each block asks in the last step, for the prompt's own branch, whose rows come last.
    asked: dict[int, Tensor] = {}

    def keep(index: int) -> Any:
        def hook(module: Any, arguments: Any, output: Tensor) -> None:
            asked[index] = output[-1:]

        return hook

    hooks = [block.attn2.to_q.register_forward_hook(keep(index)) for index, block in enumerate(blocks)]
    try:
        latents = pipeline(
            recipe.prompt,
            negative_prompt=recipe.negative_prompt,
            generator=torch.Generator().manual_seed(recipe.seed),
            output_type="latent",
            **recipe.to_arguments(),
        ).images
    finally:
        for hook in hooks:
            hook.remove()
    condition = encode_branches(pipeline.model, [recipe.prompt], [None], [""], Guidance(1.0))
    patch = model.denoiser.transformer.config.patch_size
    rows, columns = (size // patch for size in latents.shape[-2:])
    maps = []
    for index, (block, (keys, _)) in enumerate(zip(blocks, condition.keys_values, strict=True)):
        asks = asked[index]
        if block.attn2.norm_q is not None:
            asks = block.attn2.norm_q(asks)
        asks = asks.unflatten(-1, (block.attn2.heads, -1)).transpose(1, 2)  # (1, head, patch, channel)
        weights = (asks.float() @ keys.float().transpose(-1, -2) * asks.shape[-1] ** -0.5).softmax(-1)
        maps.append(weights[0, :, :, query].mean(0).view(rows, columns))
    return torch.stack(maps).cpu()


def overlay(picture: Image.Image, heat: Tensor) -> Image.Image:
    """Lay a map (row, column) over a picture: bright where it is largest, dark where it is smallest."""
    low, high = heat.min(), heat.max()
    scaled = ((heat - low) / (high - low).clamp(min=1e-12) * 255).byte().numpy()
    mask = Image.fromarray(scaled).resize(picture.size, Image.Resampling.BILINEAR)
    dark = Image.fromarray((np.asarray(picture) * 0.25).astype(np.uint8))
    return Image.composite(picture, dark, mask)


def plot_heat(values: Tensor, title: str, rows: Sequence[str], label: str) -> Image.Image:
    """Plot a heat map (row, column) with named rows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.2 + 0.28 * len(rows)), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(values.numpy(), aspect="auto", cmap="viridis")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel(label)
    axes.set_title(title)
    figure.colorbar(shown)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    return decode_picture(buffer.getvalue(), "the figure")
