"""Sampling the release's way against ours, from prompts to latents."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from experiments.costs import Case, make_inputs
from experiments.reports import format_table
from experiments.speed.measure import interleaved, summary
from experiments.speed.release import ReleaseWay
from experiments.speed.training import (
    BASELINE,
    OURS,
    LayerFunctions,
    layer_functions,
    make_model,
    set_layer_functions,
    targets,
)
from tbac.models import UniImage
from tbac.sampling.cuda_graph import PredictionGraphs
from tbac.sampling.guidance import Guidance
from tbac.sampling.solver import solve

LIMIT = 1e-3  # relative difference of latents in float32


def bench_sampling(cfg: dict[str, Any], device: torch.device) -> Iterator[dict[str, Any]]:
    """Exact gains first; what changes the picture stands apart. Given anew after each kind of picture.

    Raises:
        RuntimeError: when the latents differ by more than float32 explains.
    """
    options, model = cfg["sampling"], make_model(cfg["model"], device.type)
    if cfg["precision"] == "bf16-mixed":  # pictures are drawn in bfloat16 throughout
        model.ladder.bfloat16()
        model.denoiser.bfloat16()
    release = ReleaseWay(model).eval()
    release.mllm.gradient_checkpointing_disable()
    compiled = None
    if "ours, compiled" in cfg["sides"]:
        plain = layer_functions(model)
        model.compile_parts(**cfg["compile_options"])
        compiled = layer_functions(model)
        set_layer_functions(model, plain)

    cases: dict[str, Any] = {}
    for case in sampling_cases(options):
        runs, exact = _runs_of(case, model, release, cfg, compiled)
        made = {name: run() for name, run in runs.items()}
        found = summary(interleaved(runs, options["repeats"], device), BASELINE, OURS) | {"exact": exact}
        found["difference"] = {
            name: ((value - made[OURS]).norm() / made[OURS].norm()).item() for name, value in made.items()
        }
        if cfg["precision"] != "bf16-mixed" and found["difference"][BASELINE] > LIMIT:
            raise RuntimeError(f"the release's samples and ours differ by {found['difference'][BASELINE]}")
        cases[f"{case.name}, {case.batch}, {case.latent_side} x {case.latent_side}"] = found
        yield {"cases": cases, "table": _sampling_tables(cases, options)}
    ratios = [one["median_s"][BASELINE] / min(one["median_s"][n] for n in one["exact"]) for one in cases.values()]
    line = "release / ours at best: " + " ".join(f"{ratio:.2f}" for ratio in ratios)
    yield {"cases": cases, "table": _sampling_tables(cases, options), "line": line}


def _sampling_tables(cases: dict[str, Any], options: dict[str, Any]) -> str:
    """Seconds of what draws the same, then what is faster and draws something else."""
    rows, changed, exact = [], [], [BASELINE, OURS]
    for label, found in cases.items():
        median, exact = found["median_s"], found["exact"]
        ratios = [f"{median[BASELINE] / median[name]:.2f}" for name in exact[1:]]
        rows.append([label, *(f"{median[name]:.3f}" for name in exact), *ratios])
        for name in median.keys() - set(exact):
            gain, difference = median[OURS] / median[name], found["difference"][name]
            changed.append([f"{label}: {name}", f"{gain:.2f}", f"{difference:.3f}"])
    table = f"{options['steps']} steps, guidance {options['guidance_scale']}, seconds:\n\n"
    table += format_table(["pictures", *exact, *(f"release / {name}" for name in exact[1:])], rows)
    table += "\n\nNot exact; against ours:\n\n"
    return table + format_table(["what", "faster by", "relative change of latents"], sorted(changed))


class SamplingCase(NamedTuple):
    """What is drawn.

    Attributes:
        name: `text` or `edit`.
        batch: pictures.
        latent_side: of their latents.
    """

    name: str
    batch: int
    latent_side: int


def sampling_cases(options: dict[str, Any]) -> list[SamplingCase]:
    """Every kind of picture at every batch and size."""
    return [
        SamplingCase(name, batch, side)
        for name in options["kinds"]
        for batch in options["batches"]
        for side in options["latent_sides"]
    ]


def _runs_of(
    case: SamplingCase,
    model: UniImage,
    release: ReleaseWay,
    cfg: dict[str, Any],
    compiled: LayerFunctions | None,
) -> tuple[dict[str, Callable[[], Tensor]], list[str]]:
    """What draws the same pictures, by name, and which of them are exact."""
    plain = layer_functions(model)
    options = cfg["sampling"]
    steps, fewer, batch = options["steps"], options["fewer_steps"], case.batch
    guidance = Guidance(options["guidance_scale"], 1.5 if case.name == "edit" else None)
    part = Guidance(guidance.text, guidance.image, tuple(options["interval"]))
    branches = len(guidance.branches)
    # Prompts that several branches or pictures have in common are read once by ours, each time by the release.
    side = options["image_side"] if case.name == "edit" else 0
    prompt = Case(case.name, options["tokens"], batch + branches - 1, side)
    inputs = make_inputs(model, prompt, cfg["shared_tokens"])
    rows = [i for i in range(branches - 1) for _ in range(batch)] + list(range(branches - 1, prompt.batch))
    rows_of_branches = torch.tensor(rows, device=model.device)
    repeated = {k: inputs[k][rows_of_branches] for k in ("input_ids", "attention_mask")}
    if side:
        patches = inputs["pixel_values"].unflatten(0, (prompt.batch, -1))
        repeated["pixel_values"] = patches[rows_of_branches].flatten(0, 1)
        repeated["image_grid_thw"] = inputs["image_grid_thw"][rows]
    noise = targets(model, batch, case.latent_side)[0]

    @torch.no_grad()
    def ours(count: int, guided: Guidance, functions: LayerFunctions, predictor: Any = model) -> Tensor:
        set_layer_functions(model, functions)
        condition = model.denoiser.project(model.encode_condition(inputs))[rows_of_branches]
        drawn = solve(predictor, condition, guided, noise, count)
        set_layer_functions(model, plain)
        return drawn

    runs: dict[str, Callable[[], Tensor]] = {
        BASELINE: lambda: release.sample(repeated, noise, steps, guidance),
        OURS: lambda: ours(steps, guidance, plain),
    }
    recorded = PredictionGraphs(model), PredictionGraphs(model)  # without and with compiled blocks
    if noise.is_cuda:
        runs["ours, CUDA graph"] = lambda: ours(steps, guidance, plain, recorded[0])
    if compiled is not None:
        runs["ours, compiled"] = lambda: ours(steps, guidance, compiled)
    if compiled is not None and noise.is_cuda:
        runs["ours, compiled, CUDA graph"] = lambda: ours(steps, guidance, compiled, recorded[1])
    exact = list(runs)
    low, high = options["interval"]
    runs[f"guidance only for sigma in [{low}, {high}]"] = lambda: ours(steps, part, plain)
    runs[f"{fewer} steps instead of {steps}"] = lambda: ours(fewer, guidance, plain)
    return runs, exact
