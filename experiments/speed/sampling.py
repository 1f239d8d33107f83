"""Sampling the release's way against ours, from prompts to latents."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from experiments.costs import Case, make_inputs
from experiments.speed.measure import interleaved, markdown, summary
from experiments.speed.release import ReleaseWay
from experiments.speed.training import BASELINE, OURS, layer_functions, make_model, set_layer_functions, targets
from tbac.models import UniImage
from tbac.sampling.cuda_graph import PredictionGraphs
from tbac.sampling.guidance import Guidance
from tbac.sampling.solver import solve

LIMIT = 1e-3  # relative difference of latents in float32


def bench_sampling(cfg: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Exact gains first; what changes the picture stands apart.

    Raises:
        RuntimeError: when the latents differ by more than float32 explains.
    """
    options, model = cfg["sampling"], make_model(cfg["model"], device.type)
    if cfg["precision"] == "bf16-mixed":  # pictures are drawn in bfloat16 throughout
        model.ladder.bfloat16()
        model.denoiser.bfloat16()
    release = ReleaseWay(model).eval()
    release.mllm.gradient_checkpointing_disable()
    plain = layer_functions(model)
    compiled = None
    if "ours, compiled" in cfg["sides"]:
        model.compile_parts(**cfg["compile_options"])
        compiled = layer_functions(model)
        set_layer_functions(model, plain)

    cases, rows, changed = {}, [], []
    exact = [BASELINE, OURS]
    for case in sampling_cases(options):
        runs, exact = _runs_of(case, model, release, cfg, compiled, plain)
        made = {name: run() for name, run in runs.items()}
        found = summary(interleaved(runs, options["repeats"], device), BASELINE, OURS)
        found["difference"] = {
            name: ((value - made[OURS]).norm() / made[OURS].norm()).item() for name, value in made.items()
        }
        if cfg["precision"] != "bf16-mixed" and found["difference"][BASELINE] > LIMIT:
            raise RuntimeError(f"the release's samples and ours differ by {found['difference'][BASELINE]}")
        label = f"{case.name}, {case.batch}, {case.latent_side} x {case.latent_side}"
        cases[label] = found
        median = found["median_s"]
        rows.append(
            [label, *(f"{median[n]:.3f}" for n in exact), *(f"{median[BASELINE] / median[n]:.2f}" for n in exact[1:])]
        )
        for name in runs:
            if name not in exact:
                gain, difference = median[OURS] / median[name], found["difference"][name]
                changed.append([f"{label}: {name}", f"{gain:.2f}", f"{difference:.3f}"])
    table = f"{options['steps']} steps, guidance {options['guidance_scale']}, seconds:\n\n"
    table += markdown(["pictures", *exact, *(f"release / {name}" for name in exact[1:])], rows)
    table += "\n\nNot exact; against ours:\n\n"
    table += markdown(["what", "faster by", "relative change of latents"], changed)
    best = max(found["median_s"][BASELINE] / found["median_s"][name] for found in cases.values() for name in exact[1:])
    return {"cases": cases, "table": table, "line": f"release / ours at best {best:.2f}"}


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
    compiled: Any,
    plain: Any,
) -> tuple[dict[str, Callable[[], Tensor]], list[str]]:
    """What draws the same pictures, by name, and which of them are exact."""
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
    def ours(count: int, guided: Guidance, functions: Any = plain, graphs: PredictionGraphs | None = None) -> Tensor:
        set_layer_functions(model, functions)
        condition = model.denoiser.project(model.encode_condition(inputs))[rows_of_branches]
        drawn = solve(model, condition, guided, noise, count, graphs=graphs)
        set_layer_functions(model, plain)
        return drawn

    runs: dict[str, Callable[[], Tensor]] = {
        BASELINE: lambda: release.sample(repeated, noise, steps, guidance),
        OURS: lambda: ours(steps, guidance),
    }
    recorded = PredictionGraphs(model), PredictionGraphs(model)  # without and with compiled blocks
    if noise.is_cuda:
        runs["ours, CUDA graph"] = lambda: ours(steps, guidance, plain, recorded[0])
    if compiled is not None:
        runs["ours, compiled"] = lambda: ours(steps, guidance, compiled)
        if noise.is_cuda:
            runs["ours, compiled, CUDA graph"] = lambda: ours(steps, guidance, compiled, recorded[1])
    exact = list(runs)
    low, high = options["interval"]
    runs[f"guidance only for sigma in [{low}, {high}]"] = lambda: ours(steps, part)
    runs[f"{fewer} steps instead of {steps}"] = lambda: ours(fewer, guidance)
    return runs, exact
