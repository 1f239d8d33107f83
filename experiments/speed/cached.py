"""A training step of edits on cached latents against the same step on the target images."""

import gc
from typing import Any

import torch
from torch import Tensor

from experiments.costs import Case, count_autoencoder_flops, count_sample_flops, make_inputs
from experiments.reports import format_table
from experiments.speed.measure import Memory, in_child, interleaved, summary
from experiments.speed.training import OURS, Side, autocast, make_model, targets
from tbac.models import UniImage
from tbac.training.module import get_latents
from tbac.types import Batch

IMAGES, LATENTS = "images", "cached latents"


def cases_of(cfg: dict[str, Any]) -> list[Case]:
    """Text alone, and an image with text: stage 1 and stage 2."""
    options = cfg["cached"]
    return [
        Case("text", options["tokens"], options["batch"]),
        Case("image + text", options["tokens"], options["batch"], options["image_side"]),
    ]


def model_config(cfg: dict[str, Any]) -> dict[str, Any]:
    """The model with an encoder that has about the share of the cost that it has in the real one."""
    architecture = cfg["model"]["architecture"]
    return {
        **cfg["model"],
        "architecture": {
            **architecture,
            "autoencoder": {**architecture["autoencoder"], **cfg["cached"]["autoencoder"]},
        },
    }


class CachedStep:
    """Steps on a fixed batch.

    Args:
        model: trains.
        case: its prompts.
        cfg: of the benchmark.
    """

    def __init__(self, model: UniImage, case: Case, cfg: dict[str, Any]) -> None:
        self.side, self.cfg = Side(OURS, model, cfg), cfg
        self.model = model
        inputs = make_inputs(model, case, cfg["shared_tokens"])
        _, self.noise, self.sigma = targets(model, case.batch, cfg["latent_side"])
        side = cfg["latent_side"] * model.autoencoder.compression
        generator = torch.Generator().manual_seed(2)
        pixels = (torch.rand(case.batch, 3, side, side, generator=generator) * 2 - 1).to(model.device)
        keys = [""] * case.batch
        self.batches = {IMAGES: Batch(inputs, keys, pixels=pixels), LATENTS: Batch(inputs, keys)}

    def cache(self) -> None:
        """Encode the images once; steps on latents take these."""
        self.batches[LATENTS].latents = self._latents(self.batches[IMAGES])

    def loss(self, name: str) -> float:
        """Loss of the batch, by one of both ways."""
        batch = self.batches[name]
        with torch.no_grad():
            return self.side.loss(batch.prompt, self._latents(batch), self.noise, self.sigma).item()

    def step(self, name: str) -> None:
        batch = self.batches[name]
        self.side.step(batch.prompt, self._latents(batch), self.noise, self.sigma)

    def _latents(self, batch: Batch) -> Tensor:
        with autocast(self.cfg, self.model.device):
            return get_latents(self.model, batch)


def memory_alone(name: str, cfg: dict[str, Any], device: str, case: Case) -> dict[str, float]:
    """Memory of steps in a process of their own, without the parts of the autoencoder that they don't read."""
    memory = Memory(torch.device(device))
    model = make_model(model_config(cfg), device)
    steps = CachedStep(model, case, cfg)
    if name == LATENTS:
        steps.cache()
        model.autoencoder.model.encoder.to("meta")
        steps.batches[IMAGES].pixels = None
    model.autoencoder.model.decoder.to("meta")
    gc.collect()
    memory.begin()
    for _ in range(2):
        steps.step(name)
    return memory.end()


def bench_cached(cfg: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Seconds and memory of both ways, after their losses were found equal.

    Raises:
        RuntimeError: when they aren't.
    """
    config, cases, rows = model_config(cfg), {}, []
    for case in cases_of(cfg):
        model = make_model(config, device.type)
        encoder = count_autoencoder_flops(config, cfg["latent_side"] * model.autoencoder.compression)
        steps = CachedStep(model, case, cfg)
        steps.cache()
        losses = {name: steps.loss(name) for name in (IMAGES, LATENTS)}
        if abs(losses[IMAGES] - losses[LATENTS]) > 1e-5 * losses[IMAGES]:
            raise RuntimeError(f"the losses on images and on their latents differ: {losses}")
        runs = {name: (lambda n=name, s=steps: s.step(n)) for name in (IMAGES, LATENTS)}
        found = summary(interleaved(runs, cfg["repeats"], device), IMAGES, LATENTS)
        del model, steps, runs
        gc.collect()
        memory = {name: in_child(memory_alone, name, cfg, device.type, case) for name in (IMAGES, LATENTS)}
        other = sum(count_sample_flops(config, case, cfg["latent_side"]).values())
        found |= {"losses": losses, "memory": memory, "encoder_share": encoder / (encoder + other)}
        cases[case.name] = found
        peaks = [memory[name]["peak_mib"] for name in (IMAGES, LATENTS)]
        median = found["median_s"]
        times = [f"{median[IMAGES]:.3f}", f"{median[LATENTS]:.3f}", f"{found['ratio']:.2f}"]
        sizes = [f"{peaks[0]:,.0f}", f"{peaks[1]:,.0f}", f"{peaks[0] / peaks[1]:.2f}"]
        rows.append([case.name, case.batch, *times, *sizes, f"{100 * found['encoder_share']:.0f} %"])
    header = ["prompt", "batch", "images, s", "latents, s", "ratio"]
    header += ["images, MiB", "latents, MiB", "ratio", "encoder's share of FLOPs"]
    return {"cases": cases, "table": format_table(header, rows)}
