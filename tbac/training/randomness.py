"""Random numbers of training: noise that depends on names alone, and the state of the global generators."""

import hashlib
import random
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from tbac.distributed import get_rank, get_world_size
from tbac.flow import sample_sigma
from tbac.training.stages import FlowOptions

ONE_NOISE = FlowOptions()


def seed_everything(seed: int) -> None:
    """Seed the generators of Python, NumPy and torch, and those of the loader's processes."""
    L.seed_everything(seed, verbose=False)


def draw_noise(names: list[str], latents: Tensor, flow: FlowOptions = ONE_NOISE) -> tuple[Tensor, Tensor]:
    """Draw noise and sigmas that depend only on a sample's name, not on batch, device or number of processes.

    Args:
        names: one per sample.
        latents: (batch, channel, height, width); the noise gets their shape, type and device.
        flow: how sigmas are drawn, and how many draws (k) each sample gets.

    Returns:
        Noise (batch * k, channel, height, width) and sigmas (batch * k,); draws of one sample are next to each other.
    """
    noise, sigma = [], []
    for name in names:
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
        generator = torch.Generator().manual_seed(seed)
        noise.append(torch.randn((flow.noise_samples_per_prompt, *latents.shape[1:]), generator=generator))
        sigma.append(sample_sigma(flow.noise_samples_per_prompt, generator, scheme=flow.scheme, shift=flow.shift))
    all_noise, all_sigmas = torch.cat(noise), torch.cat(sigma)
    if latents.is_cuda:  # a copy from memory that isn't pinned would wait for the device
        all_noise, all_sigmas = all_noise.pin_memory(), all_sigmas.pin_memory()
    return all_noise.to(latents, non_blocking=True), all_sigmas.to(latents.device, non_blocking=True)


def read_random_state() -> dict[str, Any]:
    """Read the state of this process's global generators, which users' code may draw from; training itself doesn't."""
    # Only plain lists and tensors, so that a checkpoint can be loaded with `weights_only`.
    version, numbers, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    words = numpy_state["state"]["key"].tolist()
    return {
        "python": [version, list(numbers), gauss],
        "numpy": {**numpy_state, "state": {"key": words, "pos": int(numpy_state["state"]["pos"])}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def check_random_state(states: list[dict[str, Any]]) -> None:
    """Try the states of all processes on generators that nobody uses; raises what a generator raises."""
    for state in states:
        version, numbers, gauss = state["python"]
        random.Random().setstate((version, tuple(numbers), gauss))
        np.random.RandomState().set_state(_read_numpy_state(state))
        torch.Generator().set_state(state["torch"])
        if not all(isinstance(device, Tensor) and device.dtype is torch.uint8 for device in state["cuda"]):
            raise ValueError("the states of CUDA's generators must be tensors of bytes")


def _read_numpy_state(state: dict[str, Any]) -> dict[str, Any]:
    words = np.asarray(state["numpy"]["state"]["key"], np.uint32)
    return {**state["numpy"], "state": {**state["numpy"]["state"], "key": words}}


def set_random_state(states: list[dict[str, Any]]) -> None:
    """Restore the global generators from the states of all processes.

    When the number of processes has changed, they stay as they were seeded.
    """
    if len(states) != get_world_size():
        return
    state = states[get_rank()]
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(_read_numpy_state(state))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
