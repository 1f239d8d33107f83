"""Measures the MLLM with fewer bits: its size, its taps, GenEval's score, and its answers."""

import logging
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from experiments.speed.measure import MIB
from tbac.app import make_part, open_model, read_opening_options
from tbac.evaluation.benchmarks.in_memory import score_in_memory
from tbac.models import UniImage

log = logging.getLogger(__name__)
OPTIONS: dict[str, tuple[str, str | None]] = {
    "float32": ("float32", None),
    "bfloat16": ("bfloat16", None),
    "int8": ("float32", "int8"),
    "nf4": ("float32", "nf4"),
}


@torch.no_grad()
def read_taps(model: UniImage, prompts: list[str]) -> Tensor:
    """Read the taps of some prompts: (tap, prompt, query, hidden) in float32."""
    inputs, plan = model.prompt(prompts), model.ladder.plan
    prefix = model.mllm.read_prefix(inputs, plan.deepest)
    return model.mllm.read_queries(model.ladder.queries, prefix, plan.layers).float()


def count_layer_bytes(model: UniImage) -> int:
    """Count the bytes of the MLLM's decoder layers; bitsandbytes' scales are included."""
    total = 0
    for module in model.mllm.body.language_model.layers.modules():
        total += sum(p.numel() * p.element_size() for p in module.parameters(recurse=False))
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        total += state.absmax.numel() * state.absmax.element_size() if state is not None else 0
        scales = getattr(getattr(module, "weight", None), "SCB", None)
        total += scales.numel() * scales.element_size() if scales is not None else 0
    return total


def measure_options(cfg: DictConfig) -> list[dict[str, Any]]:
    """Measure every option in turn; returns a row for each."""
    geneval, answers = make_part(cfg.geneval, "geneval"), make_part(cfg.answers, "answers")
    detector = make_part(cfg.judge, "judge")
    prompts = [row["prompt"] for row in geneval.prompts]
    rows: list[dict[str, Any]] = []
    reference: Tensor | None = None
    for name, (dtype, quantization) in OPTIONS.items():
        opening = read_opening_options(cfg) | {"dtype": dtype, "quantization": quantization}
        pipeline = open_model(cfg.checkpoint, **opening)
        # The first option is full precision, whose taps all others are compared with.
        taps = read_taps(pipeline.model, prompts)
        if reference is None:
            reference = taps
        scores = score_in_memory(pipeline, geneval, detector).summary.scores
        rows.append(
            {
                "MLLM layers": name,
                "MiB": round(count_layer_bytes(pipeline.model) / MIB, 2),
                "cosine of taps": torch.nn.functional.cosine_similarity(taps, reference, dim=-1).mean().item(),
                "GenEval rules": scores["overall"],
                "answers": answers.score(pipeline.model).accuracy,
            }
        )
        log.info("%s", rows[-1])
    return rows
