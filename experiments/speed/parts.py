"""What the benchmark measures, part by part, and what it refuses to measure."""

import platform
from pathlib import Path
from typing import Any

import torch

from experiments.speed.cached import bench_cached
from experiments.speed.gpu_tests import run_gpu_tests
from experiments.speed.kept_prompts import bench_prompt_cache
from experiments.speed.kernels import bench_kernels
from experiments.speed.loader import bench_loader
from experiments.speed.measure import bench_rates
from experiments.speed.memory import bench_memory
from experiments.speed.real_size import bench_step
from experiments.speed.running import Part, run_parts
from experiments.speed.sampling import bench_sampling
from experiments.speed.trainer import bench_first_steps, bench_overhead, device_name
from experiments.speed.training import BASELINE, OURS, SIDES, bench_batches, bench_training, count_flops
from tbac.app import pick_device

PARTS: dict[str, Part] = {
    "first_steps": bench_first_steps,
    "rates": bench_rates,
    "flops": count_flops,
    "tests": run_gpu_tests,
    "training": bench_training,
    "memory": bench_memory,
    "overhead": bench_overhead,
    "sampling": bench_sampling,
    "cached": bench_cached,
    "prompt_cache": bench_prompt_cache,
    "loader": bench_loader,
    "batches": bench_batches,
    "kernels": bench_kernels,
    "step": bench_step,
}


def check(cfg: dict[str, Any]) -> None:
    """Raise ValueError for what can't be measured."""
    if wrong := [part for part in cfg["parts"] if part not in PARTS]:
        raise ValueError(f"parts may hold {', '.join(PARTS)}; got {wrong[0]!r}")
    # Sides and device: the release's way and ours are what everything is compared with.
    sides = cfg["sides"]
    if sides[:2] != [BASELINE, OURS] or set(sides) - set(SIDES):
        raise ValueError(f"sides must begin with {BASELINE}, {OURS} and hold no others than {SIDES}; got {sides}")
    device = pick_device(cfg["device"])
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={cfg['device']}: this computer has no CUDA device; device=cpu runs anywhere")
    # Precision: one step alone runs in bfloat16 throughout, to fit; all else as training does.
    accepted = ("32-true", "bf16-true") if "step" in cfg["parts"] else ("32-true", "bf16-mixed")
    if cfg["precision"] not in accepted:
        raise ValueError(f"precision must be {' or '.join(accepted)} for these parts, got {cfg['precision']!r}")
    if "step" in cfg["parts"] and len(cfg["parts"]) > 1:
        raise ValueError(f"parts=[step] measures a fresh process, so it comes alone; got {cfg['parts']}")
    # Sizes: a prompt is longer than what all prompts begin with, and nothing is measured no times.
    lengths = cfg["tokens"]["text"] + cfg["tokens"]["image"]
    if not lengths or min(lengths) <= cfg["shared_tokens"]:
        raise ValueError(f"every entry of tokens must exceed shared_tokens={cfg['shared_tokens']}, got {cfg['tokens']}")
    for name, value in (
        ("repeats", cfg["repeats"]),
        ("turns", cfg["turns"]),
        ("warm_up", cfg["warm_up"]),
        ("prompt_cache.batches", cfg["prompt_cache"]["batches"]),
        ("sampling.repeats", cfg["sampling"]["repeats"]),
        ("loader.repeats", cfg["loader"]["repeats"]),
        ("loader.batches", cfg["loader"]["batches"]),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if (count := cfg["loader"]["memory_samples"]) < 500:
        raise ValueError(f"loader.memory_samples must be at least 500, got {count}")


def bench(cfg: dict[str, Any], out: Path) -> dict[str, Any]:
    """Everything that the config asks for; what is in `out` already, of the same config, is kept."""
    device = pick_device(cfg["device"])
    report: dict[str, Any] = {
        "device": device_name(device),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "precision": cfg["precision"],
        "repeats": cfg["repeats"],
        "config": cfg,
    }
    return report | run_parts({name: PARTS[name] for name in cfg["parts"]}, cfg, device, out)
