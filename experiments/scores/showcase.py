"""Runs the demo in a world that is built already: trains three stages, scores after each, draws and answers."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from PIL import Image

from data_prep.shapes.pretrain_autoencoder import stack_pixels
from experiments.scores.sheets import score_with_sheet
from experiments.scores.steps import score_checkpoint
from experiments.training_run import train
from tbac.app import compose_checked, get_run_folder, make_part, open_model
from tbac.evaluation.benchmarks.answers import Answers
from tbac.evaluation.benchmarks.edits import KIND, Edits, parse_scan
from tbac.evaluation.benchmarks.geneval import GenEval
from tbac.files import write_whole
from tbac.models import UniImage
from tbac.pictures import open_picture
from tbac.sampling import UniImagePipeline
from tbac.sampling.grid import join_pictures
from tbac.sampling.latents import convert_to_pil
from tbac.training.tracking import RUN_ID, ParentRun, add_to_run, find_run_id, make_tag_name

log = logging.getLogger(__name__)
PER_TAG = 6  # pictures of each tag on the contact sheet


@dataclass(frozen=True)
class Benchmarks:
    """What the demo scores the model by, and the detector that judges."""

    geneval: GenEval
    edits: Edits
    answers: Answers
    detector: Any


def run_showcase(cfg: DictConfig, run: ParentRun) -> dict[str, Any]:
    """Train, score, draw and answer; returns the report."""
    out = Path(cfg.out)
    benchmarks = Benchmarks(*(make_part(cfg[name], name) for name in ("geneval", "edits", "answers", "judge")))
    untrained = UniImage.from_config(make_part(compose_training(cfg, cfg.stages[0], get_run_folder()).model, "model"))
    pipeline = UniImagePipeline(untrained)
    pipeline.set_progress_bar_config(disable=True)
    # Before training: how well the detector reads pictures, and what the MLLM answers.
    reading = measure_reading(benchmarks.detector, benchmarks.answers, pipeline)
    before = benchmarks.answers.score(pipeline.model)
    geneval = {"untrained": score_geneval(pipeline, benchmarks, "untrained", run)}
    # All stages in one process, as `make stages` runs them; each leaves a checkpoint, which is scored afterwards.
    stages = train_stages(cfg, run)
    trained_by = find_run_id(get_run_folder() / "stages")
    steps = 0
    for stage in stages:
        pipeline = open_model(stage.pop("checkpoint"), "cpu", "float32")
        geneval[stage["name"]] = score_geneval(pipeline, benchmarks, stage["name"], run)
        steps += stage["steps"]
        if trained_by is not None:
            scores = {f"geneval/{tag}": value for tag, value in geneval[stage["name"]].items()}
            add_to_run(cfg.tracking_uri, trained_by, scores, steps)
    # The finished model: edits, answers (which must be the same as before), pictures, further benchmarks.
    edits = score_with_sheet(pipeline, benchmarks.edits, benchmarks.detector, get_run_folder())
    after = benchmarks.answers.score(pipeline.model)
    pipeline.model.save_pretrained(out / "model")
    if trained_by is not None:
        write_whole(out / "model" / RUN_ID, f"{trained_by}\n".encode())
    draw_contact_sheet(pipeline, benchmarks, after.answers, cfg.seed, out / "contact_sheet.png")
    suites = score_suites(cfg, out / "model")
    run.log_metrics(
        {make_tag_name(name.replace(": ", "/").replace(", ", "_")): value for name, value in suites.items()}
    )
    return {
        "suites": suites,
        "stages": stages,
        "geneval": geneval,
        "edit": edits["score"],
        "edit_happened": edits["happened"],
        "edit_kept": edits["kept"],
        "edit_by_kind": {key.removeprefix(KIND): value for key, value in edits.items() if key.startswith(KIND)},
        "answer_accuracy": after.accuracy,
        "answer_accuracy_before": before.accuracy,
        "answers_identical": after.answers == before.answers,
        "detector_accuracy": reading["ground_truth"],
        "detector_accuracy_reconstructed": reading["reconstructed"],
        "contact_sheet": str(out / "contact_sheet.png"),
    }


def train_stages(cfg: DictConfig, run: ParentRun) -> list[dict[str, Any]]:
    """Train all stages, as a child of `run`; returns the report of each, with its last checkpoint."""
    folder = get_run_folder() / "stages"
    folder.mkdir(parents=True, exist_ok=True)
    tracked = [
        f"parent_run_id={run.run_id}",
        f"logger.tracking_uri={cfg.tracking_uri}",
        "logger.run_name=stages",
    ]
    report = train([compose_training(cfg, stage, folder, *tracked) for stage in cfg.stages], folder)
    return report.get("stages", [report])


def score_geneval(pipeline: UniImagePipeline, benchmarks: Benchmarks, name: str, run: ParentRun) -> dict[str, float]:
    """Score the model as it is now by GenEval's rules, and log the scores under `name`."""
    folder = get_run_folder() / name
    scores = score_with_sheet(pipeline, benchmarks.geneval, benchmarks.detector, folder)
    run.log_file(folder / "geneval.png")
    run.log_metrics({f"geneval/{name}/{tag}": value for tag, value in scores.items()})
    log.info("%s: GenEval rules %s", name, " ".join(f"{k} {v:.2f}" for k, v in scores.items()))
    return scores


def score_suites(cfg: DictConfig, model: Path) -> dict[str, float]:
    """Score the model by each of `cfg.suites`, which writes a report to `<out>/<suite>/`; returns percentages."""
    scores: dict[str, float] = {}
    for name in cfg.suites:
        suite = score_checkpoint(name, model, Path(cfg.out) / name, cfg.tracking_uri)
        scores |= {f"{suite.title}: {key}": suite.scores[key] for key in cfg.suites[name] if key in suite.scores}
    return scores


def compose_training(cfg: DictConfig, stage: str, folder: Path, *overrides: str) -> DictConfig:
    """Compose the config of `experiments/train.py` for one stage on the shapes world."""
    chosen = [f"stage={stage}", "world=shapes", f"run_dir={folder}", f"seed={cfg.seed}", *overrides]
    return compose_checked("train", [*chosen, *cfg.train_overrides, *cfg.stage_overrides.get(stage, [])])


def measure_reading(detector: Any, answers: Answers, pipeline: UniImagePipeline) -> dict[str, float]:
    """Measure in what share of held-out scenes the detector reads every object and the background right.

    Returns:
        `ground_truth`: for the pictures themselves; `reconstructed`: for what the autoencoder makes of them.
    """
    pictures = [open_picture(answers.folder / row["image"]) for row in answers.questions]
    truths = [name_objects(parse_scan(row["scene"])) for row in answers.questions]
    autoencoder = pipeline.model.autoencoder
    made = convert_to_pil((autoencoder.decode(autoencoder.encode(stack_pixels(pictures))) + 1) / 2)
    shares = {}
    for name, images in (("ground_truth", pictures), ("reconstructed", made)):
        right = [name_objects(detector(image)) == truth for image, truth in zip(images, truths, strict=True)]
        shares[name] = sum(right) / len(right)
    return shares


def name_objects(scan: Any) -> tuple:
    """List background and objects of a scan in a form that can be compared; places are rounded to 4 pixels."""
    objects = sorted((d.name, d.color, round(d.center[0] / 4), round(d.center[1] / 4)) for d in scan.detections)
    return scan.background, objects


def draw_contact_sheet(
    pipeline: UniImagePipeline, benchmarks: Benchmarks, answers: Sequence[str], seed: int, path: Path
) -> None:
    """Draw pictures of every tag with their prompts, edits beside their sources, and answered questions."""
    geneval, edits = benchmarks.geneval, benchmarks.edits
    # Some prompts of each tag.
    by_tag: dict[str, list[str]] = {}
    for row in geneval.prompts:
        by_tag.setdefault(row["tag"], []).append(row["prompt"])
    prompts = [prompt for rows in by_tag.values() for prompt in rows[:PER_TAG]]
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    drawn = pipeline(prompts, generator=generators, **geneval.build_sampling_options()).images
    # Some edits, each beside its source.
    rows = edits.edits[:PER_TAG]
    sources = [open_picture(edits.folder / row["image"]) for row in rows]
    instructions = [row["instruction"] for row in rows]
    options = edits.build_sampling_options() | {"num_inference_steps": geneval.num_inference_steps}
    edited = pipeline(instructions, image=sources, generator=generators[: len(rows)], **options).images
    # Some questions with what the model answered.
    questions = benchmarks.answers.questions[: 2 * PER_TAG]
    asked = [open_picture(benchmarks.answers.folder / row["image"]) for row in questions]
    said = [f"{row['question']} {answer}" for row, answer in zip(questions, answers, strict=False)]
    # A section for each kind, one below the other.
    pairs = [image for pair in zip(sources, edited, strict=True) for image in pair]
    titles = [text for instruction in instructions for text in ("source", instruction)]
    sections = [
        join_pictures(images, columns=2 * PER_TAG, scale=3, captions=captions, wrap=12)
        for images, captions in ((drawn, prompts), (pairs, titles), (asked, said))
    ]
    sheet = Image.new("RGB", (max(s.width for s in sections), sum(s.height for s in sections)), "white")
    top = 0
    for section in sections:
        sheet.paste(section, (0, top))
        top += section.height
    sheet.save(path)
