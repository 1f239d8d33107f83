"""Pre-training of the shapes world's MLLM: to see, to name, to answer, to describe, to carry out edits in words.

What makes it learn within minutes on one core:
- The vision tower first learns to speak in the words' embeddings: each image token is fitted to the sum of the
  embeddings of what its cell shows (background, row, column, and colour and shape of an object). It stays as it is
  then, so that its features are computed once.
- Embeddings start at unit size, far above what the layers add to them at first; otherwise the layers' noise drowns the
  words.
- Small batches and many steps: looking something up is a circuit that needs steps, not samples.
- Several questions share one picture: they are branches that see the prefix but not each other, at the positions that
  they would have alone.
- Naming comes first: the answer directly after the word that is asked for. Answering after the assistant's header comes
  then, and laying out, cell by cell, a picture that is told or that an edit makes.
- The pictures grow: first one cell, then four, then all.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import (
    AutoModelForImageTextToText,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
)

from data_prep.shapes.conversations import Conversation, Conversations, last_ids
from data_prep.shapes.pretrain_autoencoder import dense_scene
from data_prep.shapes.scene import (
    BACKGROUNDS,
    CELLS,
    COLORS,
    COLUMN_NAMES,
    GLYPHS,
    ROW_NAMES,
    USUAL,
    Mixture,
    Scene,
    render,
    sample_scene,
)

BLUR = 0.5  # greatest standard deviation of the noise on imagined cells; embeddings have 1
GRID = 2 * CELLS  # vision patches along one side of a picture; 2 x 2 of them are merged into one token per cell


@dataclass(frozen=True)
class Recipe:
    """How the MLLM is pre-trained.

    Args:
        vision_steps: steps of the vision tower on dense scenes.
        steps: steps of the language model.
        batch_size: conversations per step, twice as many while pictures are small.
        lr: peak learning rate of the language model.
        vision_lr: that of the vision tower.
        embedding_std: of the word embeddings at the start.
        pictures: different pictures that conversations are about.
        told: share of questions about scenes that are told in words instead of seen.
        told_imagined: share of imagined pictures that are told; the others are edits of seen ones.
    """

    vision_steps: int = 250
    steps: int = 2600
    batch_size: int = 8
    lr: float = 1.5e-3
    vision_lr: float = 3e-3
    embedding_std: float = 1.0
    pictures: int = 4000
    told: float = 0.35
    told_imagined: float = 0.65


class VisionTeacher:
    """What each image token should say: a sum of word embeddings."""

    def __init__(self, tokenizer: Qwen2Tokenizer, embeddings: Tensor) -> None:
        kinds: dict[str, Iterable[str]] = {
            "shape": GLYPHS,
            "color": COLORS,
            "background": BACKGROUNDS,
            "row": ROW_NAMES,
            "column": COLUMN_NAMES,
        }
        names = {kind: list(named) for kind, named in kinds.items()}
        self.words = {k: dict(zip(v, embeddings[last_ids(tokenizer, v)], strict=True)) for k, v in names.items()}

    def __call__(self, scene: Scene) -> Tensor:
        """(cell, hidden)."""
        rows = []
        items = {(i.row, i.column): i for i in scene.items}
        for row in range(CELLS):
            for column in range(CELLS):
                said = self.words["background"][scene.background] + self.words["row"][ROW_NAMES[row]]
                said = said + self.words["column"][COLUMN_NAMES[column]]
                if item := items.get((row, column)):
                    said = said + self.words["shape"][item.shape] + self.words["color"][item.color]
                rows.append(said)
        return torch.stack(rows)


def patches_of(processor: Qwen2VLImageProcessorPil, scenes: Sequence[Scene]) -> Tensor:
    """Vision patches (scene, patch, channel)."""
    values = processor(images=[render(s) for s in scenes], return_tensors="pt")["pixel_values"]
    return values.view(len(scenes), GRID * GRID, -1)


def image_features(model: Qwen2_5_VLForConditionalGeneration, patches: Tensor) -> Tensor:
    """(scene, cell, hidden) from patches (scene, patch, channel)."""
    grids = torch.tensor([[1, GRID, GRID]]).expand(len(patches), -1)
    features = model.model.get_image_features(patches.flatten(0, 1), grids).pooler_output
    return torch.stack(list(features))


def schedule(step: int, steps: int, warmup: int) -> float:
    """Share of the peak rate: linear warm-up, flat, cosine over the last 60 %."""
    progress = max(0.0, step / steps - 0.4) / 0.6
    return min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * progress)))


def teach_vision(
    model: Qwen2_5_VLForConditionalGeneration,
    tokenizer: Qwen2Tokenizer,
    processor: Qwen2VLImageProcessorPil,
    recipe: Recipe,
    rng: Random,
) -> None:
    """Fit image tokens to the embeddings of what they show."""
    embeddings = model.get_input_embeddings().weight.data
    teacher = VisionTeacher(tokenizer, embeddings)
    scenes = [dense_scene(rng) for _ in range(1500)]
    patches = patches_of(processor, scenes)
    targets = torch.stack([teacher(s) for s in scenes])
    optimizer = torch.optim.AdamW(model.model.visual.parameters(), lr=recipe.vision_lr, fused=True)
    bar = tqdm(range(recipe.vision_steps), desc="mllm vision", mininterval=5)
    for step in bar:
        optimizer.param_groups[0]["lr"] = recipe.vision_lr * schedule(step, recipe.vision_steps, 20)
        chosen = torch.tensor(rng.sample(range(len(scenes)), 32))
        error = image_features(model, patches[chosen]) - targets[chosen]
        loss = error.square().mean() / recipe.embedding_std**2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 25 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    model.model.visual.requires_grad_(False)


def branch_mask(branches: Tensor) -> Tensor:
    """Additive attention mask (batch, 1, token, token): causal; a token sees the prefix and its own branch."""
    length = branches.shape[1]
    seen = (branches[:, None, :] == 0) | (branches[:, None, :] == branches[:, :, None])
    seen = seen & torch.ones(length, length, dtype=torch.bool).tril()
    return torch.zeros(seen.shape).masked_fill(~seen, -1e9).unsqueeze(1)


def conversation_states(
    model: Qwen2_5_VLForConditionalGeneration,
    batch: Sequence[Conversation],
    features: Tensor,
    pad: int,
    blur: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Last hidden states (batch, token, hidden) and labels (batch, token).

    Args:
        model: the language model.
        batch: conversations.
        features: (picture, cell, hidden) of the vision tower.
        pad: id of the padding token.
        blur: standard deviation of the noise on the embeddings of imagined cells, so that learnable queries that come
            near them read as cells too.
    """
    length = max(len(c.tokens) for c in batch)
    tokens = torch.full((len(batch), length), pad)
    labels = torch.full((len(batch), length), -100)
    branches = torch.full((len(batch), length), -1)
    positions = torch.zeros(3, len(batch), length, dtype=torch.long)
    pictured = []
    for row, c in enumerate(batch):
        end = len(c.tokens)
        tokens[row, :end], labels[row, :end] = torch.tensor(c.tokens), torch.tensor(c.labels)
        branches[row, :end], positions[:, row, :end] = torch.tensor(c.branches), torch.tensor(c.positions)
        if c.cells:
            pictured.append(features[c.picture, c.cells])
    embed = model.get_input_embeddings()
    embeddings = embed(tokens)
    if pictured:
        places = (tokens == model.config.image_token_id).unsqueeze(-1)
        embeddings = embeddings.masked_scatter(places, torch.cat(pictured))
    if batch[0].imagined:
        mixed = embeddings.clone()
        for row, c in enumerate(batch):
            cells = slice(len(c.tokens) - len(c.rows), len(c.tokens))
            mixed[row, cells] = embeddings[row, cells] + embed(torch.tensor(c.rows))
            mixed[row, cells] += blur * torch.rand(1) * torch.randn_like(mixed[row, cells])
        embeddings = mixed
    hidden = model.model.language_model(
        inputs_embeds=embeddings, position_ids=positions, attention_mask=branch_mask(branches), use_cache=False
    ).last_hidden_state
    return hidden, labels


def conversation_loss(
    model: Qwen2_5_VLForConditionalGeneration, batch: Sequence[Conversation], features: Tensor, pad: int
) -> Tensor:
    """Mean cross-entropy of the answers' tokens, or of the words for imagined cells."""
    hidden, labels = conversation_states(model, batch, features, pad, BLUR)
    if batch[0].imagined:
        ends = [(row, len(c.tokens) - len(c.imagined), len(c.tokens)) for row, c in enumerate(batch)]
        cells = torch.cat([hidden[row, first:end] for row, first, end in ends])
        words = torch.tensor([pair for c in batch for pair in c.imagined])
        scores = model.lm_head(cells)
        return (cross_entropy(scores, words[:, 0]) + cross_entropy(scores, words[:, 1])) / 2
    said = labels[:, 1:] >= 0
    return cross_entropy(model.lm_head(hidden[:, :-1][said]), labels[:, 1:][said])


def side_at(rng: Random, progress: float) -> int:
    """Side of the visible window: grows with progress, and smaller ones stay in the mixture."""
    largest = 1 if progress < 0.12 else 2 if progress < 0.3 else CELLS
    return largest if rng.random() < 0.8 else rng.randint(1, 2)


def kind_at(rng: Random, progress: float) -> str:
    """Kind of conversation: naming, then answering with it, then the rest."""
    if progress < 0.1:
        return "name"
    if progress < 0.3:
        return rng.choices(("name", "answer", "imagine"), (5, 3, 3))[0]
    return rng.choices(("name", "answer", "imagine", "describe", "text"), (4, 9, 11, 1, 1))[0]


def pretrain_mllm(
    architecture: dict[str, Any],
    tokenizer: Qwen2Tokenizer,
    processor: Qwen2VLImageProcessorPil,
    recipe: Recipe,
    seed: int,
    mixture: Mixture = USUAL,
    report: Callable[..., None] | None = None,
) -> Qwen2_5_VLForConditionalGeneration:
    """Train a Qwen2.5-VL from scratch on the shapes world.

    Args:
        architecture: config of the model; vocabulary and special token ids are taken from the tokenizer.
        tokenizer: of `train_tokenizer`.
        processor: image processor.
        recipe: how long and how fast.
        seed: of weights and data.
        mixture: of the scenes.
        report: called after each step with (model, step, kind, side, loss).
    """
    torch.manual_seed(seed)
    rng = Random(f"mllm/{seed}")
    model = AutoModelForImageTextToText.from_config(make_config(architecture, tokenizer))
    model.get_input_embeddings().weight.data.normal_(0, recipe.embedding_std)
    teach_vision(model, tokenizer, processor, recipe, rng)
    scenes: list[Scene] = []
    while len(scenes) < recipe.pictures:
        scene = sample_scene(rng, mixture)
        if not scene.held_out:
            scenes.append(scene)
    with torch.no_grad():
        features = torch.cat(
            [image_features(model, patches_of(processor, scenes[i : i + 256])) for i in range(0, len(scenes), 256)]
        )
    draw = Conversations(tokenizer, scenes, rng, mixture).draw
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    bar = tqdm(range(recipe.steps), desc="mllm language", mininterval=5)
    model.train()
    for step in bar:
        progress = step / recipe.steps
        optimizer.param_groups[0]["lr"] = recipe.lr * schedule(step, recipe.steps, 40)
        kind = kind_at(rng, progress)
        side = side_at(rng, progress)
        seen = progress < 0.12 or rng.random() > (recipe.told_imagined if kind == "imagine" else recipe.told)
        count = recipe.batch_size * (1 if side == CELLS or kind == "text" else 2)
        batch = [draw(kind, side, seen) for _ in range(count)]
        loss = conversation_loss(model, batch, features, tokenizer.pad_token_id)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if report:
            report(model, step, kind, side, loss.item())
        if step % 25 == 0:
            bar.set_postfix({kind: f"{loss.item():.3f}"})
    return model.eval().requires_grad_(False)


def make_config(architecture: dict[str, Any], tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLConfig:
    """The architecture with the tokenizer's vocabulary and special tokens."""
    ids = tokenizer.convert_tokens_to_ids
    text = {
        **architecture["text_config"],
        "vocab_size": len(tokenizer),
        "bos_token_id": None,
        "eos_token_id": ids("<|im_end|>"),
        "pad_token_id": ids("<|endoftext|>"),
    }
    special = {f"{k}_token_id": ids(f"<|{v}|>") for k, v in (("image", "image_pad"), ("video", "video_pad"))}
    special |= {f"vision_{k}_token_id": ids(f"<|vision_{k}|>") for k in ("start", "end")}
    return Qwen2_5_VLConfig(**{**architecture, "text_config": text}, **special)
