"""Measuring: interleaved times, memory, tables."""

import ctypes
import gc
import multiprocessing
import statistics
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

MIB = 1024**2


def interleaved(sides: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each side, run in turn, so that what disturbs the machine disturbs all alike; one round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(repeats + 1):
        for name, run in sides.items():
            wait_for(device)
            started = time.perf_counter()
            run()
            wait_for(device)
            if round_:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def summary(seconds: Mapping[str, list[float]], baseline: str, ours: str) -> dict[str, Any]:
    """Medians, spread, and the ratio of the medians."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "median_s": {name: round(value, 4) for name, value in medians.items()},
        "min_s": {name: round(min(values), 4) for name, values in seconds.items()},
        "max_s": {name: round(max(values), 4) for name, values in seconds.items()},
        "ratio": round(medians[baseline] / medians[ours], 3),
    }


class Memory:
    """MiB that stand when work begins, and their peak until it ends.

    On a GPU the allocator's own figures. On the CPU resident memory, above what there was when this was made; use it in
    a process of its own.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.before = 0 if self.cuda else status("VmRSS")
        self.standing = 0

    def begin(self) -> None:
        """What has been built stands; the peak counts from here."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.standing = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # what building the model freed
            Path("/proc/self/clear_refs").write_text("5")
            self.standing = status("VmRSS") - self.before

    def end(self) -> dict[str, float]:
        peak = torch.cuda.max_memory_allocated() if self.cuda else status("VmHWM") - self.before
        return {"standing_mib": round(self.standing / MIB, 1), "peak_mib": round(peak / MIB, 1)}


def in_child(work: Callable[..., Any], *arguments: Any) -> Any:
    """`work(*arguments)` in a process of its own, whose memory is its own.

    It is forked from one that has imported what the work needs and has done nothing else.

    Raises:
        RuntimeError: with the child's traceback, or when it ends without a result.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([work.__module__])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run_in_child, args=(work, arguments, sender, torch.get_num_threads()))
    process.start()
    sender.close()
    try:
        result, problem = receiver.recv()
    except EOFError:
        result, problem = None, "it ended without a result; was it killed for its memory?"
    process.join()
    if problem:
        raise RuntimeError(f"{work.__name__} failed in a process of its own: {problem}")
    return result


def _run_in_child(work: Callable[..., Any], arguments: tuple, sender: Any, threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        sender.send((work(*arguments), None))
    except Exception:  # noqa: BLE001 (the parent raises it)
        sender.send((None, traceback.format_exc()))


def status(name: str) -> int:
    """A figure of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def largest_batch(step: Callable[[int], Any], cap_bytes: int, limit: int = 512) -> int:
    """The largest batch whose step fits when a GPU's allocator may use `cap_bytes`; 0 when not even one sample fits."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, cap_bytes / total))

    def fits(batch: int) -> bool:
        torch.cuda.empty_cache()
        try:
            step(batch)
            torch.cuda.synchronize()
        except torch.OutOfMemoryError:
            return False
        return True

    try:
        return search_largest(fits, limit)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


def search_largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number up to `limit` that fits, if all below it do; 0 when 1 doesn't."""
    if not fits(1):
        return 0
    low = 1
    while low * 2 <= limit and fits(low * 2):
        low *= 2
    high = min(low * 2, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int, repeats: int = 20) -> float:
    """Measured FLOP per second of a square matrix product: what a device really gives at best."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = interleaved({"matmul": lambda: a @ b}, repeats, device)["matmul"]
    return 2 * size**3 / statistics.median(seconds)


def wait_for(device: torch.device) -> None:
    """Until what was given to a GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
