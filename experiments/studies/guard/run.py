"""What the guard costs in time, and how often it rejects a step that has no fault.

python experiments/studies/guard/run.py

Time: one run of stage 1, every other step with the guard; both kinds clip gradients. False rejects: the three stages of
the shapes world as `make stages` trains them. Needs the shapes world.
"""

import json
import logging
import shutil
from pathlib import Path
from statistics import median
from typing import Any

from omegaconf import DictConfig

from experiments.reports import format_table
from experiments.stage_configs import compose_stages
from tbac.app import command, compose_checked, keep_freed_memory

log = logging.getLogger(__name__)
STAGES = "[t2i_pretrain,ti2i_pretrain,finetune]"


def measure_overhead(cfg: DictConfig, folder: Path) -> dict[str, float]:
    """Measure the median time of a step with and without the guard, in seconds."""
    from experiments.studies.guard.alternate import AlternatingGuard  # lightning, which --help doesn't need
    from experiments.training_run import train

    chosen = [
        "stage=t2i_pretrain", "world=shapes", "logger=csv", "callbacks.sample_grid.prompts=[]", f"run_dir={folder}",
        f"stage.steps={cfg.steps}", "stage.val_every=100000", "stage.val_samples=8", "~callbacks.progress",
        "callbacks.guard._target_=experiments.studies.guard.alternate.AlternatingGuard", *cfg.overrides,
    ]  # fmt: skip
    folder.mkdir(parents=True)
    for times in AlternatingGuard.times:
        times.clear()
    train([compose_checked("train", chosen)], folder)
    without, with_guard = map(median, AlternatingGuard.times)
    return {
        "without": without,
        "with": with_guard,
        "ratio": with_guard / without,
        "steps": len(AlternatingGuard.times[0]),
    }


def count_rejects(cfg: DictConfig, folder: Path) -> dict[str, int]:
    """Train the three stages, and count the steps that were taken and rejected."""
    from experiments.training_run import train

    chosen = [
        f"stages={STAGES}", "world=shapes", "logger=csv", "callbacks=audit", "callbacks.sample_grid.prompts=[]",
        f"run_dir={folder}", "~callbacks.progress", *cfg.overrides,
    ]  # fmt: skip
    folder.mkdir(parents=True)
    train(compose_stages(compose_checked("train", chosen), chosen), folder)
    lines = [json.loads(text) for text in (folder / "sample_log" / "rank_0.jsonl").read_text().splitlines()]
    rejected = sum(line["rejected"] for line in lines)
    return {"taken": len(lines) - rejected, "rejected": rejected}


@command("study/guard")
def main(cfg: DictConfig) -> None:
    keep_freed_memory()
    out = Path(cfg.out).absolute()
    shutil.rmtree(out / "work", ignore_errors=True)
    times = measure_overhead(cfg, out / "work" / "overhead")
    counts = count_rejects(cfg, out / "work" / "stages")
    (out / "report.json").write_text(json.dumps({"overhead": times, "rejects": counts}, indent=2) + "\n")
    rows: list[list[Any]] = [
        ["a step without the guard, ms", f"{1000 * times['without']:.2f}"],
        ["a step with the guard, ms", f"{1000 * times['with']:.2f}"],
        ["with / without", f"{times['ratio']:.4f}"],
        ["steps of each kind", times["steps"]],
        ["steps of the three stages", counts["taken"]],
        ["rejected", counts["rejected"]],
    ]
    print("\n" + format_table(["what", "value"], rows))


if __name__ == "__main__":
    main()
