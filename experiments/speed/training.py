"""A training step the release's way against ours: times, memory, what trains, what fits."""

import gc
import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from experiments.costs import Case, flops_of, make_inputs
from experiments.reports import markdown
from experiments.speed.measure import MIB, Memory, in_child, interleaved, largest_batch, matmul_rate, summary, wait_for
from experiments.speed.release import ReleaseWay
from tbac.models import UniImage
from tbac.models.prompt import PromptInputs
from tbac.training.module import LadderTuningModule
from tbac.training.optimizers import adamw, parameter_groups
from tbac.training.stages import Stage
from tbac.types import Batch

log = logging.getLogger(__name__)
BASELINE, OURS, CHECKPOINTED, COMPILED = "release", "ours", "ours, checkpointed", "ours, compiled"
SIDES = (BASELINE, OURS, CHECKPOINTED, COMPILED)
TEXT_BESIDE_IMAGE = 4  # tokens, at least
Targets = tuple[Tensor, Tensor, Tensor]


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
    cases = [Case("text", tokens, cfg["batch"]["text"]) for tokens in cfg["tokens"]]
    for tokens in cfg["tokens"]:
        room = min(0.75 * tokens, tokens - cfg["shared_tokens"] - TEXT_BESIDE_IMAGE)
        if room >= 1:
            cases.append(Case("image + text", tokens, cfg["batch"]["image"], int(room**0.5)))
    return cases


class Side:
    """One way of training: its loss, its parameters, its optimizer.

    Args:
        name: of `SIDES`; `BASELINE` copies the model's weights, all others use the model itself.
        model: ours.
        cfg: of the benchmark.
    """

    def __init__(self, name: str, model: UniImage, cfg: dict[str, Any]) -> None:
        self.name, self.cfg, self.device = name, cfg, model.device
        self.release = ReleaseWay(model) if name == BASELINE else None
        self.model = None if name == BASELINE else model
        if self.release is not None:
            self.parameters = [p for p in self.release.parameters() if p.requires_grad]
            groups: list[dict] = [{"params": self.parameters, "weight_decay": 0.05}]
        else:
            self.module = LadderTuningModule(model, Stage("bench", adamw, adamw, steps=1, weight_decay=0.05))
            self.parameters = [p for p in self.module.parameters() if p.requires_grad]
            groups = parameter_groups([model.ladder, model.denoiser], 0.05)
        self.optimizer = adamw(groups, lr=1e-6)
        self.compiled: tuple[Callable, Callable] | None = None
        if name == COMPILED:
            plain = model.denoiser._run_block, model.mllm._query_layer
            model.compile_parts()
            self.compiled = model.denoiser._run_block, model.mllm._query_layer
            model.denoiser._run_block, model.mllm._query_layer = plain

    def loss(self, inputs: PromptInputs, latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        with autocast(self.cfg, self.device):
            if self.release is not None:
                return self.release.loss(dict(inputs), latents, noise, sigma)
            return self.module.loss(Batch(inputs, [""] * len(latents)), noise, sigma, latents)

    def step(self, *arguments: Any) -> None:
        """Forward, backward, clipping, optimizer; `arguments` as of `loss`."""
        model, plain = self.model, None
        if model is not None:
            both = self.name == CHECKPOINTED
            model.set_checkpointing(denoiser=both, queries=both)
            if self.compiled is not None:
                plain = model.denoiser._run_block, model.mllm._query_layer
                model.denoiser._run_block, model.mllm._query_layer = self.compiled
        self.loss(*arguments).backward()
        nn.utils.clip_grad_norm_(self.parameters, 0.5)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if model is not None and plain is not None:
            model.denoiser._run_block, model.mllm._query_layer = plain

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
    limit = 0.1 if ours.cfg["precision"] == "bf16-mixed" else 1e-3
    if max(found.values()) > limit:
        raise RuntimeError(f"the release's way and ours differ: {found}")
    return found


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


def bench_training(cfg: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Every case of the config: seconds, peak memory, utilisation.

    In one process the sides take turns step by step; isolated, each has the device to itself for a while, in turns of a
    few steps, since two of them don't fit at real sizes.
    """
    names = list(cfg["sides"])
    difference = in_child(compare_sides, cfg, device.type)
    mixed = cfg["precision"] == "bf16-mixed"
    rate = matmul_rate(device, torch.bfloat16 if mixed else torch.float32, cfg["matmul_size"])
    model = None if cfg["isolate"] else make_model(cfg["model"], device.type)
    sides = {} if model is None else {name: Side(name, model, cfg) for name in names}
    cases: dict[str, Any] = {}
    times, memory = [], []
    holds: dict[str, list] = {}
    for case in training_cases(cfg):
        alone = {}
        if model is None:
            seconds: dict[str, list[float]] = {name: [] for name in names}
            for _ in range(cfg["turns"]):
                for name in names:
                    alone[name] = in_child(one_side, name, cfg, device.type, case, cfg["repeats"])
                    seconds[name] += alone[name]["seconds"]
        else:
            arguments = arguments_of(model, case, cfg)
            runs = {name: (lambda s=side, a=arguments: s.step(*a)) for name, side in sides.items()}
            seconds = interleaved(runs, cfg["repeats"], device)
            alone = {name: in_child(one_side, name, cfg, device.type, case, 0) for name in names}
        found = summary(seconds, BASELINE, OURS)
        median = found["median_s"]
        flops = case.batch * sum(flops_of(cfg["model"], case, cfg["latent_side"]).values())
        found["samples_per_s"] = {name: round(case.batch / s, 3) for name, s in median.items()}
        found["flops"], found["utilisation"] = flops, round(flops / median[OURS] / rate, 3)
        found["difference"] = difference[f"{case.name}, {case.tokens}"]
        found["memory"] = {name: one["memory"] for name, one in alone.items()}
        holds = {name: one["holds"] for name, one in alone.items()}
        peaks = [found["memory"][name]["peak_mib"] for name in names]
        cases[f"{case.name}, {case.tokens}"] = found
        label = [case.name, case.tokens, case.batch]
        took = [median[name] for name in names]
        times.append([*label, *(f"{s:.3f}" for s in took), *(f"{took[0] / s:.2f}" for s in took[1:])])
        times[-1].append(f"{found['utilisation']:.2f}")
        memory.append([*label, *(f"{p:,.0f}" for p in peaks), *(f"{peaks[0] / p:.2f}" for p in peaks[1:])])
        log.info("%s, %d tokens: %.2f", case.name, case.tokens, found["ratio"])
    over = [f"release / {name}" for name in names[1:]]
    header = ["prompt", "tokens", "batch"]
    tables = [
        "Seconds a step:\n\n" + markdown([*header, *names, *over, "utilisation of ours"], times),
        "Peak memory of training, MiB:\n\n" + markdown([*header, *names, *over], memory),
        markdown(
            ["what trains", "tensors", "parameters", "optimizer state, MiB"],
            [[name, *map("{:,}".format, holds[name])] for name in names],
        ),
    ]
    return {"cases": cases, "holds": holds, "matmul_flops_per_s": rate, "table": "\n\n".join(tables)}


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
        side.step(inputs, *targets(shapes, batch, cfg["latent_side"], device=device))

    return {str(cap): largest_batch(step, int(cap * 1024**3)) for cap in cfg["memory_caps_gib"]}


def bench_batches(cfg: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The largest batches that fit into capped memory of a GPU."""
    found: dict[str, Any] = {}
    cases = training_cases(cfg)
    for name in (n for n in cfg["sides"] if n != COMPILED):
        for case in (cases[0], cases[-1]):
            label = f"{name}; {case.name}, {case.tokens}"
            found[label] = in_child(largest_batches, name, cfg, device.type, case)
    table = markdown(
        ["largest batch", *(f"{cap} GiB" for cap in cfg["memory_caps_gib"])],
        [[label, *sizes.values()] for label, sizes in found.items()],
    )
    return {"largest_batch": found, "table": table}
