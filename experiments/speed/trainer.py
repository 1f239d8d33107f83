"""Training steps through Lightning's trainer: whether every stage runs, and what guard, logs and averages cost."""

import gc
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from torch.utils.data import DataLoader, IterableDataset

from experiments.costs import Case, make_inputs
from experiments.reports import format_table
from experiments.speed.measure import MIB, record_kernels, wait_for
from experiments.speed.training import make_model, targets, training_cases
from tbac.models import UniImage
from tbac.sampling.guidance import Guidance
from tbac.sampling.solver import solve
from tbac.training.callbacks import Callback
from tbac.training.callbacks.ema import EMA
from tbac.training.callbacks.guard import Guard
from tbac.training.callbacks.throughput import Throughput
from tbac.training.module import LadderTuningModule
from tbac.training.optimizers import adamw, warmup_cosine
from tbac.training.spikes import RobustRule
from tbac.training.stages import Stage
from tbac.types import Batch

STAGES = {"t2i_pretrain": "text", "ti2i_pretrain": "image + text", "finetune": "image + text"}
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


class Repeated(IterableDataset[Batch]):
    """One batch, many times."""

    def __init__(self, batch: Batch, count: int) -> None:
        self.batch, self.count = batch, count

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(self.count):
            yield replace(self.batch)


class StepClock(Callback):
    """Seconds of each step; a step that begins before the device is done counts for the time that it took the CPU.

    Args:
        warm_up: steps before the clock starts.
    """

    def __init__(self, warm_up: int) -> None:
        self.warm_up, self.steps, self.seconds = warm_up, 0, 0.0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.warm_up:
            wait_for(pl_module.device)
            self._started = time.perf_counter()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        wait_for(pl_module.device)
        self.seconds = time.perf_counter() - self._started
        self.steps = trainer.global_step - self.warm_up


@dataclass(frozen=True)
class Fit:
    """What `fit` runs.

    Attributes:
        stage: its name.
        case: of the prompts.
        steps: optimizer steps.
        callbacks: of the trainer.
        folder: for logs; None logs nothing.
    """

    stage: str
    case: Case
    steps: int
    callbacks: Sequence[Callback] = ()
    folder: Path | None = None


def fit(model: UniImage, run: Fit, cfg: dict[str, Any], device: torch.device) -> float:
    """Train on one batch of random prompts and latents; returns the last loss."""
    # The batch begins on the CPU, in pinned memory for a GPU, as the loader gives it.
    inputs = make_inputs(model, run.case, cfg["shared_tokens"], device="cpu")
    latents = targets(model, run.case.batch, cfg["latent_side"], device="cpu")[0]
    keys = [str(i) for i in range(run.case.batch)]
    batch = Batch(inputs, keys, latents=latents, positions=list(range(run.case.batch)))
    if device.type == "cuda":
        batch = batch.pin_memory()
    # The recipe's optimizer, at a rate that changes next to nothing.
    stage = Stage(
        run.stage,
        partial(adamw, lr=1e-6),
        partial(warmup_cosine, warmup_steps=1, min_lr=1e-7),
        steps=run.steps,
        weight_decay=0.05,
        clip=0.5,
    )
    module = LadderTuningModule(model, stage)
    options = cfg["overhead"]
    logger = instantiate(options["logger"], save_dir=str(run.folder)) if run.folder else False
    trainer = instantiate(
        options["trainer"],
        accelerator="cuda" if device.type == "cuda" else "cpu",
        precision=cfg["precision"],
        max_steps=run.steps,
        gradient_clip_val=stage.clip,
        callbacks=list(run.callbacks),
        logger=logger,
        enable_progress_bar=bool(run.folder),
    )
    trainer.fit(module, DataLoader(Repeated(batch, run.steps), batch_size=None))
    return float(trainer.callback_metrics["train/loss"])


def make_guards() -> list[Callback]:
    """Average and guard, which look at every step."""
    return [EMA(0.9999), Guard(RobustRule(), then="skip")]


def make_watchers(cfg: dict[str, Any]) -> list[Callback]:
    """What a run has beside the training itself: guard, average, throughput, rates, progress."""
    options = cfg["overhead"]
    return [*make_guards(), Throughput(25), *(instantiate(part) for part in options["watchers"].values())]


def bench_first_steps(cfg: dict[str, Any], device: torch.device) -> Iterator[dict[str, Any]]:
    """Two steps of each stage with guard and average, then a picture: whether it runs at all, and in what memory.

    Raises:
        RuntimeError: when a loss or a picture isn't finite.
    """
    model = make_model(cfg["model"], device.type)
    cases = {case.name: case for case in training_cases(cfg)}
    rows, found = [], {}
    for name, kind in STAGES.items():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        loss = fit(model, Fit(name, cases[kind], 2, make_guards()), cfg, device)
        wait_for(device)
        seconds = time.perf_counter() - started
        peak = torch.cuda.max_memory_allocated() / MIB if device.type == "cuda" else float("nan")
        found[name] = {"loss": loss, "seconds": round(seconds, 1), "peak_mib": peak}
        rows.append([name, cases[kind].tokens, cases[kind].batch, f"{loss:.4f}", f"{seconds:.1f}", f"{peak:,.0f}"])
        table = format_table(["stage", "tokens", "batch", "loss", "seconds of 2 steps", "peak MiB"], rows)
        yield {"stages": found, "torch": torch.__version__, "table": table}
        model.zero_grad()
        gc.collect()
    model.to(device)
    pixels = _picture(model, cases["image + text"], cfg)
    if not all(torch.isfinite(torch.tensor(one["loss"])) for one in found.values()) or not pixels.isfinite().all():
        raise RuntimeError(f"a loss or a picture isn't finite: {found}")
    line = f"three stages and a picture of {tuple(pixels.shape[-2:])} pixels ran on {device_name(device)}"
    yield {"stages": found, "torch": torch.__version__, "table": table, "line": line}


@torch.no_grad()
def _picture(model: UniImage, case: Case, cfg: dict[str, Any]) -> torch.Tensor:
    """An edit with three guidance branches, drawn to pixels."""
    guidance = Guidance(4.5, 1.5)
    inputs = make_inputs(model, replace(case, batch=len(guidance.branches)), cfg["shared_tokens"])
    condition = model.denoiser.project(model.encode_condition(inputs))
    noise = targets(model, 1, cfg["latent_side"])[0]
    return model.autoencoder.decode(solve(model, condition, guidance, noise, 4))


def bench_overhead(cfg: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Seconds a step with and without guard, average, logs and progress, in turns, and the waits for the device."""
    options, model = cfg["overhead"], make_model(cfg["model"], device.type)
    case = next(case for case in training_cases(cfg) if case.name == "image + text")
    # Times first, in turns; the profiler that counts waits would disturb them.
    seconds: dict[str, list[float]] = {"bare": [], "watched": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options["turns"]):
            for name, values in seconds.items():
                clock = StepClock(options["warm_up"])
                more = make_watchers(cfg) if name == "watched" else []
                logs = Path(folder) if name == "watched" else None
                run = Fit("t2i_pretrain", case, options["warm_up"] + options["steps"], [*more, clock], logs)
                fit(model, run, cfg, device)
                values.append(clock.seconds / clock.steps)
                gc.collect()
    waits = {
        "bare": count_waits(model, case, [], cfg, device),
        "watched": count_waits(model, case, make_guards(), cfg, device),
    }
    best = {name: min(values) for name, values in seconds.items()}
    ratio = best["watched"] / best["bare"]
    rows = [[n, f"{1000 * best[n]:.1f}", f"{waits[n]:.1f}"] for n in seconds]
    table = format_table([f"{case.name}, {case.tokens} tokens, batch {case.batch}", "ms a step", "waits a step"], rows)
    return {
        "seconds": seconds,
        "waits": waits,
        "ratio": ratio,
        "table": table,
        "line": f"watched / bare {ratio:.3f}, waits {waits}",
    }


def count_waits(
    model: UniImage, case: Case, callbacks: list[Callback], cfg: dict[str, Any], device: torch.device
) -> float:
    """Waits for the device in a step: those of many steps less those of a few, so that start and end don't count."""
    counts = []
    for steps in (3, 8):
        with record_kernels(device) as recorded:
            fit(model, Fit("t2i_pretrain", case, steps, callbacks), cfg, device)
        counts.append(sum(e.count for e in recorded.key_averages() if e.key in WAITS))
    return (counts[1] - counts[0]) / 5


def device_name(device: torch.device) -> str:
    """The card's name, or the number of CPU threads."""
    return torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
