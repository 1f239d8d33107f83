"""What training takes before it is tried: parameters, memory by kind, FLOPs by part, time, and what fits.

python experiments/plan.py world=real machine=slurm optim=adamw8bit
"""

import json
from typing import Any

import hydra
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from experiments.reports import markdown
from tbac.app import CONF, output_dir, user_errors


def tables(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = [
        f"{name:16s} {value:>15,d}  {value / 1e6:>9.1f} M"
        for name, value in (*report["parameters"].items(), *((k, report[k]) for k in ("total", "trained", "frozen")))
    ]
    text = ["\n".join([*lines, f"taps             {report['taps']}"])]
    stages = report["stages"]
    names = [stage["stage"] for stage in stages]

    def table(title: str, rows: list[tuple[str, list[Any]]]) -> str:
        return markdown([title, *names], [[name, *values] for name, values in rows])

    parts = dict.fromkeys(part for s in stages for part in s["flops_per_sample"])
    tera = [(p, [f"{s['flops_per_sample'].get(p, 0.0) / 1e12:.2f}" for s in stages]) for p in parts]
    text.append(table("TFLOP per sample", [*tera, ("in all", [f"{s['flops'] / 1e12:.2f}" for s in stages])]))
    kinds = stages[0]["memory_gib"]
    gib = [(k, [f"{s['memory_gib'][k]:.2f}" for s in stages]) for k in kinds]
    batches = ("batch per GPU", [s["setting"]["batch"] for s in stages])
    text.append(table("GiB per GPU", [batches, *gib, ("in all", [f"{s['memory_total_gib']:.2f}" for s in stages])]))
    text.append(
        table(
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
    for stage in stages:
        sizes = list(next(iter(stage["largest_batch"].values())))
        rows = [[label, *found.values()] for label, found in stage["largest_batch"].items()]
        text.append(markdown([f"largest batch, {stage['stage']}", *(f"{gb} GB" for gb in sizes)], rows))
    return "\n\n".join(text)


@hydra.main(version_base="1.3", config_path=CONF, config_name="plan")
@user_errors
def main(cfg: DictConfig) -> None:
    others = [o for o in HydraConfig.get().overrides.task if not o.lstrip("+").startswith("stage=")]
    stages = [compose("plan", [*others, f"stage={name}"]) for name in cfg.stages]

    from experiments.budget import count_run  # torch and diffusers, only when the config is right

    report = count_run(cfg.model, stages)
    print(tables(report))
    print(
        f"\nSpeed at {cfg.utilisation:.0%} of {cfg.peak_tflops} TFLOP/s; prompts of {cfg.text_tokens} tokens, input "
        f"images of {cfg.image_tokens}; {cfg.overhead_gib} GiB for the CUDA context and libraries."
    )
    (output_dir() / "report.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
