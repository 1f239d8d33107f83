"""What training takes before it is tried: parameters, memory by kind, FLOPs by part, time, and what fits.

python experiments/plan.py world=real machine=slurm optim=adamw8bit
"""

import json
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from experiments.reports import format_table
from tbac.app import command, compose_checked, get_run_folder

CACHE_WORDS = {
    "tflop_saved": "TFLOP saved a sample",
    "faster_by": "faster by, from the second epoch on",
    "mib_an_entry": "MiB an entry",
    "gib_per_thousand_samples": "GiB per 1,000 samples",
    "gib_read_per_s_per_gpu": "GiB read a second and GPU",
}


def format_report(report: dict[str, Any]) -> str:
    """Format the report as text: parameters first, then a table each for FLOPs, memory, time and largest batches."""
    counted = report["parameters"] | {name: report[name] for name in ("total", "trained", "frozen")}
    lines = [f"{name:16s} {value:>15,d}  {value / 1e6:>9.1f} M" for name, value in counted.items()]
    text = ["\n".join([*lines, f"taps             {report['taps']}"])]
    stages = report["stages"]
    names = [stage["stage"] for stage in stages]

    def format_stages(title: str, rows: list[tuple[str, list[Any]]]) -> str:
        """A table with a column for each stage."""
        return format_table([title, *names], [[name, *values] for name, values in rows])

    def list_teraflops(part: str) -> list[str]:
        return [f"{stage['flops_per_sample'].get(part, 0.0) / 1e12:.2f}" for stage in stages]

    def list_gib(kind: str) -> list[str]:
        return [f"{stage['memory_gib'].get(kind, 0.0):.2f}" for stage in stages]

    # A stage without input images has no FLOPs for them, so the parts of all stages are listed.
    parts = dict.fromkeys(part for s in stages for part in s["flops_per_sample"])
    flops = [(part, list_teraflops(part)) for part in parts]
    flops.append(("in all", [f"{s['flops'] / 1e12:.2f}" for s in stages]))
    text.append(format_stages("TFLOP per sample", flops))
    # Memory is that of the batch which the stage sets.
    memory: list[tuple[str, list[Any]]] = [("batch per GPU", [s["setting"]["batch"] for s in stages])]
    kinds = dict.fromkeys(kind for s in stages for kind in s["memory_gib"])
    memory += [(kind, list_gib(kind)) for kind in kinds]
    memory.append(("in all", [f"{s['memory_total_gib']:.2f}" for s in stages]))
    text.append(format_stages("GiB per GPU", memory))
    text.append(
        format_stages(
            "recipe",
            [
                ("GPUs", [s["setting"]["devices"] for s in stages]),
                ("samples per second and GPU", [s["samples_per_s_per_gpu"] for s in stages]),
                ("samples per second", [s["samples_per_s"] for s in stages]),
                ("samples", [f"{s['samples']:,}" for s in stages]),
                ("hours", [f"{s['hours']:,.0f}" for s in stages]),
                ("GPU hours", [f"{s['gpu_hours']:,.0f}" for s in stages]),
            ],
        )
    )
    # What prompt_cache.keep would save after the first epoch, and what it takes to keep and to read.
    kept: list[tuple[str, list[Any]]] = []
    for keep, spared in stages[0]["prompt_cache"].items():
        for name in spared:
            kept.append((f"{keep}: {CACHE_WORDS[name]}", [s["prompt_cache"][keep][name] for s in stages]))
    text.append(format_stages("prompt_cache.keep", kept))
    # What fits depends on the setting and on the GPU.
    for stage in stages:
        sizes = list(next(iter(stage["largest_batch"].values())))
        rows = [[label, *batches.values()] for label, batches in stage["largest_batch"].items()]
        text.append(format_table([f"largest batch, {stage['stage']}", *(f"{gb} GB" for gb in sizes)], rows))
    return "\n\n".join(text)


@command("plan")
def main(cfg: DictConfig) -> None:
    others = [o for o in HydraConfig.get().overrides.task if not o.lstrip("+").startswith("stage=")]
    stages = [compose_checked("plan", [*others, f"stage={name}"]) for name in cfg.stages]

    from experiments.budget import plan_run  # torch and diffusers, only when the config is right

    report = plan_run(cfg.model, stages)
    print(format_report(report))
    print(
        f"\nSpeed at {cfg.utilisation:.0%} of {cfg.peak_tflops} TFLOP/s; prompts of {cfg.text_tokens} tokens, input "
        f"images of {cfg.image_tokens}; {cfg.overhead_gib} GiB for the CUDA context and libraries."
    )
    (get_run_folder() / "report.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
