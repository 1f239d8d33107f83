"""The planner's memory against what a training step really takes."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from experiments.budget import Setting, build_on_meta, estimate_memory
from experiments.costs import Case, measure_activations
from experiments.reports import format_table
from experiments.speed.measure import MIB, in_child
from experiments.speed.training import CHECKPOINTED, OURS, one_side, training_cases


def planned_mib(cfg: dict[str, Any], case: Case, checkpointing: bool) -> float:
    """What the planner says of a step of the benchmark, which also holds parts that training doesn't read."""
    mixed = cfg["precision"] == "bf16-mixed"
    model, dtype = build_on_meta(cfg["model"]), cfg["model"]["dtype"]
    setting = Setting("adamw", None, checkpointing, False, "auto", 1, mixed, cached=False)
    kept = measure_activations(cfg["model"], case, cfg["latent_side"], mixed)
    planned = sum(estimate_memory(model, dtype, setting, kept, case.batch).values())
    size = 2 if dtype == "bfloat16" else 4
    unread: list[nn.Module] = list(model.mllm.body.language_model.layers[model.ladder.plan.deepest :])
    return (planned + size * sum(p.numel() for layer in unread for p in layer.parameters())) / MIB


def bench_memory(cfg: dict[str, Any], device: torch.device) -> Iterator[dict[str, Any]]:
    """Planned and measured peaks of the shortest text and the longest prompt, with and without checkpointing."""
    rows, peaks = [], {}
    for case in _shortest_and_longest(cfg):
        for name in (OURS, CHECKPOINTED):
            measured = in_child(one_side, name, cfg, device.type, case, 0)["memory"]["peak_mib"]
            planned = planned_mib(cfg, case, name == CHECKPOINTED)
            peaks[f"{name}; {case.name}, {case.tokens}"] = {"planned_mib": planned, "measured_mib": measured}
            label = [f"{name}; {case.name}, {case.tokens} tokens, batch {case.batch}"]
            rows.append([*label, f"{planned:,.0f}", f"{measured:,.0f}", f"{planned / measured:.2f}"])
            table = format_table(["training step", "planned MiB", "measured MiB", "planned / measured"], rows)
            yield {"peaks": peaks, "table": table}
    worst = max(abs(p["planned_mib"] / p["measured_mib"] - 1) for p in peaks.values())
    yield {"peaks": peaks, "table": table, "line": f"the planner is off by {100 * worst:.0f} % at most"}


def _shortest_and_longest(cfg: dict[str, Any]) -> list[Case]:
    cases = training_cases(cfg)
    return [cases[0], cases[-1]]
