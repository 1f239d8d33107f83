"""A training step the release's way against ours: times, memory, what trains, what fits."""

import gc
import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from experiments.bench.measure import MIB, interleaved, largest_batch, markdown, matmul_rate, peak_memory, summary
from experiments.bench.release import ReleaseWay
from experiments.costs import Case, flops_of, make_inputs
from tbac.models import UniImage
from tbac.models.prompt import PromptInputs
from tbac.training.module import FlowOptions, LadderTuningModule
from tbac.training.optimizers import adamw, parameter_groups
from tbac.types import Batch

log = logging.getLogger(__name__)
BASELINE, OURS, CHECKPOINTED, COMPILED = "release", "ours", "ours, checkpointed", "ours, compiled"
TEXT_BESIDE_IMAGE = 4  # tokens, at least
Targets = tuple[Tensor, Tensor, Tensor]


def make_model(options: dict[str, Any], device: str) -> UniImage:
    """The model with random weights: the frozen parts in the config's type, the trained ones in float32."""
    with torch.device(device):
        model: UniImage = instantiate(options, random_init=True)
    return model


def targets(model: UniImage, batch: int, side: int, seed: int = 1) -> Targets:
    """Latents, noise (batch, channel, side, side) and sigmas (batch,)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, model.latent_channels, side, side)
    latents, noise = (torch.randn(shape, generator=generator).to(model.device) for _ in range(2))
    return latents, noise, (torch.randint(1, 1000, (batch,), generator=generator) / 1000).to(model.device)


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
        name: `BASELINE` copies the model's weights; all others use the model itself.
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
            self.module = LadderTuningModule(
                model, optimizer=adamw, scheduler=adamw, flow=FlowOptions(), weight_decay=0.05, total_steps=1
            )
            self.parameters = [p for p in self.module.parameters() if p.requires_grad]
            groups = parameter_groups([model.ladder, model.denoiser], 0.05)
        self.optimizer = adamw(groups, lr=1e-6)
        self.parts: tuple[Callable, Callable] | None = None
        if name == COMPILED:
            plain = model.denoiser._run_block, model.mllm._query_layer
            model.compile_parts()
            self.parts = model.denoiser._run_block, model.mllm._query_layer
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
            if self.parts is not None:
                plain = model.denoiser._run_block, model.mllm._query_layer
                model.denoiser._run_block, model.mllm._query_layer = self.parts
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


def one_side(name: str, cfg: dict[str, Any], device: str, case: Case) -> Callable[[], Any]:
    """A side alone, for its memory; the release's way lets go of the model that it copied."""
    model = make_model(cfg["model"], device)
    arguments = (
        make_inputs(model, case, cfg["shared_tokens"]),
        *targets(model, case.batch, cfg["latent_side"]),
    )
    side = Side(name, model, cfg)
    del model
    gc.collect()
    return lambda: side.step(*arguments)


def bench_training(model: UniImage, cfg: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Every case of the config: seconds, peak memory, utilisation."""
    sides = {name: Side(name, model, cfg) for name in (BASELINE, OURS, CHECKPOINTED)}
    mixed = cfg["precision"] == "bf16-mixed"
    rate = matmul_rate(device, torch.bfloat16 if mixed else torch.float32, cfg["matmul_size"])
    cases: dict[str, Any] = {}
    times, memory = [], []
    given = {
        case: (make_inputs(model, case, cfg["shared_tokens"]), *targets(model, case.batch, cfg["latent_side"]))
        for case in training_cases(cfg)
    }
    # All before the first step, after which the sides go their own ways.
    equal = {case: check_equal(sides[BASELINE], sides[OURS], arguments) for case, arguments in given.items()}
    for case, arguments in given.items():
        runs = {name: (lambda s=side, a=arguments: s.step(*a)) for name, side in sides.items()}
        found = summary(interleaved(runs, cfg["repeats"], device), BASELINE, OURS)
        flops = case.batch * sum(flops_of(cfg["model"], case, cfg["latent_side"]).values())
        median = found["median_s"]
        found["samples_per_s"] = {name: round(case.batch / s, 3) for name, s in median.items()}
        found["flops"], found["utilisation"] = flops, round(flops / median[OURS] / rate, 3)
        found["difference"] = equal[case]
        found["memory"] = {name: peak_memory(one_side, (name, cfg, device.type, case), device) for name in sides}
        peaks = [found["memory"][name]["peak_mib"] for name in sides]
        cases[f"{case.name}, {case.tokens}"] = found
        label = [case.name, case.tokens, case.batch]
        seconds = list(median.values())
        times.append([*label, *(f"{s:.3f}" for s in seconds), *(f"{seconds[0] / s:.2f}" for s in seconds[1:])])
        times[-1].append(f"{found['utilisation']:.2f}")
        memory.append([*label, *(f"{p:,.0f}" for p in peaks), *(f"{peaks[0] / p:.2f}" for p in peaks[1:])])
        log.info("%s, %d tokens: %.2f", case.name, case.tokens, found["ratio"])
    names = list(sides)
    over = [f"release / {name}" for name in names[1:]]
    header = ["prompt", "tokens", "batch"]
    tables = [
        "Seconds a step:\n\n" + markdown([*header, *names, *over, "utilisation of ours"], times),
        "Peak memory, MiB:\n\n" + markdown([*header, *names, *over], memory),
        markdown(
            ["what trains", "tensors", "parameters", "optimizer state, MiB"],
            [[name, *(f"{v:,}" for v in sides[name].holds())] for name in (BASELINE, OURS)],
        ),
    ]
    holds = {name: sides[name].holds() for name in (BASELINE, OURS)}
    return {"cases": cases, "holds": holds, "matmul_flops_per_s": rate, "table": "\n\n".join(tables)}


def bench_compiled(model: UniImage, cfg: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Ours compiled against ours plain."""
    sides = {name: Side(name, model, cfg) for name in (OURS, COMPILED)}
    cases, rows = {}, []
    for case in training_cases(cfg):
        arguments = (make_inputs(model, case, cfg["shared_tokens"]), *targets(model, case.batch, cfg["latent_side"]))
        runs = {name: (lambda s=side, a=arguments: s.step(*a)) for name, side in sides.items()}
        found = summary(interleaved(runs, cfg["repeats"], device), OURS, COMPILED)
        cases[f"{case.name}, {case.tokens}"] = found
        rows.append(
            [case.name, case.tokens, *(f"{s:.3f}" for s in found["median_s"].values()), f"{found['ratio']:.2f}"]
        )
        log.info("compiled, %s, %d tokens: %.2f", case.name, case.tokens, found["ratio"])
    header = ["prompt", "tokens", OURS, COMPILED, "ratio"]
    return {"cases": cases, "table": "Seconds a step:\n\n" + markdown(header, rows)}


def bench_batches(model: UniImage, cfg: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The largest batches that fit into capped memory of a GPU."""
    found: dict[str, Any] = {}
    rows = []
    for name in (BASELINE, OURS, CHECKPOINTED):
        side = Side(name, model, cfg)
        cases = training_cases(cfg)
        for case in (cases[0], cases[-1]):

            def step(batch: int, case: Case = case, side: Side = side) -> None:
                sized = replace(case, batch=batch)
                inputs = make_inputs(model, sized, cfg["shared_tokens"])
                side.step(inputs, *targets(model, batch, cfg["latent_side"]))

            sizes = {str(cap): largest_batch(step, int(cap * 1024**3)) for cap in cfg["memory_caps_gib"]}
            found[f"{name}; {case.name}, {case.tokens}"] = sizes
            rows.append([f"{name}; {case.name}, {case.tokens}", *sizes.values()])
        del side
        gc.collect()
    table = markdown(["largest batch", *(f"{cap} GiB" for cap in cfg["memory_caps_gib"])], rows)
    return {"largest_batch": found, "table": table}
