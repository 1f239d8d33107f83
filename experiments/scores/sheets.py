"""Scores of a model that is loaded, with its pictures on one sheet."""

from pathlib import Path
from typing import Any

from tbac.evaluation.benchmarks.base import PictureBenchmark
from tbac.evaluation.benchmarks.in_memory import score_in_memory
from tbac.sampling.grid import join_pictures


def score_with_sheet(pipeline: Any, benchmark: PictureBenchmark, judge: Any, folder: Path) -> dict[str, float]:
    """Score a benchmark, and write its pictures with their prompts to `<folder>/<benchmark>.png`."""
    scored = score_in_memory(pipeline, benchmark, judge)
    folder.mkdir(parents=True, exist_ok=True)
    captions = [row.prompt for row in scored.rows]
    sheet = join_pictures(scored.pictures, columns=16, scale=2, captions=captions, wrap=11)
    sheet.save(folder / f"{benchmark.name}.png")
    return dict(scored.summary.scores)
