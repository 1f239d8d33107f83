"""Pre-trains the autoencoder of the shapes world to reconstruct pictures."""

import math
import time
from random import Random
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderDC
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from data_prep.shapes.scene import BACKGROUNDS, CELLS, COLORS, GLYPHS, Item, Scene, render


def draw_dense_scene(rng: Random, fill: float = 0.6) -> Scene:
    """Draw a scene with objects in most cells, since such a picture teaches many glyphs and colours at once."""
    cells = [(r, c) for r in range(CELLS) for c in range(CELLS) if rng.random() < fill]
    items = (Item(rng.choice(list(GLYPHS)), rng.choice(list(COLORS)), r, c) for r, c in cells)
    return Scene(rng.choice(list(BACKGROUNDS)), tuple(items))


def stack_pixels(images: list[Image.Image]) -> Tensor:
    """Stack images as (image, 3, height, width) in [-1, 1]."""
    return torch.from_numpy(np.stack([np.asarray(i) for i in images])).permute(0, 3, 1, 2).float() / 127.5 - 1


def pretrain_autoencoder(
    architecture: dict[str, Any], steps: int, batch_size: int, lr: float, seed: int, pictures: int = 6000
) -> AutoencoderDC:
    """Train an `AutoencoderDC` to reconstruct dense scenes; its `scaling_factor` gives latents unit variance.

    Args:
        architecture: constructor arguments.
        steps: optimizer steps.
        batch_size: pictures per step.
        lr: peak learning rate.
        seed: of weights and data.
        pictures: how many different ones are drawn.
    """
    # Drawing takes longer than a step, so a few thousand pictures are drawn once and used again.
    torch.manual_seed(seed)
    model = AutoencoderDC(**architecture)
    rng = Random(f"autoencoder/{seed}")
    data = stack_pixels([render(draw_dense_scene(rng)) for _ in range(pictures)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, fused=True)
    started = time.monotonic()
    # Warm-up over 50 steps, then a cosine; the absolute error keeps edges sharp, the squared one fixes colours.
    bar = tqdm(range(steps), desc="autoencoder", mininterval=5)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 50) * max(0.02, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        batch = data[torch.randint(pictures, (batch_size,))]
        restored = model.decode(model.encode(batch).latent).sample
        loss = 0.5 * (restored - batch).abs().mean() + (restored - batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}", seconds=f"{time.monotonic() - started:.0f}")
    # Diffusion expects latents of unit variance.
    model.eval()
    with torch.no_grad():
        spread = model.encode(data[:256]).latent.std().item()
    model.register_to_config(scaling_factor=1 / spread)
    return model
