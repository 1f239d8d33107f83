"""Scores of a finished point: GenEval's rules, and the validation loss without each of its taps."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from PIL import Image

from experiments.scores.benchmarks import make_benchmark
from experiments.scores.steps import score_checkpoint
from experiments.sweeps.points import Point
from experiments.ui.ladder import measure_mix
from tbac.app import compose_checked, make_part, open_model
from tbac.data.datamodule import ShardDataModule
from tbac.data.transforms import ConditionDropout
from tbac.evaluation.benchmarks.base import PictureBenchmark
from tbac.evaluation.benchmarks.in_memory import score_in_memory
from tbac.files import ForeignFileError, read_json, write_whole
from tbac.flow import compute_velocity_loss, interpolate
from tbac.models import UniImage
from tbac.models.checks import check_plain
from tbac.models.saved import FACTS, read_checkpoint
from tbac.pictures import PictureError, open_picture
from tbac.sampling.grid import encode_png
from tbac.training.module import get_latents
from tbac.training.randomness import draw_noise

MIX_PROMPTS = 32  # over which the shares of layers are averaged, where they depend on the prompt
log = logging.getLogger(__name__)
FILE = "scores.json"
SUITE_SCORES = {
    "edits": ("score", "happened", "kept"),
    "dpg": ("overall",),
    "tiif": ("overall, short", "overall, long", "text, short", "text, long"),
}


def score_point(point: Point, cfg: DictConfig, detector: Any) -> dict[str, Any]:
    """Score a point, or read what was scored before.

    Returns:
        `geneval` (overall and tags), `loss` of the validation set, `without` (MLLM layer -> loss when the contexts
        that it feeds are zero), `mix` (block by layer) where the mix of taps is learned, and `suites` (name -> value)
        where there are any.
    """
    # What was scored before is kept, unless other suites were asked for then.
    file = point.folder / FILE
    known = read_scores(file)
    if known is not None and known["asked"] == list(cfg.suites) and open_grid(point):
        return known
    # GenEval's rules, and a few of its pictures for the report.
    pipeline = open_model(str(point.checkpoint), "auto", "float32")
    scored = score_in_memory(pipeline, make_part(cfg.geneval, "geneval"), detector)
    chosen = choose_of_each_tag([row.group for row in scored.rows], cfg.prompts_per_tag)
    pictures = point.folder / "grid"
    pictures.mkdir(exist_ok=True)
    for i in chosen:
        write_whole(pictures / f"{i:05d}.png", encode_png(scored.pictures[i]))
    # What each tap is worth, and what further benchmarks say.
    model, plan = pipeline.model, pipeline.model.ladder.plan
    scores = {
        "geneval": dict(scored.summary.scores),
        "prompts": {f"{i:05d}": scored.rows[i].prompt for i in chosen},
        **measure_losses(model, point.checkpoint),
        "layers": list(plan.layers),
        "mix": measure_mix(model, [row.prompt for row in scored.rows[:MIX_PROMPTS]]).tolist() if plan.mixed else None,
        "asked": list(cfg.suites),
        "suites": score_suites(point, cfg, pipeline, detector),
    }
    write_whole(file, (json.dumps(scores, indent=2) + "\n").encode())
    return scores


def list_metrics(point: Point) -> dict[str, float]:
    """List the scores of a point as metrics of its run: `geneval/overall` and so on, and those of further suites."""
    metrics = {f"geneval/{tag}": value for tag, value in point.scores["geneval"].items()}
    for name, value in point.scores["suites"].items():
        suite, _, score = name.partition(": ")
        metrics[f"{suite}/{score.replace(', ', '_')}"] = value
    return metrics


def read_scores(file: Path) -> dict[str, Any] | None:
    """Read the scores of a point; None where there are none, with a warning where they can't be used."""
    if not file.exists():
        return None
    kinds = {"geneval": dict, "prompts": dict, "loss": float, "without": dict, "layers": list, "suites": dict}
    try:
        known: dict[str, Any] = read_json(file, kind=dict)
        wrong = [name for name, kind in kinds.items() if not isinstance(known.get(name), kind)]
        wrong += [name for name in ("mix", "asked") if name not in known]
        if wrong:
            raise ForeignFileError(f"{file} lacks {', '.join(wrong)}")
    except ForeignFileError as error:
        log.warning("%s; the point is scored anew", error)
        return None
    return known


def score_suites(point: Point, cfg: DictConfig, pipeline: Any, detector: Any) -> dict[str, float]:
    """Score the point by further suites; returns `<suite>: <score>` -> value."""
    suite_scores: dict[str, float] = {}
    for name in cfg.suites:
        benchmark = make_part(cfg.edits, "edits") if name == cfg.edits.name else open_suite(name, cfg.suite_overrides)
        # What the detector judges needs no tree of pictures.
        if isinstance(benchmark, PictureBenchmark) and benchmark.needs == "detector":
            scores: Mapping[str, float] = score_in_memory(pipeline, benchmark, detector).summary.scores
        else:
            folder = point.folder / name
            scores = score_checkpoint(name, point.checkpoint, folder, cfg.tracking_uri, cfg.suite_overrides).scores
        # A benchmark that isn't in SUITE_SCORES is represented by the score that it lists first.
        wanted = SUITE_SCORES.get(name) or [next(iter(scores))]
        suite_scores |= {f"{name}: {key}": scores[key] for key in wanted if key in scores}
    return suite_scores


def open_suite(name: str, overrides: Sequence[str]) -> Any:
    """Open a benchmark as `evaluate.py benchmark=NAME` with these overrides does."""
    return make_benchmark(compose_checked("evaluate", [f"benchmark={name}", "checkpoint=.", "out=.", *overrides]))


def choose_of_each_tag(tags: Sequence[str], count: int) -> list[int]:
    """Choose the first `count` rows of each tag; returns their indices."""
    numbers: dict[str, list[int]] = {}
    for number, tag in enumerate(tags):
        numbers.setdefault(tag, []).append(number)
    return [number for of_tag in numbers.values() for number in of_tag[:count]]


def open_data(config: Mapping[str, Any]) -> ShardDataModule:
    """Open the data that a checkpoint was trained on.

    A checkpoint is data: its options are given to `ShardDataModule`, whatever class it names, so that no code of
    someone else's choice is run.
    """
    options = drop_class(config["data"])
    options["dropout"] = ConditionDropout(**drop_class(options["dropout"]))
    check_plain(options["sources"], "data.sources")
    return ShardDataModule(**options)


def drop_class(options: Mapping[str, Any]) -> dict[str, Any]:
    """Drop the keys of a part's options that only Hydra reads."""
    return {name: value for name, value in options.items() if not name.startswith("_")}


@torch.no_grad()
def measure_losses(model: UniImage, checkpoint: Path) -> dict[str, Any]:
    """Measure the validation loss as training computes it, and once more without each tap."""
    data = open_data(read_checkpoint(checkpoint)[FACTS]["config"])
    data.bind(model.prompt)
    # Leaving out a tap means that the blocks which it feeds read zeros. Where taps are mixed, a block is left out.
    plan = model.ladder.plan
    blocks: dict[str, list[int]] = {}
    order = sorted(enumerate(plan.list_readings()), key=lambda pair: pair[0] if plan.mixed else (pair[1], pair[0]))
    names = plan.name_readings()
    for block, _ in order:
        blocks.setdefault(str(block) if plan.mixed else names[block], []).append(block)
    # Sums over all samples, of the whole model and without each tap, with the same noise.
    names = ["whole", *blocks]
    sums = dict.fromkeys(names, 0.0)
    count = 0
    for batch in data.val_dataloader():
        batch = batch.to(model.device)
        latents = get_latents(model, batch)
        noise, sigma = draw_noise(batch.keys, latents)
        path = interpolate(latents, noise, sigma)
        condition = model.encode_condition(batch.prompt)
        for name in sums:
            states = condition.states.clone()
            if name != "whole":
                states[blocks[name]] = 0
            predicted = model.predict_velocity(path.noisy, sigma, replace(condition, states=states))
            sums[name] += compute_velocity_loss(predicted, path.velocity).item() * len(batch)
        count += len(batch)
    means = {name: total / count for name, total in sums.items()}
    return {"loss": means.pop("whole"), "without": means}


def open_grid(point: Point) -> list[Image.Image]:
    """Open the point's pictures of the fixed prompts; none if one of them can't be read."""
    try:
        return [open_picture(file) for file in sorted((point.folder / "grid").glob("*.png"))]
    except PictureError as error:
        log.warning("%s; the point is scored anew", error)
        return []
