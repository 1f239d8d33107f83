"""Sampling the release's way against ours, from prompts to latents."""

from typing import Any

import torch
from torch import Tensor

from experiments.costs import Case, make_inputs
from experiments.reports import markdown
from experiments.speed.measure import interleaved, summary
from experiments.speed.release import ReleaseWay
from experiments.speed.training import BASELINE, OURS, autocast, make_model, targets
from tbac.sampling.guidance import Guidance
from tbac.sampling.solver import solve

LIMIT = 1e-3  # relative difference of latents in float32


def bench_sampling(cfg: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Exact gains first; what changes the picture stands apart.

    Raises:
        RuntimeError: when the latents differ by more than float32 explains.
    """
    options, model = cfg["sampling"], make_model(cfg["model"], device.type)
    release = ReleaseWay(model).eval()
    release.mllm.gradient_checkpointing_disable()
    batch, steps, scale, fewer = (options[k] for k in ("batch", "steps", "guidance_scale", "fewer_steps"))
    low, high = options["interval"]
    # One negative prompt for all, then the prompts; the release reads the negative prompt once for each of them.
    inputs = make_inputs(model, Case("text", options["tokens"], batch + 1), cfg["shared_tokens"])
    rows_of_branches = torch.tensor([0] * batch + list(range(1, batch + 1)), device=device)
    both = {k: inputs[k][rows_of_branches] for k in ("input_ids", "attention_mask")}

    @torch.no_grad()
    def ours(latents: Tensor, count: int, interval: tuple[float, float] = (0.0, 1.0)) -> Tensor:
        condition = model.denoiser.project(model.encode_condition(inputs))[rows_of_branches]
        return solve(model, condition, Guidance(scale, interval=interval), latents, count)

    cases, rows, changed = {}, [], []
    for side in options["latent_sides"]:
        noise = targets(model, batch, side)[0]
        runs = {
            BASELINE: lambda n=noise: release.sample(both, n, steps, scale),
            OURS: lambda n=noise: ours(n, steps),
            f"guidance only for sigma in [{low}, {high}]": lambda n=noise: ours(n, steps, (low, high)),
            f"{fewer} steps instead of {steps}": lambda n=noise: ours(n, fewer),
        }
        with autocast(cfg, device):
            made = {name: run() for name, run in runs.items()}
            found = summary(interleaved(runs, options["repeats"], device), BASELINE, OURS)
        found["difference"] = {
            name: ((value - made[OURS]).norm() / made[OURS].norm()).item() for name, value in made.items()
        }
        if cfg["precision"] != "bf16-mixed" and found["difference"][BASELINE] > LIMIT:
            raise RuntimeError(f"the release's samples and ours differ by {found['difference'][BASELINE]}")
        cases[f"{side} x {side}"] = found
        median = found["median_s"]
        rows.append([f"{side} x {side}", f"{median[BASELINE]:.3f}", f"{median[OURS]:.3f}", f"{found['ratio']:.2f}"])
        for name in list(runs)[2:]:
            gain, difference = median[OURS] / median[name], found["difference"][name]
            changed.append([f"{side} x {side}: {name}", f"{gain:.2f}", f"{difference:.3f}"])
    table = f"{steps} steps, {batch} pictures, guidance {scale}:\n\n"
    table += markdown(["latents", "release, s", "ours, s", "ratio"], rows)
    table += "\n\nNot exact; against ours:\n\n"
    table += markdown(["what", "faster by", "relative change of latents"], changed)
    return {"cases": cases, "table": table}
