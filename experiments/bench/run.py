"""Speed and memory of a training step and of sampling, the release's way against ours, interleaved.

python experiments/bench/run.py                       (make bench)      on the CPU, with the real model's proportions
python experiments/bench/run.py experiment=bench_gpu  (make bench-gpu)  on a GPU, real sizes, random weights
"""

import gc
import json
import logging
import platform
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from experiments.bench.measure import (
    MIB,
    interleaved,
    largest_batch,
    markdown,
    matmul_rate,
    peak_memory,
    summary,
)
from experiments.bench.release import ReleaseWay
from experiments.common import CONF, pick_device, plain, user_errors
from experiments.costs import Case, flops_of, make_inputs
from tbac.models import UniImage
from tbac.models.prompt import PromptInputs
from tbac.sampling.guidance import Guidance
from tbac.sampling.solver import solve
from tbac.training.module import FlowOptions, LadderTuningModule
from tbac.training.optimizers import adamw, parameter_groups
from tbac.types import Batch

log = logging.getLogger(__name__)
BASELINE, OURS, COMPILED = "release", "ours", "ours, compiled"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def make_model(options: dict[str, Any], device: str) -> UniImage:
    """The model with random weights: the frozen parts in the config's type, the trained ones in float32."""
    with torch.device(device):
        model: UniImage = instantiate(options, random_init=True)
    return model


def targets(model: UniImage, batch: int, side: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, noise (batch, channel, side, side) and sigmas (batch,)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, model.latent_channels, side, side)
    latents, noise = (torch.randn(shape, generator=generator).to(model.device) for _ in range(2))
    return latents, noise, (torch.randint(1, 1000, (batch,), generator=generator) / 1000).to(model.device)


def autocast(cfg: dict[str, Any], device: torch.device) -> Any:
    """The step's precision: bf16 by autocast, or float32."""
    return torch.autocast(device.type, torch.bfloat16) if cfg["precision"] == "bf16-mixed" else nullcontext()


class Side:
    """One way of training: its loss, its parameters, its optimizer."""

    def __init__(self, name: str, model: UniImage, cfg: dict[str, Any], compiled: bool = False) -> None:
        self.cfg, self.model, self.device = cfg, model, model.device
        self.module: nn.Module
        if name == BASELINE:
            self.module = ReleaseWay(model)
            self.parameters = [p for p in self.module.parameters() if p.requires_grad]
            groups: list[dict] = [{"params": self.parameters, "weight_decay": 0.05}]
        else:
            module = LadderTuningModule(
                model, optimizer=adamw, scheduler=None, flow=FlowOptions(), weight_decay=0.05, total_steps=1
            )
            model.set_checkpointing(**cfg["checkpointing"])
            if compiled:
                model.compile_parts()
            self.module = module
            self.parameters = [p for p in module.parameters() if p.requires_grad]
            groups = parameter_groups([model.ladder, model.denoiser], 0.05)
        self.name = name
        self.optimizer = adamw(groups, lr=1e-6)

    def loss(self, inputs: PromptInputs, latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        with autocast(self.cfg, self.device):
            if isinstance(self.module, ReleaseWay):
                return self.module.loss(dict(inputs), latents, noise, sigma)
            assert isinstance(self.module, LadderTuningModule)
            return self.module.loss(Batch(inputs, [""] * len(latents)), noise, sigma, latents)

    def step(self, inputs: PromptInputs, latents: Tensor, noise: Tensor, sigma: Tensor) -> None:
        """Forward, backward, clipping, optimizer."""
        self.loss(inputs, latents, noise, sigma).backward()
        nn.utils.clip_grad_norm_(self.parameters, 0.5)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def holds(self) -> dict[str, float]:
        """What trains, in tensors, parameters and MiB of optimizer state."""
        state = sum(
            t.numel() * t.element_size()
            for values in self.optimizer.state.values()
            for t in values.values()
            if isinstance(t, Tensor)
        )
        return {
            "trainable_tensors": len(self.parameters),
            "trainable_parameters": sum(p.numel() for p in self.parameters),
            "optimizer_state_mib": round(state / MIB, 1),
        }


def check_equal(release: Side, ours: Side, arguments: tuple) -> dict[str, float]:
    """Relative differences of loss and gradients; the benchmark compares only what computes the same.

    Raises:
        RuntimeError: when they differ by more than the precision explains.
    """
    losses, gradients = [], []
    for side in (release, ours):
        loss = side.loss(*arguments)
        loss.backward()
        losses.append(loss.item())
        if isinstance(side.module, ReleaseWay):
            table = side.module.mllm.get_input_embeddings().weight.grad[side.module.vocabulary :]
            others = [side.module.connector, side.module.transformer]
        else:
            table = side.model.ladder.queries.grad
            others = [side.model.ladder.connector, side.model.denoiser.transformer]
        whole = [p.grad for module in others for p in module.parameters()]
        gradients.append((table.float().clone(), torch.cat([g.float().flatten() for g in whole])))
        side.optimizer.zero_grad()
    found = {
        "loss": abs(losses[0] - losses[1]) / abs(losses[0]),
        "queries": ((gradients[0][0] - gradients[1][0]).norm() / gradients[0][0].norm()).item(),
        "others": ((gradients[0][1] - gradients[1][1]).norm() / gradients[0][1].norm()).item(),
    }
    limit = 0.1 if ours.cfg["precision"] == "bf16-mixed" else 1e-3
    if max(found.values()) > limit:
        raise RuntimeError(f"the release's way and ours differ: {found}")
    return found


def bench_training(model: UniImage, cfg: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Every case of the config."""
    sides = {BASELINE: Side(BASELINE, model, cfg), OURS: Side(OURS, model, cfg)}
    cases, rows = {}, []
    rate = matmul_rate(
        device, DTYPES["bfloat16" if cfg["precision"] == "bf16-mixed" else "float32"], cfg["matmul_size"]
    )
    for case in training_cases(cfg):
        arguments = (make_inputs(model, case, cfg["shared_tokens"]), *targets(model, case.batch, cfg["latent_side"]))
        equal = check_equal(sides[BASELINE], sides[OURS], arguments)
        run = {name: (lambda s=side: s.step(*arguments)) for name, side in sides.items()}
        found = summary(interleaved(run, cfg["repeats"], device), BASELINE, OURS)
        flops = case.batch * sum(flops_of(cfg["model"], case, cfg["latent_side"]).values())
        found["samples_per_s"] = {n: round(case.batch / s, 3) for n, s in found["median_s"].items()}
        found["utilisation"] = round(flops / found["median_s"][OURS] / rate, 3)
        found["difference"] = equal
        for name in sides:
            memory = peak_memory(_one_side, (name, cfg, device.type, case), device)
            found.setdefault("peak_mib", {})[name] = memory["peak_mib"]
        cases[f"{case.name}, {case.tokens}"] = found
        peaks = found["peak_mib"]
        rows.append([
            case.name, case.tokens, case.batch, f"{found['median_s'][BASELINE]:.3f}", f"{found['median_s'][OURS]:.3f}",
            f"{found['ratio']:.2f}", f"{peaks[BASELINE]:.0f}", f"{peaks[OURS]:.0f}",
            f"{peaks[BASELINE] / peaks[OURS]:.2f}", f"{found['utilisation']:.2f}",
        ])  # fmt: skip
        log.info("%s, %d tokens: %.2f", case.name, case.tokens, found["ratio"])
    holds = {name: side.holds() for name, side in sides.items()}
    header = [
        "prompt",
        "tokens",
        "batch",
        "release s",
        "ours s",
        "ratio",
        "release MiB",
        "ours MiB",
        "ratio",
        "utilisation",
    ]
    return {
        "cases": cases,
        "holds": holds,
        "matmul_flops_per_s": rate,
        "table": markdown(header, rows)
        + "\n\n"
        + markdown(
            ["what trains", "tensors", "parameters", "optimizer state MiB"],
            [[n, *(f"{v:,}" for v in h.values())] for n, h in holds.items()],
        ),
    }


def training_cases(cfg: dict[str, Any]) -> list[Case]:
    """Text alone, and image with text, at each length."""
    return [
        Case(name, tokens, cfg["batch"][kind])
        for kind, name in (("text", "text"), ("image", "image + text"))
        for tokens in cfg["tokens"]
    ]


def _one_side(name: str, cfg: dict[str, Any], device: str, case: Case) -> Callable[[], Any]:
    """A side alone, for its memory; the release's way frees the model that it copied."""
    model = make_model(cfg["model"], device)
    inputs = make_inputs(model, case, cfg["shared_tokens"])
    arguments = (inputs, *targets(model, case.batch, cfg["latent_side"]))
    side = Side(name, model, cfg)
    if name == BASELINE:
        side.model = None  # type: ignore[assignment]
        del model
        gc.collect()
    return lambda: side.step(*arguments)


def bench_compiled(model: UniImage, cfg: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Ours compiled against ours plain; each case in turn."""
    plain_side = Side(OURS, model, cfg)
    rows, cases = [], {}
    for case in training_cases(cfg):
        arguments = (make_inputs(model, case, cfg["shared_tokens"]), *targets(model, case.batch, cfg["latent_side"]))
        blocks, queries = model.denoiser._run_block, model.mllm._query_layer
        compiled_side = Side(OURS, model, cfg, compiled=True)
        fast = model.denoiser._run_block, model.mllm._query_layer

        def run(side: Side, parts: tuple, values: tuple) -> None:
            model.denoiser._run_block, model.mllm._query_layer = parts
            side.step(*values)

        seconds = interleaved(
            {
                OURS: lambda a=arguments, p=(blocks, queries): run(plain_side, p, a),
                COMPILED: lambda s=compiled_side, p=fast, a=arguments: run(s, p, a),
            },
            cfg["repeats"],
            device,
        )
        model.denoiser._run_block, model.mllm._query_layer = blocks, queries
        found = summary(seconds, OURS, COMPILED)
        cases[f"{case.name}, {case.tokens}"] = found
        rows.append([case.name, case.tokens, *(f"{v:.3f}" for v in found["median_s"].values()), found["ratio"]])
    return {"cases": cases, "table": markdown(["prompt", "tokens", "ours s", "compiled s", "ratio"], rows)}


def bench_batches(model: UniImage, cfg: dict[str, Any]) -> dict[str, Any]:
    """The largest batches that fit capped GPU memory."""
    found: dict[str, Any] = {}
    rows = []
    for name in (BASELINE, OURS):
        side = Side(name, model, cfg)
        for case in training_cases(cfg)[:: len(cfg["tokens"])]:

            def step(batch: int, case: Case = case, side: Side = side) -> None:
                sized = Case(case.name, case.tokens, batch)
                inputs = make_inputs(model, sized, cfg["shared_tokens"])
                side.step(inputs, *targets(model, batch, cfg["latent_side"]))

            sizes = {cap: largest_batch(step, int(cap * 1024**3)) for cap in cfg["memory_caps_gib"]}
            found[f"{name}, {case.name}"] = sizes
            rows.append([f"{name}, {case.name}", *sizes.values()])
        del side
        gc.collect()
    return {"largest_batch": found, "table": markdown(["", *(f"{c} GiB" for c in cfg["memory_caps_gib"])], rows)}


def bench_sampling(model: UniImage, cfg: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The whole way from prompts to latents: exact gains first, then what changes the picture, apart."""
    options, release = cfg["sampling"], ReleaseWay(model).eval()
    release.mllm.gradient_checkpointing_disable()
    batch, steps, scale = options["batch"], options["steps"], options["guidance_scale"]
    inputs = make_inputs(model, Case("text", options["tokens"], batch + 1), cfg["shared_tokens"])
    rows_of_branches = torch.tensor([0] * batch + list(range(1, batch + 1)), device=device)
    both = {k: v[rows_of_branches] for k, v in inputs.items() if k in ("input_ids", "attention_mask")}

    @torch.no_grad()
    def ours(latents: Tensor, count: int, interval: tuple[float, float] = (0.0, 1.0)) -> Tensor:
        condition = model.denoiser.project(model.encode_condition(inputs))[rows_of_branches]
        return solve(model, condition, Guidance(scale, interval=interval), latents, count)

    cases, rows, changed = {}, [], []
    for side in options["latent_sides"]:
        noise = targets(model, batch, side)[0]
        with autocast(cfg, device):
            theirs, made = release.sample(both, noise, steps, scale), ours(noise, steps)
            low, high = options["interval"]
            runs = {
                BASELINE: lambda n=noise: release.sample(both, n, steps, scale),
                OURS: lambda n=noise: ours(n, steps),
                "interval": lambda n=noise: ours(n, steps, (low, high)),
                "fewer": lambda n=noise: ours(n, options["fewer_steps"]),
            }
            seconds = interleaved(runs, options["repeats"], device)
            other = {"interval": ours(noise, steps, (low, high)), "fewer": ours(noise, options["fewer_steps"])}
        found = summary(seconds, BASELINE, OURS)
        found["difference"] = ((theirs - made).norm() / theirs.norm()).item()
        found["changed"] = {k: round(((v - made).norm() / made.norm()).item(), 4) for k, v in other.items()}
        if cfg["precision"] != "bf16-mixed" and found["difference"] > 1e-3:
            raise RuntimeError(f"the release's samples and ours differ by {found['difference']}")
        cases[f"{side} x {side}"] = found
        medians = found["median_s"]
        rows.append([f"{side} x {side}", f"{medians[BASELINE]:.3f}", f"{medians[OURS]:.3f}", f"{found['ratio']:.2f}"])
        for name, label in (
            ("interval", f"guidance only for sigma in [{low}, {high}]"),
            ("fewer", f"{options['fewer_steps']} steps instead of {steps}"),
        ):
            gain = medians[OURS] / medians[name]
            changed.append([f"{side} x {side}: {label}", f"{gain:.2f}", f"{found['changed'][name]:.3f}"])
    table = markdown(["latents", "release s", "ours s", "ratio"], rows)
    table += "\n\nNot exact, against ours:\n\n" + markdown(["what", "faster by", "latents change by"], changed)
    return {"cases": cases, "table": table}


def bench(cfg: dict[str, Any]) -> dict[str, Any]:
    """Everything that the config asks for."""
    device = pick_device(cfg["device"])
    torch.manual_seed(0)
    model = make_model(cfg["model"], device.type)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    report: dict[str, Any] = {
        "device": name,
        "machine": platform.machine(),
        "torch": torch.__version__,
        "precision": cfg["precision"],
        "repeats": cfg["repeats"],
        "latents": "cached on both sides",
    }
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "training": lambda: bench_training(model, cfg, device),
        "sampling": lambda: bench_sampling(model, cfg, device),
        "compiled": lambda: bench_compiled(model, cfg, device),
        "batches": lambda: bench_batches(model, cfg),
    }
    for part in cfg["parts"]:
        report[part] = parts[part]()
        gc.collect()
    return report


def check(cfg: dict[str, Any]) -> None:
    """Raise ValueError for what can't be measured."""
    known = ("training", "sampling", "compiled", "batches")
    if wrong := [p for p in cfg["parts"] if p not in known]:
        raise ValueError(f"parts may hold {', '.join(known)}; got {wrong[0]!r}")
    if "batches" in cfg["parts"] and pick_device(cfg["device"]).type != "cuda":
        raise ValueError("parts=[batches] caps a GPU's memory; this computer has none, or device=cpu was given")
    if cfg["precision"] not in ("32-true", "bf16-mixed"):
        raise ValueError(f"precision must be 32-true or bf16-mixed, got {cfg['precision']!r}")
    if min(cfg["tokens"]) <= cfg["shared_tokens"] or cfg["repeats"] < 1:
        raise ValueError("tokens must exceed shared_tokens, and repeats be at least 1")


@hydra.main(version_base="1.3", config_path=CONF, config_name="bench")
@user_errors
def main(cfg: DictConfig) -> None:
    OmegaConf.resolve(cfg)
    options = plain(cfg)
    check(options)
    report = bench(options)
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    tables = [f"## {part}\n\n{report[part].pop('table')}" for part in options["parts"]]
    facts = f"{report['device']}, {report['precision']}, medians of {report['repeats']}, interleaved, latents cached."
    text = "\n\n".join(["# The release's way against ours", facts, *tables]) + "\n"
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    (out / "report.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
