"""Where the time of a training step goes on the device, by families of kernels, and how long it waits for launches."""

import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch

from experiments.reports import format_table
from experiments.speed.measure import record_kernels, wait_for
from experiments.speed.training import (
    COMPILED,
    COMPILED_GRAPHED,
    GRAPHED,
    OURS,
    Side,
    arguments_of,
    failures_of,
    find_shortest_and_longest,
    make_model,
)

HEADER = ["step", "family", "ms", "kernels"]
# Families by what the names of kernels (of operators, on a CPU) hold; the first that fits.
FAMILIES = {
    "attention": ("flash", "fmha", "attention", "softmax"),
    "matrix products": (
        "gemm",
        "nvjet",
        "cutlass",
        "xmma",
        "aten::mm",
        "aten::bmm",
        "addmm",
        "baddbmm",
        "cublas",
        "splitk",
    ),
    "convolutions": ("conv", "cudnn", "depthwise", "dgrad", "wgrad"),
    "optimizer and norms of gradients": ("multi_tensor", "adam", "foreach", "lpnorm"),
    "compiled": ("triton",),
    "copies and casts": ("copy", "memcpy", "memset", "cat"),
    "reductions": ("reduce", "sum", "mean", "norm"),
    "elementwise": ("elementwise", "vectorized", "aten::mul", "aten::add", "silu", "gelu"),
}


def family_of(kernel: str) -> str:
    """The family that a kernel's name says it belongs to."""
    name = kernel.lower()
    for family, words in FAMILIES.items():
        if any(word in name for word in words):
            return family
    return "other"


def bench_kernels(cfg: dict[str, Any], device: torch.device) -> Iterator[dict[str, Any]]:
    """Milliseconds of one step by family, of the sides that differ in their kernels; given anew after each step."""
    model, rows, steps = make_model(cfg["model"], device.type), [], {}
    optimizer = None
    for name in (OURS, GRAPHED, COMPILED, COMPILED_GRAPHED):
        if name not in cfg["sides"]:
            continue
        side = Side(name, model, cfg, optimizer)
        optimizer = side.optimizer
        for case in find_shortest_and_longest(cfg):
            # Compilers and libraries set themselves up in the first steps.
            arguments = arguments_of(model, case, cfg)
            if failures_of({name: side}, arguments):
                continue
            for _ in range(2):
                side.step(*arguments)
            # Without the profiler, which slows the launches, then with it.
            wait_for(device)
            started = time.perf_counter()
            side.step(*arguments)
            wait_for(device)
            wall_ms = 1000 * (time.perf_counter() - started)
            label = f"{name}; {case.name}, {case.tokens}"
            steps[label] = profile_step(side, arguments, device) | {"wall_ms": round(wall_ms, 2)}
            rows += _list_families(label, steps[label])
            side.forget_graphs()
            yield {"steps": steps, "table": format_table(HEADER, rows)}
    busy = {label: f"{100 * step['busy_ms'] / step['wall_ms']:.0f} %" for label, step in steps.items()}
    yield {"steps": steps, "table": format_table(HEADER, rows), "line": f"busy: {busy}"}


def _list_families(label: str, step: dict[str, Any]) -> list[list[Any]]:
    """Rows of a step's table: its families, those that take longest first, and all of them together."""
    families = sorted(step["families_ms"].items(), key=lambda item: -item[1])
    rows = [[label, family, f"{ms:.2f}", step["counts"][family]] for family, ms in families]
    total = f"{step['busy_ms']:.2f}; {step['wall_ms']:.2f}"
    return [*rows, [label, "all; without a profiler", total, step["kernels"]]]


def profile_step(side: Side, arguments: tuple, device: torch.device) -> dict[str, Any]:
    """Milliseconds and counts of one step's kernels by family, and the kernels that take longest."""
    with record_kernels(device) as recorded:
        side.step(*arguments)
        wait_for(device)
    times: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    each: list[tuple[str, float]] = []
    for event in recorded.key_averages():
        on_device = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        is_kernel = device.type != "cuda" or event.device_type == torch.autograd.DeviceType.CUDA
        if not on_device or not is_kernel or event.key.startswith("Optimizer."):  # a range around kernels, not one
            continue
        family = family_of(event.key)
        times[family] += on_device / 1000
        counts[family] += event.count
        each.append((event.key[:80], round(on_device / 1000, 3)))
    return {
        "families_ms": {name: round(ms, 3) for name, ms in times.items()},
        "counts": dict(counts),
        "busy_ms": round(sum(times.values()), 2),
        "kernels": sum(counts.values()),
        "longest": sorted(each, key=lambda item: -item[1])[:25],
    }
