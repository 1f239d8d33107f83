"""From prompts and images to the condition of all guidance branches."""

from collections.abc import Mapping

import torch
from PIL import Image
from torch import Tensor

from tbac.models import UniImage
from tbac.models.denoiser import ProjectedCondition
from tbac.sampling.arguments import check_finite
from tbac.sampling.guidance import Guidance
from tbac.types import Condition


@torch.no_grad()
def encode_texts(model: UniImage, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Encode texts without images, in one batch, so that they get one length where prompts are part of the context.

    Returns:
        states (text, block, query, channel) and their mask (text, query) of 1 and 0.
    """
    inputs = model.prompt(texts, [None] * len(texts)).to(model.device)
    condition = model.encode_condition(inputs)
    states = condition.states.transpose(0, 1)
    mask = condition.mask
    if mask is None:
        mask = torch.ones(states.shape[0], states.shape[2], device=states.device)
    return states, mask


def join_embeds(model: UniImage, guidance: Guidance, prompt: Mapping[str, Tensor | None]) -> ProjectedCondition:
    """Build the condition of all guidance branches from what `encode_texts` returned.

    Args:
        model: whose denoiser reads it.
        guidance: says which branches there are.
        prompt: `prompt_embeds` and `prompt_attention_mask`, and the same of `negative_prompt`, by their names.

    Raises:
        ValueError: for shapes that don't fit, and for numbers that aren't finite.
    """
    kinds = ["negative_prompt", "prompt"] if len(guidance.branches) == 2 else ["prompt"]
    parts: dict[str, list[Tensor]] = {"embeds": [], "attention_mask": []}
    for kind in kinds:
        embeds = prompt[f"{kind}_embeds"]
        if embeds is None or embeds.ndim != 4 or embeds.shape[1] != model.denoiser.num_blocks:
            shape = None if embeds is None else tuple(embeds.shape)
            raise ValueError(
                f"{kind}_embeds must have shape (prompt, {model.denoiser.num_blocks}, query, channel), as "
                f"encode_prompt() returns; got {shape}"
            )
        mask = prompt[f"{kind}_attention_mask"]
        check_finite(f"{kind}_embeds", embeds)
        parts["embeds"].append(embeds)
        parts["attention_mask"].append(embeds.new_ones(embeds.shape[0], embeds.shape[2]) if mask is None else mask)
    sizes = {tuple(embeds.shape) for embeds in parts["embeds"]}
    if len(sizes) > 1:
        raise ValueError(f"prompt_embeds and negative_prompt_embeds must have one shape; got {sorted(sizes)}")
    device = model.device
    states = torch.cat(parts["embeds"]).transpose(0, 1).to(device)
    mask = torch.cat(parts["attention_mask"]).to(device)
    return model.denoiser.project(Condition(states, None if bool(mask.all()) else mask, None))


def choose_branch_inputs(
    branch: str, prompts: list[str], images: list[list[Image.Image] | None], negatives: list[str]
) -> tuple[list[str], list[list[Image.Image] | None]]:
    """Choose the texts and images that a guidance branch reads."""
    if branch == "full":
        return prompts, images
    if branch == "image":
        return negatives, images
    black: list[list[Image.Image] | None] = []
    for group in images:
        black.append([Image.new("RGB", image.size) for image in group] if group else None)
    return negatives, black


@torch.no_grad()
def encode_branches(
    model: UniImage,
    prompts: list[str],
    images: list[list[Image.Image] | None],
    negatives: list[str],
    guidance: Guidance,
    size: tuple[int, int] | None = None,
) -> ProjectedCondition:
    """Encode the conditions of all guidance branches in one batch: rows (branch * prompt).

    Inputs that are equal, such as one negative prompt for all, are encoded only once.

    Args:
        model: that reads them.
        prompts: one text per picture that is asked for.
        images: input images of each prompt, or None.
        negatives: negative prompt of each prompt.
        guidance: says which branches there are.
        size: (height, width) in pixels of references, for models that read any; None = the model's own size.
    """
    # What each row of the result has to read.
    asked: list[tuple[str, list[Image.Image] | None]] = []
    for branch in guidance.branches:
        asked += zip(*choose_branch_inputs(branch, prompts, images, negatives), strict=True)
    # Two rows are equal when they have the same text and the same image objects.
    keys = [(text, tuple(map(id, group or ()))) for text, group in asked]
    order = list(dict.fromkeys(keys))
    distinct = [asked[keys.index(key)] for key in order]
    texts, groups = [text for text, _ in distinct], [group for _, group in distinct]
    inputs = model.prompt(texts, groups, reference_size=size)
    condition = model.denoiser.project(model.encode_condition(inputs.to(model.device)))
    # Each row gets the condition of its input.
    rows = [order.index(key) for key in keys]
    if rows == list(range(len(order))):
        return condition
    return condition[torch.tensor(rows, device=model.device)]
