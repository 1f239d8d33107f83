"""The main job, end to end: python experiments/demo.py

Builds the shapes world, trains the three stages one after the other, scores the model before training and after each
stage, draws, edits, answers, and writes `report.json`, `report.md` and a contact sheet. `experiment=shapes_full` does
the same for longer, and scores more.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from tbac.app import command, compose_checked, to_plain


def format_report(report: dict[str, Any]) -> str:
    """Format the report as Markdown tables: losses of the stages, GenEval's scores after each, all other scores."""
    lines = ["| stage | steps | val loss first | val loss last |", "| --- | ---: | ---: | ---: |"]
    for stage in report["stages"]:
        first, last = stage["val_loss_first"], stage["val_loss_last"]
        lines.append(f"| {stage['name']} | {stage['steps']} | {first:.4f} | {last:.4f} |")
    # A row for each stage, and one for the model before training.
    tags = list(report["geneval"]["untrained"])
    lines += ["", "| GenEval rules, after | " + " | ".join(tags) + " |", "| --- |" + " ---: |" * len(tags)]
    for name, scores in report["geneval"].items():
        lines.append(f"| {name} | " + " | ".join(f"{scores[t]:.2f}" for t in tags) + " |")
    # Everything that is measured once, of the finished model.
    edits = report["edit_by_kind"]
    lines += ["", "| score | value |", "| --- | ---: |"]
    rows = {
        "edit score": report["edit"],
        "the edit happened": report["edit_happened"],
        "the rest stayed": report["edit_kept"],
        **{f"edit happened: {k}": v for k, v in edits.items() if k != "overall"},
        "answer accuracy": report["answer_accuracy"],
        "answer accuracy before training": report["answer_accuracy_before"],
        "detector accuracy, ground truth": report["detector_accuracy"],
        "detector accuracy, reconstructions": report["detector_accuracy_reconstructed"],
    }
    lines += [f"| {name} | {value:.3f} |" for name, value in rows.items()]
    lines += [f"| {name} | {value:.2f} |" for name, value in report["suites"].items()]
    return "\n".join(lines)


@command("demo")
def main(cfg: DictConfig) -> None:
    # Torch and the libraries of models are imported only when the config is right.
    from data_prep.shapes.parts import build_world
    from experiments.scores.showcase import run_showcase
    from tbac.training.tracking import open_parent_run

    started = time.monotonic()
    out = Path(cfg.out)
    os.environ["TBAC_SHAPES"] = cfg.world_folder  # where all configs look for the world
    build_world(compose_checked("shapes", [f"seed={cfg.seed}", *cfg.world_overrides]))
    built = time.monotonic()
    with open_parent_run(cfg.tracking_uri, "tbac", "demo") as run:
        run.log_config(to_plain(cfg))
        report = run_showcase(cfg, run)
        report["seconds_world"] = round(built - started, 1)
        report["seconds"] = round(time.monotonic() - started, 1)
        (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        text = f"# {cfg.title}\n\n{format_report(report)}\n\n![contact sheet](contact_sheet.png)\n"
        (out / "report.md").write_text(text)
        for name in ("report.json", "report.md", "contact_sheet.png"):
            run.log_file(out / name)
    print(f"\n{format_report(report)}\n")
    print(f"{report['seconds']:.0f} s in all. Pictures: {report['contact_sheet']}. Model: {out / 'model'}.")
    print("Compare the runs with `make ui`.")


if __name__ == "__main__":
    main()
