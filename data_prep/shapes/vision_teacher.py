"""Teaches the vision tower of the shapes world's MLLM to give the embeddings of words.

Each image token is fitted to the sum of the embeddings of the words for what its cell shows: background, row, column,
and colour and shape of an object.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer, Qwen2VLImageProcessorPil

from data_prep.shapes.conversations import find_last_ids
from data_prep.shapes.pretrain_autoencoder import draw_dense_scene
from data_prep.shapes.scene import BACKGROUNDS, CELLS, COLORS, COLUMN_NAMES, GLYPHS, ROW_NAMES, Scene, render

GRID = 2 * CELLS  # vision patches along one side of a picture; 2 x 2 of them are merged into one token per cell


@dataclass(frozen=True)
class VisionRecipe:
    """How the vision tower is taught.

    Args:
        steps: number of steps, on dense scenes.
        lr: peak learning rate.
        embedding_std: standard deviation of the word embeddings that it is fitted to.
    """

    steps: int
    lr: float
    embedding_std: float


class VisionTeacher:
    """Computes the sum of word embeddings that each image token should give.

    Args:
        tokenizer: has the ids of the words.
        embeddings: (token, hidden).
    """

    def __init__(self, tokenizer: Qwen2Tokenizer, embeddings: Tensor) -> None:
        kinds: dict[str, Iterable[str]] = {
            "shape": GLYPHS,
            "color": COLORS,
            "background": BACKGROUNDS,
            "row": ROW_NAMES,
            "column": COLUMN_NAMES,
        }
        names = {kind: list(named) for kind, named in kinds.items()}
        self.words = {k: dict(zip(v, embeddings[find_last_ids(tokenizer, v)], strict=True)) for k, v in names.items()}

    def __call__(self, scene: Scene) -> Tensor:
        """Compute what the image tokens of a scene should give (cell, hidden)."""
        sums = []
        items = {(i.row, i.column): i for i in scene.items}
        for row in range(CELLS):
            for column in range(CELLS):
                total = self.words["background"][scene.background] + self.words["row"][ROW_NAMES[row]]
                total = total + self.words["column"][COLUMN_NAMES[column]]
                item = items.get((row, column))
                if item is not None:
                    total = total + self.words["shape"][item.shape] + self.words["color"][item.color]
                sums.append(total)
        return torch.stack(sums)


def make_patches(processor: Qwen2VLImageProcessorPil, scenes: Sequence[Scene]) -> Tensor:
    """Make the vision patches of scenes (scene, patch, channel)."""
    values = processor(images=[render(s) for s in scenes], return_tensors="pt")["pixel_values"]
    return values.view(len(scenes), GRID * GRID, -1)


def encode_pictures(model: Qwen2_5_VLForConditionalGeneration, patches: Tensor) -> Tensor:
    """Encode patches (scene, patch, channel) into features (scene, cell, hidden)."""
    grids = torch.tensor([[1, GRID, GRID]]).expand(len(patches), -1)
    features = model.model.get_image_features(patches.flatten(0, 1), grids).pooler_output
    return torch.stack(list(features))


def scale_rate(step: int, steps: int, warmup: int) -> float:
    """Compute the share of the peak learning rate: a linear warm-up, then flat, then a cosine over the last 60 %."""
    progress = max(0.0, step / steps - 0.4) / 0.6
    return min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * progress)))


def teach_vision(
    model: Qwen2_5_VLForConditionalGeneration,
    tokenizer: Qwen2Tokenizer,
    processor: Qwen2VLImageProcessorPil,
    recipe: VisionRecipe,
    rng: Random,
) -> None:
    """Fit image tokens to the embeddings of what they show."""
    # Dense scenes show many objects at once, so a few of them are enough.
    embeddings = model.get_input_embeddings().weight.data
    teacher = VisionTeacher(tokenizer, embeddings)
    scenes = [draw_dense_scene(rng) for _ in range(1500)]
    patches = make_patches(processor, scenes)
    targets = torch.stack([teacher(s) for s in scenes])
    optimizer = torch.optim.AdamW(model.model.visual.parameters(), lr=recipe.lr, fused=True)
    bar = tqdm(range(recipe.steps), desc="mllm vision", mininterval=5)
    for step in bar:
        optimizer.param_groups[0]["lr"] = recipe.lr * scale_rate(step, recipe.steps, 20)
        chosen = torch.tensor(rng.sample(range(len(scenes)), 32))
        error = encode_pictures(model, patches[chosen]) - targets[chosen]
        loss = error.square().mean() / recipe.embedding_std**2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 25 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    # The language model learns from its features, which must not change any more.
    model.model.visual.requires_grad_(False)
