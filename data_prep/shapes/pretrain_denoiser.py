"""Pre-trains the denoiser of the shapes world without prompts, on pictures of one object.

It learns what objects look like. How many there are, of what kind and where, it learns later from prompts.
"""

import math
from random import Random
from typing import Any

import torch
from diffusers import SanaTransformer2DModel
from torch import Tensor
from tqdm.auto import tqdm

from data_prep.shapes.scene import BACKGROUNDS, CELLS, COLORS, GLYPHS, Item, Scene
from tbac.flow import NUM_TIMESTEPS, compute_velocity_loss, interpolate, sample_sigma


def draw_lone_scenes(rng: Random, count: int) -> list[Scene]:
    """Draw scenes of one object at any place, none of which is held out."""
    scenes: list[Scene] = []
    while len(scenes) < count:
        item = Item(rng.choice(list(GLYPHS)), rng.choice(list(COLORS)), rng.randrange(CELLS), rng.randrange(CELLS))
        scene = Scene(rng.choice(list(BACKGROUNDS)), (item,))
        if not scene.held_out:
            scenes.append(scene)
    return scenes


def pretrain_denoiser(
    architecture: dict[str, Any], latents: Tensor, steps: int, batch_size: int, lr: float, seed: int
) -> SanaTransformer2DModel:
    """Train a `SanaTransformer2DModel` on latents with an all-zero context.

    Args:
        architecture: constructor arguments.
        latents: scaled latents (picture, channel, height, width).
        steps: optimizer steps.
        batch_size: pictures per step.
        lr: peak learning rate.
        seed: of weights, data order and noise.
    """
    # An all-zero context stands for a prompt that says nothing.
    torch.manual_seed(seed)
    model = SanaTransformer2DModel(**architecture)
    context = torch.zeros(batch_size, 1, model.config.caption_channels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, fused=True)
    # The same flow-matching loss as in training: warm-up over 50 steps, then a cosine.
    bar = tqdm(range(steps), desc="denoiser", mininterval=5)
    for step in bar:
        scale = min(1.0, (step + 1) / 50) * max(0.1, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = lr * scale
        batch = latents[torch.randint(len(latents), (batch_size,))]
        path = interpolate(batch, torch.randn_like(batch), sample_sigma(batch_size))
        predicted = model(path.noisy, context, NUM_TIMESTEPS * path.sigma, return_dict=False)[0]
        loss = compute_velocity_loss(predicted, path.velocity)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 25 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()
