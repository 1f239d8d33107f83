"""Speed and memory of a training step and of sampling, the release's way against ours, interleaved.

python experiments/bench/run.py                       (make bench)      on the CPU, with the real model's proportions
python experiments/bench/run.py experiment=bench_gpu  (make bench-gpu)  on a GPU, real sizes, random weights
"""

import gc
import json
import platform
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig

from experiments.bench.sampling import bench_sampling
from experiments.bench.training import bench_batches, bench_compiled, bench_training, make_model
from experiments.common import CONF, keep_freed_memory, pick_device, plain, user_errors

PARTS = {
    "training": bench_training,
    "sampling": bench_sampling,
    "compiled": bench_compiled,
    "batches": bench_batches,
}


def check(cfg: dict[str, Any]) -> None:
    """Raise ValueError for what can't be measured."""
    if wrong := [part for part in cfg["parts"] if part not in PARTS]:
        raise ValueError(f"parts may hold {', '.join(PARTS)}; got {wrong[0]!r}")
    device = pick_device(cfg["device"])
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={cfg['device']}: this computer has no CUDA device; device=cpu runs anywhere")
    if "batches" in cfg["parts"] and device.type != "cuda":
        raise ValueError(f"parts=[batches] caps the memory of a GPU, and device={cfg['device']} is none")
    if cfg["precision"] not in ("32-true", "bf16-mixed"):
        raise ValueError(f"precision must be 32-true or bf16-mixed, got {cfg['precision']!r}")
    if not cfg["tokens"] or min(cfg["tokens"]) <= cfg["shared_tokens"]:
        raise ValueError(f"every entry of tokens must exceed shared_tokens={cfg['shared_tokens']}, got {cfg['tokens']}")
    if cfg["repeats"] < 1 or cfg["sampling"]["repeats"] < 1:
        raise ValueError("repeats and sampling.repeats must be at least 1")


def bench(cfg: dict[str, Any]) -> dict[str, Any]:
    """Everything that the config asks for."""
    device = pick_device(cfg["device"])
    torch.manual_seed(0)
    model = make_model(cfg["model"], device.type)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads",
        "machine": platform.machine(),
        "torch": torch.__version__,
        "precision": cfg["precision"],
        "repeats": cfg["repeats"],
        "config": cfg,
    }
    for part in cfg["parts"]:
        report[part] = PARTS[part](model, cfg, device)
        gc.collect()
    return report


@hydra.main(version_base="1.3", config_path=CONF, config_name="bench")
@user_errors
def main(cfg: DictConfig) -> None:
    keep_freed_memory()
    options = plain(cfg)
    check(options)
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    report = bench(options)
    tables = [f"## {part.capitalize()}\n\n{report[part].pop('table')}" for part in options["parts"]]
    facts = (
        f"{report['device']}, {report['precision']}; medians of {options['repeats']} rounds, each side once in every "
        "round; latents cached on all sides."
    )
    text = "\n\n".join(["# The release's way against ours", facts, *tables]) + "\n"
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    (out / "report.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
