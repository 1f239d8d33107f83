"""What the benchmark measures, part by part, and what it refuses to measure."""

import gc
import platform
from typing import Any

import torch

from experiments.speed.cached import bench_cached
from experiments.speed.loader import bench_loader
from experiments.speed.real_size import bench_step
from experiments.speed.sampling import bench_sampling
from experiments.speed.training import BASELINE, OURS, SIDES, bench_batches, bench_training
from tbac.app import pick_device

PARTS = {
    "training": bench_training,
    "sampling": bench_sampling,
    "cached": bench_cached,
    "loader": bench_loader,
    "batches": bench_batches,
    "step": bench_step,
}


def check(cfg: dict[str, Any]) -> None:
    """Raise ValueError for what can't be measured."""
    if wrong := [part for part in cfg["parts"] if part not in PARTS]:
        raise ValueError(f"parts may hold {', '.join(PARTS)}; got {wrong[0]!r}")
    sides = cfg["sides"]
    if sides[:2] != [BASELINE, OURS] or set(sides) - set(SIDES):
        raise ValueError(f"sides must begin with {BASELINE}, {OURS} and hold no others than {SIDES}; got {sides}")
    device = pick_device(cfg["device"])
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={cfg['device']}: this computer has no CUDA device; device=cpu runs anywhere")
    if "batches" in cfg["parts"] and device.type != "cuda":
        raise ValueError(f"parts=[batches] caps the memory of a GPU, and device={cfg['device']} is none")
    accepted = ("32-true", "bf16-true") if "step" in cfg["parts"] else ("32-true", "bf16-mixed")
    if cfg["precision"] not in accepted:
        raise ValueError(f"precision must be {' or '.join(accepted)} for these parts, got {cfg['precision']!r}")
    if "step" in cfg["parts"] and len(cfg["parts"]) > 1:
        raise ValueError(f"parts=[step] measures a fresh process, so it comes alone; got {cfg['parts']}")
    if not cfg["tokens"] or min(cfg["tokens"]) <= cfg["shared_tokens"]:
        raise ValueError(f"every entry of tokens must exceed shared_tokens={cfg['shared_tokens']}, got {cfg['tokens']}")
    for name, value in (
        ("repeats", cfg["repeats"]),
        ("turns", cfg["turns"]),
        ("sampling.repeats", cfg["sampling"]["repeats"]),
        ("loader.repeats", cfg["loader"]["repeats"]),
        ("loader.batches", cfg["loader"]["batches"]),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if (count := cfg["loader"]["memory_samples"]) < 500:
        raise ValueError(f"loader.memory_samples must be at least 500, got {count}")


def bench(cfg: dict[str, Any]) -> dict[str, Any]:
    """Everything that the config asks for."""
    device = pick_device(cfg["device"])
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads",
        "machine": platform.machine(),
        "torch": torch.__version__,
        "precision": cfg["precision"],
        "repeats": cfg["repeats"],
        "config": cfg,
    }
    for part in cfg["parts"]:
        report[part] = PARTS[part](cfg, device)
        gc.collect()
    return report
