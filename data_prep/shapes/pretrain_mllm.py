"""Pre-trains the MLLM of the shapes world to see, to name, to answer, to describe, and to carry out edits in words.

What makes it learn within minutes on one core:
- The vision tower first learns to give the embeddings of words (`vision_teacher.py`). It is frozen after that, so its
  features are computed only once.
- Embeddings start at unit size, far above what the layers add to them at first. Otherwise the words would drown in the
  noise of the untrained layers.
- Batches are small and steps are many: learning to look something up takes steps rather than samples.
- Several questions share one picture. They are branches that see the prefix but not each other, at the positions that
  they would have alone.
- It first learns to name: the answer comes directly after the word that is asked for. Then it learns to answer after
  the assistant's header, and to lay out, cell by cell, a picture that a caption describes or that an edit leads to.
- The pictures grow: first one cell, then four, then all.
"""

from collections.abc import Callable, Sequence
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

from data_prep.shapes.conversations import Conversation, Conversations
from data_prep.shapes.scene import CELLS, USUAL, Mixture, Scene, sample_scene
from data_prep.shapes.vision_teacher import VisionRecipe, encode_pictures, make_patches, scale_rate, teach_vision

BLUR = 0.5  # greatest standard deviation of the noise on imagined cells; embeddings have 1


@dataclass(frozen=True)
class Recipe:
    """How the MLLM is pre-trained.

    Args:
        vision_steps: steps of the vision tower on dense scenes.
        steps: steps of the language model.
        batch_size: conversations per step, twice as many while pictures are small.
        lr: peak learning rate of the language model.
        vision_lr: that of the vision tower.
        embedding_std: standard deviation of the word embeddings at the start.
        pictures: how many different pictures conversations are about.
        told: share of questions about scenes that are described in words instead of seen.
        told_imagined: share of imagined pictures that are described in words; the others are edits of seen ones.
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


def make_branch_mask(branches: Tensor) -> Tensor:
    """Make a causal additive mask (batch, 1, token, token), in which a token sees the prefix and its own branch."""
    length = branches.shape[1]
    seen = (branches[:, None, :] == 0) | (branches[:, None, :] == branches[:, :, None])
    seen = seen & torch.ones(length, length, dtype=torch.bool).tril()
    return torch.zeros(seen.shape).masked_fill(~seen, -1e9).unsqueeze(1)


@dataclass(frozen=True)
class Padded:
    """Conversations of one length.

    Attributes:
        tokens: (batch, token), the padding token at the end.
        labels: (batch, token), -100 where nothing is learned.
        branches: (batch, token), -1 for padding.
        positions: (3, batch, token), rotary.
    """

    tokens: Tensor
    labels: Tensor
    branches: Tensor
    positions: Tensor


def pad_conversations(batch: Sequence[Conversation], pad: int) -> Padded:
    """Join conversations; `pad` is the id of the padding token."""
    shape = len(batch), max(len(c.tokens) for c in batch)
    tokens, labels = torch.full(shape, pad), torch.full(shape, -100)
    branches, positions = torch.full(shape, -1), torch.zeros(3, *shape, dtype=torch.long)
    for row, c in enumerate(batch):
        end = len(c.tokens)
        tokens[row, :end], labels[row, :end] = torch.tensor(c.tokens), torch.tensor(c.labels)
        branches[row, :end], positions[:, row, :end] = torch.tensor(c.branches), torch.tensor(c.positions)
    return Padded(tokens, labels, branches, positions)


def compute_states(
    model: Qwen2_5_VLForConditionalGeneration,
    batch: Sequence[Conversation],
    features: Tensor,
    pad: int,
    blur: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Compute the last hidden states (batch, token, hidden), and return them with the labels (batch, token).

    Args:
        model: the language model.
        batch: conversations.
        features: (picture, cell, hidden) of the vision tower.
        pad: id of the padding token.
        blur: standard deviation of the noise on the embeddings of imagined cells, so that learnable queries that come
            near them read as cells too.
    """
    padded = pad_conversations(batch, pad)
    embed = model.get_input_embeddings()
    embeddings = embed(padded.tokens)
    # The features of the vision tower take the place of image tokens, as in Qwen2.5-VL.
    pictured = [features[c.picture, c.cells] for c in batch if c.cells]
    if pictured:
        places = (padded.tokens == model.config.image_token_id).unsqueeze(-1)
        embeddings = embeddings.masked_scatter(places, torch.cat(pictured))
    # A token of an imagined cell is the word for its column; the word for its row and some noise are added here.
    if batch[0].imagined:
        mixed = embeddings.clone()
        for row, c in enumerate(batch):
            cells = slice(len(c.tokens) - len(c.rows), len(c.tokens))
            mixed[row, cells] = embeddings[row, cells] + embed(torch.tensor(c.rows))
            mixed[row, cells] += blur * torch.rand(1) * torch.randn_like(mixed[row, cells])
        embeddings = mixed
    hidden = model.model.language_model(
        inputs_embeds=embeddings,
        position_ids=padded.positions,
        attention_mask=make_branch_mask(padded.branches),
        use_cache=False,
    ).last_hidden_state
    return hidden, padded.labels


def compute_loss(
    model: Qwen2_5_VLForConditionalGeneration, batch: Sequence[Conversation], features: Tensor, pad: int
) -> Tensor:
    """Compute the mean cross-entropy of the tokens of answers, or of the words for imagined cells."""
    hidden, labels = compute_states(model, batch, features, pad, BLUR)
    if batch[0].imagined:
        ends = [(row, len(c.tokens) - len(c.imagined), len(c.tokens)) for row, c in enumerate(batch)]
        cells = torch.cat([hidden[row, first:end] for row, first, end in ends])
        words = torch.tensor([pair for c in batch for pair in c.imagined])
        scores = model.lm_head(cells)
        return (cross_entropy(scores, words[:, 0]) + cross_entropy(scores, words[:, 1])) / 2
    said = labels[:, 1:] >= 0
    return cross_entropy(model.lm_head(hidden[:, :-1][said]), labels[:, 1:][said])


def draw_side(rng: Random, progress: float) -> int:
    """Draw the side of the visible window. The largest side grows with progress; smaller ones stay in the mixture."""
    largest = CELLS
    if progress < 0.3:
        largest = 2
    if progress < 0.12:
        largest = 1
    return largest if rng.random() < 0.8 else rng.randint(1, 2)


def draw_kind(rng: Random, progress: float) -> str:
    """Draw the kind of conversation: at first only naming, then also answering and imagining, then all kinds."""
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
    vision_recipe = VisionRecipe(recipe.vision_steps, recipe.vision_lr, recipe.embedding_std)
    teach_vision(model, tokenizer, processor, vision_recipe, rng)
    # The vision tower is frozen now, so the features of the pictures that conversations are about are computed once.
    scenes: list[Scene] = []
    while len(scenes) < recipe.pictures:
        scene = sample_scene(rng, mixture)
        if not scene.held_out:
            scenes.append(scene)
    chunks = [scenes[i : i + 256] for i in range(0, len(scenes), 256)]
    with torch.no_grad():
        features = torch.cat([encode_pictures(model, make_patches(processor, chunk)) for chunk in chunks])
    # Conversations become harder with progress: more kinds of them, about larger parts of a picture.
    draw = Conversations(tokenizer, scenes, rng, mixture).draw
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    bar = tqdm(range(recipe.steps), desc="mllm language", mininterval=5)
    model.train()
    for step in bar:
        progress = step / recipe.steps
        optimizer.param_groups[0]["lr"] = recipe.lr * scale_rate(step, recipe.steps, 40)
        kind = draw_kind(rng, progress)
        side = draw_side(rng, progress)
        seen = progress < 0.12 or rng.random() > (recipe.told_imagined if kind == "imagine" else recipe.told)
        count = recipe.batch_size * (1 if side == CELLS or kind == "text" else 2)
        batch = [draw(kind, side, seen) for _ in range(count)]
        loss = compute_loss(model, batch, features, tokenizer.pad_token_id)
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
    """Make the config of the architecture with the tokenizer's vocabulary and special tokens."""
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
