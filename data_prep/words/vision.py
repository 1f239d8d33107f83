"""Trains a vision tower for a language model that was trained on text alone, and that stays as it is.

At first each image token is fitted to the embeddings of the words for what it shows, as in the shapes world. Then the
tower learns to have questions answered: the loss is that of the language model's answers, and only the tower learns.
"""

from dataclasses import dataclass, replace
from random import Random

import torch
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

from data_prep.shapes.conversations import Conversation, Conversations
from data_prep.shapes.pretrain_mllm import compute_states
from data_prep.shapes.scene import CELLS, Scene, sample_scene
from data_prep.shapes.vision_teacher import VisionRecipe, encode_pictures, make_patches, scale_rate, teach_vision


@dataclass(frozen=True)
class Recipe:
    """How the vision tower is trained.

    Args:
        word_steps: steps in which image tokens are fitted to the embeddings of words.
        steps: steps in which questions are answered.
        batch_size: pictures per step, with six questions each.
        word_lr: peak learning rate of the former steps.
        lr: that of the latter.
        pictures: how many different pictures questions are about.
    """

    word_steps: int = 150
    steps: int = 300
    batch_size: int = 4
    word_lr: float = 3e-3
    lr: float = 1e-3
    pictures: int = 4000


def train_vision_tower(
    model: Qwen2_5_VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    processor: Qwen2VLImageProcessorPil,
    recipe: Recipe,
    seed: int,
) -> None:
    """Train the vision tower of a model, whose other weights stay as they are.

    Args:
        model: its vision tower must be in float32; the rest may have another type.
        tokenizer: with the tokens for pictures.
        processor: of images.
        recipe: how long and how fast.
        seed: of the data.
    """
    torch.manual_seed(seed)
    rng = Random(f"words vision/{seed}")
    model.requires_grad_(False)
    tower = model.model.visual.requires_grad_(True)
    spread = model.get_input_embeddings().weight.float().std().item()
    teach_vision(model, tokenizer, processor, VisionRecipe(recipe.word_steps, recipe.word_lr, spread), rng)
    # Now through the language model, about scenes as training has them.
    scenes: list[Scene] = []
    while len(scenes) < recipe.pictures:
        scene = sample_scene(rng)
        if not scene.held_out:
            scenes.append(scene)
    patches = make_patches(processor, scenes)
    conversations = Conversations(tokenizer, scenes, rng)
    trained = list(tower.requires_grad_(True).parameters())
    optimizer = torch.optim.AdamW(trained, lr=recipe.lr, weight_decay=0.01, fused=True)
    bar = tqdm(range(recipe.steps), desc="vision tower", mininterval=5)
    for step in bar:
        optimizer.param_groups[0]["lr"] = recipe.lr * scale_rate(step, recipe.steps, 20)
        batch = [conversations.draw("answer", CELLS) for _ in range(recipe.batch_size)]
        features = encode_pictures(model, patches[[conversation.picture for conversation in batch]])
        loss = compute_answer_loss(model, batch, features, tokenizer.pad_token_id)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if step % 25 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    model.requires_grad_(False)


def compute_answer_loss(
    model: Qwen2_5_VLForConditionalGeneration, batch: list[Conversation], features: torch.Tensor, pad: int
) -> torch.Tensor:
    """Compute the mean cross-entropy of the answers' tokens.

    Args:
        model: the language model.
        batch: conversations with visible pictures.
        features: (conversation, cell, hidden), of the picture of each.
        pad: id of the padding token.
    """
    dtype = model.get_input_embeddings().weight.dtype
    own = [replace(conversation, picture=index) for index, conversation in enumerate(batch)]
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        hidden, labels = compute_states(model, own, features.to(dtype), pad)
        said = labels[:, 1:] >= 0
        scores = model.lm_head(hidden[:, :-1][said])
    return cross_entropy(scores.float(), labels[:, 1:][said])
