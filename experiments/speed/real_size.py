"""One training step of ours alone, with its peak memory: whether real sizes fit."""

import gc
import time
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from torch import nn

from experiments.costs import make_inputs
from experiments.reports import format_table
from experiments.speed.measure import status
from experiments.speed.training import make_model, targets, training_cases
from tbac.training.module import LadderTuningModule
from tbac.training.optimizers import make_parameter_groups
from tbac.training.stages import Stage
from tbac.types import Batch

GIB = 1024**3


def bench_step(cfg: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Forward, backward, clipping and optimizer step of the first case."""
    model = make_model(cfg["model"], device.type)
    optimizer_of = instantiate(cfg["optim"])
    module = LadderTuningModule(model, Stage("bench", optimizer_of, optimizer_of, steps=1, weight_decay=0.05))
    if cfg["precision"] == "bf16-true":
        module.to(torch.bfloat16)  # ladder and denoiser; the frozen parts have their own type
    gc.collect()
    case = training_cases(cfg)[0]
    inputs = make_inputs(model, case, cfg["shared_tokens"])
    latents, noise, sigma = targets(model, case.batch, cfg["latent_side"])
    optimizer = optimizer_of(make_parameter_groups([model.ladder, model.denoiser], 0.05))
    before = model.denoiser.transformer.proj_out.weight.detach().clone()
    Path("/proc/self/clear_refs").write_text("5")
    started = time.perf_counter()
    loss = module.compute_loss(Batch(inputs, [""] * case.batch), noise, sigma, latents)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(module.parameters(), 0.5)
    optimizer.step()
    seconds = time.perf_counter() - started
    if not torch.isfinite(norm) or torch.equal(before, model.denoiser.transformer.proj_out.weight):
        raise RuntimeError(f"the step changed nothing or isn't finite: loss {loss.item()}, gradient norm {norm.item()}")
    found = {
        "loss": loss.item(),
        "gradient_norm": norm.item(),
        "seconds": round(seconds, 1),
        "peak_gib": round(status("VmHWM") / GIB, 2),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    rows = [[name.replace("_", " "), value] for name, value in found.items()]
    return {**found, "table": format_table([f"{case.name}, {case.tokens} tokens, batch {case.batch}", ""], rows)}
