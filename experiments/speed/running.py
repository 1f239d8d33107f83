"""Runs the parts of a benchmark one after the other, each in a process of its own with a time limit.

What a part has found is written as soon as it is there, as JSON and as text, so that a benchmark which is cut off keeps
what it has, and goes on with what is missing when it is started again.
"""

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from experiments.speed.measure import ChildError, in_child
from tbac.files import write_whole

Part = Callable[[dict[str, Any], torch.device], dict[str, Any] | Iterator[dict[str, Any]]]


def run_parts(parts: Mapping[str, Part], cfg: dict[str, Any], device: torch.device, out: Path) -> dict[str, Any]:
    """What each part has found; one that failed or was too slow has an `error` beside what it had found by then.

    Args:
        parts: by name, in the order in which they run.
        cfg: of the benchmark; `limits_s` holds the seconds that a part may take.
        device: what is measured.
        out: folder for `<part>.json` and `<part>.md`.
    """
    out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a part that runs is ended, too
    wanted = digest_of(cfg)
    found: dict[str, Any] = {}
    for name, part in parts.items():
        file = out / f"{name}.json"
        kept = read_finished(file, wanted)
        if kept is not None:
            found[name] = kept
            print(f"{name}: kept from {file}", flush=True)
            continue
        started = time.monotonic()
        try:
            found[name] = in_child(part, cfg, device, limit_s=cfg["limits_s"].get(name))
        except ChildError as error:
            found[name] = {**(error.partial or {}), "error": str(error)}
        seconds = time.monotonic() - started
        kept = {"digest": wanted, "seconds": round(seconds, 1), **found[name]}
        write_whole(file, f"{json.dumps(kept, indent=2)}\n".encode())
        write_whole(out / f"{name}.md", f"{format_result(found[name])}\n".encode())
        said = found[name].get("error", found[name].get("line", "done")).strip().splitlines()[-1]
        print(f"{name} ({seconds:.0f} s): {said}", flush=True)
    return found


def format_result(result: Mapping[str, Any]) -> str:
    """What a part has found as text: its table, and why it failed where it did."""
    return "\n\n".join(result[key] for key in ("table", "error") if key in result)


def digest_of(cfg: dict[str, Any]) -> str:
    """By which results of another config are told apart; which parts run, and how long they may take, don't matter."""
    measured = {k: v for k, v in cfg.items() if k not in ("parts", "limits_s", "out")}
    return sha256(json.dumps(measured, sort_keys=True, default=str).encode()).hexdigest()


def read_finished(file: Path, digest: str) -> dict[str, Any] | None:
    """What a part found in an earlier run with the same config; None where it has to run."""
    try:
        kept = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return kept if kept.get("digest") == digest and "error" not in kept else None
