"""Scores a loaded model with a benchmark, without writing a tree of pictures, as the demo and sweeps do."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from PIL import Image

from tbac.evaluation.benchmarks.base import PictureBenchmark
from tbac.evaluation.benchmarks.rows import Row, Summary
from tbac.evaluation.picture_tree import Target, derive_seed, join_grid
from tbac.pictures import open_picture


@dataclass(frozen=True)
class Scored:
    """A benchmark's pictures and scores.

    Attributes:
        pictures: in the order of the benchmark's targets.
        rows: score of each picture.
        summary: scores of all of them.
    """

    pictures: Sequence[Image.Image]
    rows: Sequence[Row]
    summary: Summary


def score_in_memory(pipeline: Any, benchmark: PictureBenchmark, judge: Any) -> Scored:
    """Draw every picture of a benchmark and judge it.

    Args:
        pipeline: a `UniImagePipeline`.
        benchmark: lists what is drawn, and judges it.
        judge: of the kind that the benchmark needs.
    """
    judge = benchmark.prepare_judge(judge)
    targets = benchmark.targets
    pictures = draw_in_memory(pipeline, benchmark, targets)
    drawn = {target.path: picture for target, picture in zip(targets, pictures, strict=True)}
    rows = list(benchmark.judge_pictures(lambda target: drawn[target.path], judge))
    return Scored(pictures, rows, benchmark.summarize(rows, getattr(judge, "identity", type(judge).__name__)))


def draw_in_memory(pipeline: Any, benchmark: PictureBenchmark, targets: Sequence[Target]) -> list[Image.Image]:
    """Draw the pictures of targets, in batches of the benchmark's `batch_size`.

    A sample has the same noise as in a tree of pictures; only the other samples of its batch may differ.
    """
    samples = [(target, sample) for target in targets for sample in target.samples]
    drawn: list[Image.Image] = []
    for start in range(0, len(samples), benchmark.batch_size):
        batch = samples[start : start + benchmark.batch_size]
        seeds = [derive_seed(benchmark.seed, target.prompt, sample) for target, sample in batch]
        inputs = [list(map(open_picture, target.images)) for target, _ in batch]
        drawn += pipeline(
            [target.prompt for target, _ in batch],
            image=inputs if any(inputs) else None,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            **benchmark.build_sampling_options(),
        ).images
    # A target of several samples is one picture, a grid of them.
    remaining = iter(drawn)
    return [join_grid(list(islice(remaining, len(target.samples)))) for target in targets]
