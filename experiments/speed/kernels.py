"""Where the time of a training step goes on the device, by families of kernels, and how long it waits for launches."""

import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from experiments.reports import format_table
from experiments.speed.measure import wait_for
from experiments.speed.training import (
    COMPILED,
    COMPILED_GRAPHED,
    OURS,
    Side,
    arguments_of,
    failures_of,
    make_model,
    training_cases,
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
    """Milliseconds of one step by family, of every kind of prompt, plain and compiled where the sides name it."""
    model, rows, found = make_model(cfg["model"], device.type), [], {}
    optimizer = None
    for name in (side for side in (OURS, COMPILED, COMPILED_GRAPHED) if side in cfg["sides"]):
        side = Side(name, model, cfg, optimizer)
        optimizer = side.optimizer
        for case in (training_cases(cfg)[0], training_cases(cfg)[-1]):
            arguments = arguments_of(model, case, cfg)
            if failures_of({name: side}, arguments):
                continue
            for _ in range(2):
                side.step(*arguments)
            wait_for(device)
            started = time.perf_counter()
            side.step(*arguments)
            wait_for(device)
            wall_ms = 1000 * (time.perf_counter() - started)
            label = f"{name}; {case.name}, {case.tokens}"
            found[label] = one = profile_step(side, arguments, device) | {"wall_ms": round(wall_ms, 2)}
            families = sorted(one["families_ms"].items(), key=lambda item: -item[1])
            rows += [[label, family, f"{ms:.2f}", one["counts"][family]] for family, ms in families]
            side.forget_graphs()
            yield {"steps": found, "table": format_table(HEADER, rows)}
            rows.append([label, "all; without a profiler", f"{one['busy_ms']:.2f}; {wall_ms:.2f}", one["kernels"]])
        del side
    busy = {label: f"{100 * one['busy_ms'] / one['wall_ms']:.0f} %" for label, one in found.items()}
    table = format_table(["step", "family", "ms", "kernels"], rows)
    tops = "\n".join(
        f"{label}: " + "; ".join(f"{n} {ms:.2f}" for n, ms in one["longest"]) for label, one in found.items()
    )
    return {"steps": found, "table": f"{table}\n\n{tops}", "line": f"busy: {busy}"}


def profile_step(side: Side, arguments: tuple, device: torch.device) -> dict[str, Any]:
    """Milliseconds and counts of one step's kernels by family, and the ten kernels that take longest."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as recorded:
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
