"""Score a model: python experiments/evaluate.py checkpoint=PATH benchmark=geneval|edits|answers"""

import json
import logging
from pathlib import Path
from typing import Any

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig

from experiments.common import CONF, open_model, output_dir, user_errors
from tbac.evaluation.benchmarks import (
    SamplingOptions,
    read_edits,
    read_geneval,
    read_questions,
    run_answers,
    run_edits,
    run_geneval,
)
from tbac.sampling.grid import picture_grid

log = logging.getLogger(__name__)
READERS = {"geneval": read_geneval, "edits": read_edits, "answers": read_questions}


def evaluate(pipeline: Any, detector: Any, benchmark: DictConfig, folder: Path | None = None) -> dict[str, Any]:
    """Run one benchmark; returns its scores and writes its pictures as one sheet."""
    options = SamplingOptions(**{str(k): v for k, v in benchmark.items() if k not in ("name", "file")})
    if benchmark.name == "answers":
        result = run_answers(pipeline.model, benchmark.file)
        return {"accuracy": result["accuracy"], "answers": result["answers"]}
    if benchmark.name == "geneval":
        rows = read_geneval(benchmark.file)
        result = run_geneval(pipeline, rows, detector, options)
        captions, scores = [row["prompt"] for row in rows], result["scores"]
    else:
        result = run_edits(pipeline, benchmark.file, detector, options)
        captions = [row["instruction"] for row in result["rows"]]
        scores = {k: result[k] for k in ("score", "happened", "kept", "by_kind")}
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        picture_grid(result["images"], columns=16, scale=2, captions=captions, wrap=11).save(
            folder / f"{benchmark.name}.png"
        )
    return scores


@hydra.main(version_base="1.3", config_path=CONF, config_name="evaluate")
@user_errors
def main(cfg: DictConfig) -> None:
    if cfg.benchmark.name not in READERS:
        raise ValueError(f"benchmark.name must be one of {', '.join(READERS)}; got {cfg.benchmark.name!r}")
    READERS[cfg.benchmark.name](cfg.benchmark.file)
    detector = instantiate(cfg.judge)
    scores = evaluate(
        open_model(cfg.checkpoint, cfg.device, cfg.dtype, cfg.quantization),
        detector,
        cfg.benchmark,
        output_dir() / "samples",
    )
    scores.pop("answers", None)
    (output_dir() / "report.json").write_text(json.dumps(scores, indent=2) + "\n")
    log.info("%s: %s", cfg.benchmark.name, json.dumps(scores))


if __name__ == "__main__":
    main()
