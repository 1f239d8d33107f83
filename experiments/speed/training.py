"""A training step the release's way against ours: times, memory, what trains, what fits."""

import gc
import logging
import math
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from experiments.costs import Case, count_sample_flops, make_inputs
from experiments.reports import format_table
from experiments.speed.measure import (
    MIB,
    Memory,
    in_child,
    interleaved,
    largest_batch,
    summary,
    wait_for,
)
from experiments.speed.release import ReleaseWay
from tbac.models import UniImage
from tbac.models.prompt import PromptInputs
from tbac.training.cuda_graphs import StepGraphs
from tbac.training.module import LadderTuningModule
from tbac.training.optimizers import adamw, make_parameter_groups
from tbac.training.stages import Stage
from tbac.types import Batch

log = logging.getLogger(__name__)
BASELINE, OURS, CHECKPOINTED, COMPILED = "release", "ours", "ours, checkpointed", "ours, compiled"
AS_SHIPPED = "release, as shipped"  # with the vision tower of the library that it is pinned to
GRAPHED, COMPILED_GRAPHED = "ours, graphs", "ours, compiled, graphs"
SIDES = (BASELINE, OURS, CHECKPOINTED, COMPILED, GRAPHED, COMPILED_GRAPHED, AS_SHIPPED)
LIMIT = 1e-3  # relative difference in float32
TEXT_BESIDE_IMAGE = 4  # tokens, at least
Targets = tuple[Tensor, Tensor, Tensor]
LayerFunctions = dict[tuple[str, str], Callable[..., Any]]


def make_model(options: dict[str, Any], device: str) -> UniImage:
    """The model with random weights: the frozen parts in the config's type, the trained ones in float32."""
    torch.manual_seed(0)
    with torch.device(device):
        model = UniImage.from_config(instantiate(options, random_init=True))
    return model


def targets(model: UniImage, batch: int, side: int, seed: int = 1, device: str | None = None) -> Targets:
    """Latents, noise (batch, channel, side, side) and sigmas (batch,); on the model's device by default."""
    generator, place = torch.Generator().manual_seed(seed), device or model.device
    shape = (batch, model.latent_channels, side, side)
    latents, noise = (torch.randn(shape, generator=generator).to(place) for _ in range(2))
    return latents, noise, (torch.randint(1, 1000, (batch,), generator=generator) / 1000).to(place)


def autocast(cfg: dict[str, Any], device: torch.device) -> Any:
    """The step's precision: bf16 by autocast, or float32."""
    return torch.autocast(device.type, torch.bfloat16) if cfg["precision"] == "bf16-mixed" else nullcontext()


def training_cases(cfg: dict[str, Any]) -> list[Case]:
    """Text alone, and image with text, at each length; an image fills up to three quarters of its prompt."""
    cases = [Case("text", tokens, cfg["batch"]["text"]) for tokens in cfg["tokens"]["text"]]
    for tokens in cfg["tokens"]["image"]:
        room = min(0.75 * tokens, tokens - cfg["shared_tokens"] - TEXT_BESIDE_IMAGE)
        if room >= 1:
            cases.append(Case("image + text", tokens, cfg["batch"]["image"], int(room**0.5)))
    return cases


def find_shortest_and_longest(cfg: dict[str, Any]) -> list[Case]:
    """The first case, text alone, and the last one, the longest prompt with an image."""
    cases = training_cases(cfg)
    return [cases[0], cases[-1]]


def layer_functions(model: UniImage) -> LayerFunctions:
    """What runs each kind of layer: what compiling replaces, by part and attribute."""
    return {
        (part, name): value
        for part in ("denoiser", "mllm")
        for name, value in vars(getattr(model, part)).items()
        if callable(value) and not isinstance(value, nn.Module) and name.startswith("_run")
    }


def set_layer_functions(model: UniImage, functions: LayerFunctions) -> None:
    """Put back what `layer_functions` gave."""
    for (part, name), function in functions.items():
        setattr(getattr(model, part), name, function)


class Side:
    """One way of training: its loss, its parameters, its optimizer.

    Args:
        name: of `SIDES`; the release's ways copy the model's weights, all others use the model itself.
        model: ours.
        cfg: of the benchmark.
        optimizer: of another side with the same model, to be shared; None makes one.
    """

    def __init__(
        self, name: str, model: UniImage, cfg: dict[str, Any], optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        self.name, self.cfg, self.device = name, cfg, model.device
        theirs = name in (BASELINE, AS_SHIPPED)
        self.release = ReleaseWay(model, as_shipped=name == AS_SHIPPED) if theirs else None
        self.model = None if theirs else model
        if self.release is not None:
            self.parameters = [p for p in self.release.parameters() if p.requires_grad]
            groups: list[dict] = [{"params": self.parameters, "weight_decay": 0.05}]
        else:
            self.module = LadderTuningModule(model, Stage("bench", adamw, adamw, steps=1, weight_decay=0.05))
            self.parameters = [p for p in self.module.parameters() if p.requires_grad]
            groups = make_parameter_groups([model.ladder, model.denoiser], 0.05)
        self.optimizer = optimizer or adamw(groups, lr=1e-6)
        self.compiled: LayerFunctions | None = None
        if name in (GRAPHED, COMPILED_GRAPHED) and self.device.type == "cuda":
            self.module.graphs = StepGraphs(model, torch.bfloat16 if cfg["precision"] == "bf16-mixed" else None)
        if name in (COMPILED, COMPILED_GRAPHED):
            plain = layer_functions(model)
            model.compile_parts(**cfg["compile_options"])
            self.compiled = layer_functions(model)
            set_layer_functions(model, plain)

    def loss(self, inputs: PromptInputs, latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        with autocast(self.cfg, self.device):
            if self.release is not None:
                return self.release.loss(dict(inputs), latents, noise, sigma)
            return self.module.compute_loss(Batch(inputs, [""] * len(latents)), noise, sigma, latents)

    def step(self, *arguments: Any) -> None:
        """Forward, backward, clipping, optimizer; `arguments` as of `loss`."""
        plain = None
        if self.model is not None:
            both = self.name == CHECKPOINTED
            self.model.set_checkpointing(denoiser=both, queries=both)
            if self.compiled is not None:
                plain = layer_functions(self.model)
                set_layer_functions(self.model, self.compiled)
        self.loss(*arguments).backward()
        nn.utils.clip_grad_norm_(self.parameters, 0.5)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.model is not None and plain is not None:
            set_layer_functions(self.model, plain)

    def forget_graphs(self) -> None:
        """Free the memory that graphs hold for the shapes of a case."""
        if self.model is not None and self.module.graphs is not None:
            self.module.graphs.forget()
            gc.collect()
            torch.cuda.empty_cache()

    def holds(self) -> list[int | float]:
        """Trainable tensors, trainable parameters, MiB of optimizer state."""
        tensors = [t for values in self.optimizer.state.values() for t in values.values() if isinstance(t, Tensor)]
        size = sum(t.numel() * t.element_size() for t in tensors)
        return [len(self.parameters), sum(p.numel() for p in self.parameters), round(size / MIB, 1)]

    def gradients(self, *arguments: Any) -> tuple[float, Tensor, Tensor]:
        """Loss, gradient of the queries, and of connector and denoiser as one vector."""
        loss = self.loss(*arguments)
        loss.backward()
        if self.release is not None:
            table = self.release.mllm.get_input_embeddings().weight.grad
            queries = table[self.release.vocabulary :]
            others = [self.release.connector, self.release.transformer]
        else:
            assert self.model is not None
            queries = self.model.ladder.queries.grad
            others = [self.model.ladder.connector, self.model.denoiser.transformer]
        whole = torch.cat([p.grad.float().flatten() for module in others for p in module.parameters()])
        found = loss.item(), queries.float().clone(), whole
        self.optimizer.zero_grad()
        return found


def check_equal(release: Side, ours: Side, arguments: tuple) -> dict[str, float]:
    """Relative differences of loss and gradients; the benchmark compares only what computes the same.

    Raises:
        RuntimeError: when they differ by more than the precision explains.
    """
    theirs, mine = release.gradients(*arguments), ours.gradients(*arguments)
    found = {"loss": abs(theirs[0] - mine[0]) / abs(theirs[0])}
    for name, a, b in (("queries", theirs[1], mine[1]), ("others", theirs[2], mine[2])):
        found[name] = ((a - b).norm() / a.norm()).item()
    # bf16 rounds both ways of computing differently, so there the figures only stand in the report.
    if ours.cfg["precision"] != "bf16-mixed" and max(found.values()) > LIMIT:
        raise RuntimeError(f"the release's way and ours differ: {found}")
    return found


def failures_of(sides: dict[str, Side], arguments: tuple) -> dict[str, str]:
    """Why a side can't take a step, by its name: one that fails doesn't take the others' results with it."""
    failed = {}
    for name, side in sides.items():
        try:
            side.step(*arguments)
            wait_for(side.device)
        except Exception:  # noqa: BLE001 (compilers and graphs raise errors of all kinds)
            failed[name] = traceback.format_exc()[-1500:]
            side.optimizer.zero_grad()
    return failed


def count_flops(cfg: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """FLOPs of a step of each case, as the planner counts them; nothing runs on the device."""
    flops = {
        f"{case.name}, {case.tokens}": case.batch
        * sum(count_sample_flops(cfg["model"], case, cfg["latent_side"]).values())
        for case in training_cases(cfg)
    }
    rows = [[name, f"{value / 1e12:.2f}"] for name, value in flops.items()]
    return {"flops": flops, "table": format_table(["step", "TFLOP"], rows), "line": str(rows)}


def utilisation(flops: dict[str, Any], rates: dict[str, Any], training: dict[str, Any]) -> str:
    """A table of the share of the device's measured rate that each side's useful FLOPs reach.

    The release's way computes more than the planner counts; its share is of the same count, so that it compares.
    """
    rows = []
    names = [n for n in SIDES if all(n in case["median_s"] for case in training["cases"].values())]
    for label, case in training["cases"].items():
        shares = [flops["flops"][label] / case["median_s"][n] / rates["matmul_flops_per_s"] for n in names]
        rows.append([label, *(f"{share:.2f}" for share in shares)])
    return format_table(["utilisation", *names], rows)


def arguments_of(model: UniImage, case: Case, cfg: dict[str, Any]) -> tuple:
    """What a step of this case is given."""
    return make_inputs(model, case, cfg["shared_tokens"]), *targets(model, case.batch, cfg["latent_side"])


def compare_sides(cfg: dict[str, Any], device: str) -> dict[str, dict[str, float]]:
    """`check_equal` for every kind of prompt, on two samples, before anything has trained."""
    model = make_model(cfg["model"], device)
    release, ours = Side(BASELINE, model, cfg), Side(OURS, model, cfg)
    found = {}
    for case in training_cases(cfg):
        small = replace(case, batch=min(2, case.batch))
        found[f"{case.name}, {case.tokens}"] = check_equal(release, ours, arguments_of(model, small, cfg))
    return found


def one_side(name: str, cfg: dict[str, Any], device: str, case: Case, repeats: int) -> dict[str, Any]:
    """A side alone in its process: seconds of its steps after two of warm-up, memory, what it holds."""
    memory = Memory(torch.device(device))
    model = make_model(cfg["model"], device)
    arguments = arguments_of(model, case, cfg)
    side = Side(name, model, cfg)
    del model  # the release's way has copied it
    gc.collect()
    memory.begin()
    seconds = []
    for round_ in range(2 + repeats):
        wait_for(side.device)
        started = time.perf_counter()
        side.step(*arguments)
        wait_for(side.device)
        if round_ > 1:
            seconds.append(time.perf_counter() - started)
    return {"seconds": seconds, "memory": memory.end(), "holds": side.holds()}


def bench_training(cfg: dict[str, Any], device: torch.device) -> Iterator[dict[str, Any]]:
    """Every case of the config: seconds, and where wanted the peak memory; given anew after each case.

    In one process the sides take turns step by step; isolated, each has the device to itself for a while, in turns of a
    few steps, since two of them don't fit at real sizes.
    """
    names = list(cfg["sides"])
    difference = in_child(compare_sides, cfg, device.type) if cfg["compare"] else {}
    model = None if cfg["isolate"] else make_model(cfg["model"], device.type)
    sides = {} if model is None else _build_sides(names, model, cfg)
    cases: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for case in training_cases(cfg):
        # What each side takes, in turns, and what it holds, in a process of its own.
        alone: dict[str, dict[str, Any]] = {}
        taking = [name for name in names if case.side or name != AS_SHIPPED]  # without an image it is the baseline
        if model is None:
            seconds, alone = _time_isolated(taking, cfg, device, case)
        else:
            arguments = arguments_of(model, case, cfg)
            failed |= failures_of({name: sides[name] for name in taking}, arguments)
            runs = {n: (lambda s=sides[n], a=arguments: s.step(*a)) for n in taking if n not in failed}
            seconds = interleaved(runs, cfg["repeats"], device, cfg["warm_up"])
            for side in sides.values():
                side.forget_graphs()
            if cfg["measure_memory"]:
                alone = {name: in_child(one_side, name, cfg, device.type, case, 0) for name in taking}
        found = summary(seconds, BASELINE, OURS) | {"batch": case.batch}
        found["samples_per_s"] = {name: round(case.batch / s, 3) for name, s in found["median_s"].items()}
        found["difference"] = difference.get(f"{case.name}, {case.tokens}")
        found["memory"] = {name: one["memory"] for name, one in alone.items()}
        found["holds"] = {name: one["holds"] for name, one in alone.items()}
        cases[f"{case.name}, {case.tokens}"] = found
        log.info("%s, %d tokens: %.2f", case.name, case.tokens, found["ratio"])
        yield {"cases": cases, "failed": failed, "table": _training_tables(cases, names, failed)}
    ratios = {label: one["median_s"][BASELINE] / min(one["median_s"].values()) for label, one in cases.items()}
    line = "release / ours at best: " + "; ".join(f"{label} {ratio:.2f}" for label, ratio in ratios.items())
    yield {"cases": cases, "failed": failed, "table": _training_tables(cases, names, failed), "line": line}


def _build_sides(names: list[str], model: UniImage, cfg: dict[str, Any]) -> dict[str, Side]:
    """All sides in one process; those that train the same model share its optimizer."""
    sides: dict[str, Side] = {}
    for name in names:
        same = sides.get(OURS) if name != AS_SHIPPED else None
        sides[name] = Side(name, model, cfg, same.optimizer if same else None)
    return sides


def _time_isolated(
    names: list[str], cfg: dict[str, Any], device: torch.device, case: Case
) -> tuple[dict[str, list[float]], dict[str, dict[str, Any]]]:
    """Seconds of each side's steps, and what the last of its processes held."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    alone = {}
    for _ in range(cfg["turns"]):
        for name, values in seconds.items():
            alone[name] = in_child(one_side, name, cfg, device.type, case, cfg["repeats"])
            values += alone[name]["seconds"]
    return seconds, alone


def _training_tables(cases: dict[str, Any], names: list[str], failed: dict[str, str]) -> str:
    """Seconds, peak memory and trainable parameters of every side, and why a side failed."""
    times, memory = [], []
    holds: dict[str, Any] = {}
    for label, found in cases.items():
        took = [found["median_s"].get(name, math.nan) for name in names]
        times.append([label, found["batch"], *_format_row(took, ",.3f")])
        if found["memory"]:
            peaks = [found["memory"].get(name, {}).get("peak_mib", math.nan) for name in names]
            memory.append([label, found["batch"], *_format_row(peaks, ",.0f")])
            holds |= found["holds"]
    over = [f"release / {name}" for name in names[1:]]
    header = ["prompt, tokens", "batch", *names, *over]
    tables = ["Seconds a step:\n\n" + format_table(header, times)]
    if memory:
        tables.append("Peak memory of training, MiB:\n\n" + format_table(header, memory))
        rows = [[name, *map("{:,}".format, values)] for name, values in holds.items()]
        tables.append(format_table(["what trains", "tensors", "parameters", "optimizer state, MiB"], rows))
    tables += [f"{name} failed: {reason}" for name, reason in failed.items()]
    return "\n\n".join(tables)


def _format_row(values: list[float], form: str) -> list[str]:
    """Values, and the first over each of the others; nothing for what wasn't measured."""
    ratios = [f"{values[0] / value:.2f}" for value in values[1:]]
    texts = [f"{value:{form}}" for value in values]
    return ["" if text == "nan" else text for text in texts + ratios]


def largest_batches(name: str, cfg: dict[str, Any], device: str, case: Case) -> dict[str, int]:
    """The largest batch of a side under each cap of a GPU's memory."""
    model = make_model(cfg["model"], device)
    side = Side(name, model, cfg)
    shapes = make_model(cfg["model"], "meta")  # the release's way has copied the model, which may go
    del model
    gc.collect()

    def step(batch: int) -> None:
        sized = replace(case, batch=batch)
        inputs = make_inputs(shapes, sized, cfg["shared_tokens"], device=device)
        try:
            side.step(inputs, *targets(shapes, batch, cfg["latent_side"], device=device))
        except torch.OutOfMemoryError:  # perhaps with some of the optimizer's state made, which no step can begin with
            side.optimizer.state.clear()
            side.optimizer.zero_grad()
            raise

    return {str(cap): largest_batch(step, int(cap * 1024**3)) for cap in cfg["memory_caps_gib"]}


def bench_batches(cfg: dict[str, Any], device: torch.device) -> Iterator[dict[str, Any]]:
    """The largest batches that fit into capped memory of a GPU, given anew after each kind of step."""
    found: dict[str, Any] = {}
    line = "left out: a CPU has no allocator whose memory can be capped"
    for name in (OURS, CHECKPOINTED) if device.type == "cuda" else ():
        for case in find_shortest_and_longest(cfg):
            label = f"{name}; {case.name}, {case.tokens}"
            found[label] = in_child(largest_batches, name, cfg, device.type, case)
            line = str(found)
            yield {"largest_batch": found, "table": _table_of_batches(cfg, found)}
    yield {"largest_batch": found, "table": _table_of_batches(cfg, found), "line": line}


def _table_of_batches(cfg: dict[str, Any], found: dict[str, dict[str, int]]) -> str:
    caps = [f"{cap} GiB" for cap in cfg["memory_caps_gib"]]
    return format_table(["largest batch", *caps], [[label, *sizes.values()] for label, sizes in found.items()])
