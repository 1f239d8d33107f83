"""Measuring: interleaved times, memory, tables."""

import ctypes
import gc
import multiprocessing
import statistics
import time
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
            _wait(device)
            started = time.perf_counter()
            run()
            _wait(device)
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


def peak_memory(work: Callable[..., Callable[[], Any]], arguments: tuple, device: torch.device) -> dict[str, float]:
    """MiB that `work(*arguments)` leaves standing, and its peak while what it returns runs twice.

    On a GPU the allocator's own figures. On the CPU resident memory of a process of its own, above what the process had
    before `work` began.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run = work(*arguments)
        standing = torch.cuda.memory_allocated()
        run(), run()
        return {"standing_mib": round(standing / MIB, 1), "peak_mib": round(torch.cuda.max_memory_allocated() / MIB, 1)}
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_in_child, args=(work, arguments, sender, torch.get_num_threads()))
    process.start()
    sender.close()
    try:
        found: dict[str, float] = receiver.recv()
    except EOFError:
        raise RuntimeError("the process that measured memory ended early") from None
    finally:
        process.join()
    return found


def _measure_in_child(work: Callable[..., Callable[[], Any]], arguments: tuple, sender: Any, threads: int) -> None:
    torch.set_num_threads(threads)
    before = _status("VmRSS")
    run = work(*arguments)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what building the model freed
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    standing = _status("VmRSS")
    run(), run()
    peak = _status("VmHWM")
    sender.send({"standing_mib": round((standing - before) / MIB, 1), "peak_mib": round((peak - before) / MIB, 1)})


def _status(name: str) -> int:
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


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def markdown(header: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table; numbers to the right."""
    align = [" ---: |" if i else " --- |" for i in range(len(header))]
    lines = ["| " + " | ".join(header) + " |", "|" + "".join(align)]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])
