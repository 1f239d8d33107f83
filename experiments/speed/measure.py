"""Measuring: interleaved times, memory, tables."""

import ctypes
import gc
import math
import multiprocessing
import os
import signal
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from experiments.reports import format_table

MIB = 1024**2


def interleaved(
    sides: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of each side, run in turn, so that what disturbs the machine disturbs all alike.

    Args:
        sides: what is measured, by name.
        repeats: rounds that count.
        device: what is waited for.
        warm_up: rounds before, which don't.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(warm_up + repeats):
        for name, run in sides.items():
            wait_for(device)
            started = time.perf_counter()
            run()
            wait_for(device)
            if round_ >= warm_up:
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


def in_child(work: Callable[..., Any], *arguments: Any, limit_s: float | None = None) -> Any:
    """`work(*arguments)` in a process of its own, whose memory is its own.

    It is forked from one that has imported what the work needs and has done nothing else.

    Args:
        work: a function of a module; or a generator, whose last value is the result.
        arguments: its own.
        limit_s: seconds after which the process is ended, with all that it has started.

    Raises:
        ChildError: with the child's traceback, or when it ends without a result or is too slow.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([work.__module__])
    receiver, sender = context.Pipe(duplex=False)
    alone = limit_s is not None
    process = context.Process(target=_run_in_child, args=(work, arguments, sender, torch.get_num_threads(), alone))
    process.start()
    sender.close()
    result, problem = None, f"it took more than its {limit_s} s"
    deadline = math.inf if limit_s is None else time.monotonic() + limit_s
    try:
        while limit_s is None or receiver.poll(max(0.0, deadline - time.monotonic())):
            value, problem, last = receiver.recv()
            result = result if problem else value
            if last:
                break
            problem = f"it took more than its {limit_s} s"
    except EOFError:
        problem = "it ended without a result; was it killed for its memory?"
    finally:
        if alone:
            with suppress(ProcessLookupError):
                os.killpg(process.pid or 0, signal.SIGKILL)  # what it has started ends with it
        process.join()
    if problem:
        raise ChildError(f"{work.__name__} failed in a process of its own: {problem}", result)
    return result


class ChildError(RuntimeError):
    """A process of its own has failed.

    Args:
        message: why.
        partial: what it had found by then, or None.
    """

    def __init__(self, message: str, partial: Any) -> None:
        super().__init__(message)
        self.partial = partial


def _run_in_child(work: Callable[..., Any], arguments: tuple, sender: Any, threads: int, alone: bool) -> None:
    """Send (value, problem, whether it is the last) for each value of a generator, or for the one of a function."""
    if alone:
        os.setpgid(0, 0)
    torch.set_num_threads(threads)
    try:
        value = work(*arguments)
        if isinstance(value, Iterator):
            steps, value = value, None
            for value in steps:
                sender.send((value, None, False))
        sender.send((value, None, True))
    except Exception:  # noqa: BLE001 (the parent raises it)
        sender.send((None, traceback.format_exc(), True))


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


def bench_rates(cfg: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """What the device itself gives: matrix products in the benchmark's precision, copies within its memory."""
    dtype = torch.bfloat16 if cfg["precision"] == "bf16-mixed" else torch.float32
    flops, copied = matmul_rate(device, dtype, cfg["matmul_size"]), copy_rate(device, cfg["copy_mib"])
    line = f"{flops / 1e12:.1f} TFLOP/s of {dtype}, {copied / 1e12:.3f} TB/s"
    table = format_table(
        ["rate", ""], [["matrix product, TFLOP/s", f"{flops / 1e12:.1f}"], ["copy, TB/s", f"{copied / 1e12:.3f}"]]
    )
    return {"matmul_flops_per_s": flops, "copy_bytes_per_s": copied, "line": line, "table": table}


def copy_rate(device: torch.device, mib: int, repeats: int = 20) -> float:
    """Measured bytes per second of a copy within a device's memory, read and written bytes added up."""
    source = torch.zeros(mib * MIB, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = interleaved({"copy": lambda: target.copy_(source)}, repeats, device)["copy"]
    return 2 * mib * MIB / statistics.median(seconds)


def record_kernels(device: torch.device) -> profile:
    """A profiler of what runs on the device, and of the operators that start it."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    return profile(activities=activities)


def wait_for(device: torch.device) -> None:
    """Until what was given to a GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
