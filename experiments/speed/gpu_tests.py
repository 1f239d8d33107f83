"""The tests that need a GPU, as a part of the benchmark: what is fast must first be right."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


def run_gpu_tests(cfg: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Run every test marked `gpu`; without a GPU they are only collected.

    Raises:
        RuntimeError: with the end of their output, when one fails.
    """
    only_collect = [] if device.type == "cuda" else ["--collect-only"]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "tests/gpu", *only_collect]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"tests failed\n{done.stdout[-6000:]}\n{done.stderr[-1000:]}")
    said = done.stdout.strip().splitlines()[-1]
    return {"output": done.stdout[-3000:], "table": said, "line": said}
