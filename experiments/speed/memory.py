"""The planner's memory against what a training step really takes."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from experiments.budget import Setting, build_on_meta, estimate_memory
from experiments.costs import Activations, Case, measure_activations
from experiments.reports import format_table
from experiments.speed.measure import MIB, in_child
from experiments.speed.training import CHECKPOINTED, OURS, find_shortest_and_longest, one_side


def planned_mib(cfg: dict[str, Any], case: Case, kept: Activations, checkpointing: bool) -> float:
    """What the planner says of a step of the benchmark, which also holds parts that training doesn't read."""
    model, dtype = build_on_meta(cfg["model"]), cfg["model"]["dtype"]
    setting = Setting("adamw", None, checkpointing, False, "auto", 1, cfg["precision"] == "bf16-mixed", cached=False)
    planned = sum(estimate_memory(model, dtype, setting, kept, case.batch).values())
    size = 2 if dtype == "bfloat16" else 4
    unread: list[nn.Module] = list(model.mllm.body.language_model.layers[model.ladder.plan.deepest :])
    return (planned + size * sum(p.numel() for layer in unread for p in layer.parameters())) / MIB


def bench_memory(cfg: dict[str, Any], device: torch.device) -> Iterator[dict[str, Any]]:
    """Planned and measured peaks of the shortest text and the longest prompt, with and without checkpointing."""
    rows, peaks = [], {}
    for case in find_shortest_and_longest(cfg):
        kept = measure_activations(cfg["model"], case, cfg["latent_side"], cfg["precision"] == "bf16-mixed")
        for name in (OURS, CHECKPOINTED):
            measured = in_child(one_side, name, cfg, device.type, case, 0)["memory"]["peak_mib"]
            planned = planned_mib(cfg, case, kept, name == CHECKPOINTED)
            peaks[f"{name}; {case.name}, {case.tokens}"] = {"planned_mib": planned, "measured_mib": measured}
            label = [f"{name}; {case.name}, {case.tokens} tokens, batch {case.batch}"]
            rows.append([*label, f"{planned:,.0f}", f"{measured:,.0f}", f"{planned / measured:.2f}"])
            table = format_table(["training step", "planned MiB", "measured MiB", "planned / measured"], rows)
            yield {"peaks": peaks, "table": table}
    worst = max(abs(p["planned_mib"] / p["measured_mib"] - 1) for p in peaks.values())
    yield {"peaks": peaks, "table": table, "line": f"the planner is off by {100 * worst:.0f} % at most"}
