"""Scores of a finished point: GenEval's rules, and the validation loss without each of its taps."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from experiments.evaluate import sampling_options, score_suite
from experiments.sweeps.points import Point
from tbac.app import open_model
from tbac.evaluation.benchmarks.edits import run_edits
from tbac.evaluation.benchmarks.geneval import read_geneval, run_geneval
from tbac.files import write_whole
from tbac.flow import interpolate, velocity_loss
from tbac.models import UniImage
from tbac.models.saved import FACTS, read_checkpoint
from tbac.training.module import latents_of
from tbac.training.randomness import noise_of

FILE = "scores.json"
SUITE_SCORES = {"dpg": ("overall",), "tiif": ("overall, short", "overall, long", "text, short", "text, long")}


def score(point: Point, cfg: DictConfig, detector: Any) -> dict[str, Any]:
    """Score a point, or read what was scored before.

    Returns:
        `geneval` (overall and tags), `loss` of the validation set, `without` (MLLM layer -> loss when the contexts
        that it feeds are zero), `mix` (block by layer) where the mix of taps is learned, and `suites` (name -> value)
        where there are any.
    """
    file = point.folder / FILE
    if file.is_file():
        known = json.loads(file.read_text())
        if known.get("asked", []) == list(cfg.suites):
            return known
    pipeline = open_model(str(point.checkpoint), "auto", "float32")
    rows = read_geneval(cfg.geneval.file)
    result = run_geneval(pipeline, rows, detector, sampling_options(cfg.geneval))
    chosen = _first_of_each_tag(rows, cfg.prompts_per_tag)
    pictures = point.folder / "grid"
    pictures.mkdir(exist_ok=True)
    for i in chosen:
        result["images"][i].save(pictures / f"{i:05d}.png")
    model, plan = pipeline.model, pipeline.model.ladder.plan
    scores = {
        "geneval": result["scores"],
        "prompts": {f"{i:05d}": rows[i]["prompt"] for i in chosen},
        **losses(model, point.checkpoint),
        "layers": list(plan.layers),
        "mix": model.ladder.mix_weights().tolist() if plan.mixed else None,
        "asked": list(cfg.suites),
        "suites": suites(point, cfg, pipeline, detector),
    }
    write_whole(file, (json.dumps(scores, indent=2) + "\n").encode())
    return scores


def suites(point: Point, cfg: DictConfig, pipeline: Any, detector: Any) -> dict[str, float]:
    """What the further suites say, each by its own name."""
    found: dict[str, float] = {}
    for name in cfg.suites:
        if name == "edits":
            result = run_edits(pipeline, cfg.edits.file, detector, sampling_options(cfg.edits))
            found |= {f"edits: {key}": result[key] for key in ("score", "happened", "kept")}
            continue
        report = score_suite(name, point.checkpoint, point.folder / name, cfg.tracking_uri)
        found |= {f"{name}: {key}": report[key] for key in SUITE_SCORES[name] if key in report}
    return found


def _first_of_each_tag(rows: list[dict], count: int) -> list[int]:
    tags: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        tags.setdefault(row["tag"], []).append(i)
    return [i for found in tags.values() for i in found[:count]]


@torch.no_grad()
def losses(model: UniImage, checkpoint: Path) -> dict[str, Any]:
    """Validation loss, as training computes it, and without each tap."""
    config = OmegaConf.create(read_checkpoint(checkpoint)[FACTS]["config"])
    data = instantiate(config.data)
    data.bind(model.prompt)
    plan = model.ladder.plan
    blocks = {layer: [b for b, tap in enumerate(plan.assignment) if tap == i] for i, layer in enumerate(plan.layers)}
    if plan.mixed:  # each block reads a mix of its own
        blocks = {block: [block] for block in range(plan.num_blocks)}
    sums = dict.fromkeys(["whole", *map(str, blocks)], 0.0)
    count = 0
    for batch in data.val_dataloader():
        batch = batch.to(model.device)
        latents = latents_of(model, batch)
        noise, sigma = noise_of(batch.keys, latents)
        path = interpolate(latents, noise, sigma)
        condition = model.encode_condition(batch.prompt)
        for name in sums:
            states = condition.states.clone()
            if name != "whole":
                states[blocks[int(name)]] = 0
            predicted = model.predict_velocity(path.noisy, sigma, replace(condition, states=states))
            sums[name] += velocity_loss(predicted, path.velocity).item() * len(batch)
        count += len(batch)
    means = {name: total / count for name, total in sums.items()}
    return {"loss": means.pop("whole"), "without": means}


def grid_pictures(point: Point) -> list[Image.Image]:
    """Its pictures of the fixed prompts."""
    return [Image.open(file).convert("RGB") for file in sorted((point.folder / "grid").glob("*.png"))]
