"""Score a model: python experiments/evaluate.py checkpoint=PATH benchmark=geneval|edits|answers

GenEval has three steps, each of which goes on where it stopped when `out` is the same folder: `generate` writes the
tree that GenEval's own scorer reads, on any number of processes (`torchrun`, `srun`); `score` judges what is there;
`report` writes `report.json` and `report.md`.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from PIL import Image
from tqdm import tqdm

from experiments.bench.measure import markdown
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
from tbac.evaluation.rules import aggregate_by_tag, judge_geneval
from tbac.evaluation.trees import (
    Target,
    Tree,
    generate,
    geneval_targets,
    pending,
    readable,
    write_geneval_metadata,
)
from tbac.models.weights import digest_of
from tbac.sampling.grid import picture_grid

log = logging.getLogger(__name__)
STEPS = ("generate", "score", "report")
SHOWN = 40  # pictures on a sheet
READERS = {"geneval": read_geneval, "edits": read_edits, "answers": read_questions}


def sampling_options(benchmark: DictConfig) -> SamplingOptions:
    """How a benchmark's config says that its pictures are made."""
    return SamplingOptions(**{str(k): v for k, v in benchmark.items() if k not in ("name", "file")})


def evaluate(pipeline: Any, detector: Any, benchmark: DictConfig, folder: Path | None = None) -> dict[str, Any]:
    """Run one benchmark; returns its scores and writes its pictures as one sheet."""
    if benchmark.name == "answers":
        result = run_answers(pipeline.model, benchmark.file)
        return {"accuracy": result["accuracy"], "answers": result["answers"]}
    if benchmark.name == "geneval":
        rows = read_geneval(benchmark.file)
        result = run_geneval(pipeline, rows, detector, sampling_options(benchmark))
        captions, scores = [row["prompt"] for row in rows], result["scores"]
    else:
        result = run_edits(pipeline, benchmark.file, detector, sampling_options(benchmark))
        captions = [row["instruction"] for row in result["rows"]]
        scores = {k: result[k] for k in ("score", "happened", "kept", "by_kind")}
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        picture_grid(result["images"], columns=16, scale=2, captions=captions, wrap=11).save(
            folder / f"{benchmark.name}.png"
        )
    return scores


def geneval(cfg: DictConfig, rows: list[dict], detector: Any, out: Path) -> dict[str, Any]:
    """The steps of GenEval; returns what `report.json` holds, or nothing before the last step."""
    unknown = set(cfg.steps) - set(STEPS)
    if unknown or not cfg.steps:
        raise ValueError(f"steps={list(cfg.steps)} must be some of {', '.join(STEPS)}")
    if not (cfg.samples >= 1 and 0 <= cfg.rank < cfg.world_size):
        raise ValueError(f"samples={cfg.samples} and rank={cfg.rank} of world_size={cfg.world_size} don't go together")
    if cfg.world_size > 1 and list(cfg.steps) != ["generate"]:
        raise ValueError("several processes take steps=[generate]; score and report are for one, when all are done")
    root, targets = out / "geneval", geneval_targets(rows, cfg.samples)
    if "generate" in cfg.steps:
        draw_tree(cfg, rows, targets, root)
    results = out / "geneval.results.jsonl"
    if "score" in cfg.steps:
        judged = judge_tree(rows, targets, root, detector, cfg.samples)
        results.write_text("".join(f"{json.dumps(row)}\n" for row in judged))
    if "report" not in cfg.steps:
        return {}
    if not results.is_file():
        raise ValueError(f"{results} doesn't exist; steps=[score] writes it")
    return geneval_report(cfg, [json.loads(line) for line in results.read_text().splitlines()], root, out)


def draw_tree(cfg: DictConfig, rows: list[dict], targets: Sequence[Target], root: Path) -> None:
    """Make this process's share of the tree."""
    pipeline = open_model(cfg.checkpoint, cfg.device, cfg.dtype, cfg.quantization)
    model, options = pipeline.model, {k: cfg.benchmark[k] for k in ("num_inference_steps", "guidance_scale", "seed")}
    made_by = {
        "trained": digest_of(sorted(model.trained_state().items())),
        "frozen": model.provenance.digests,
        "dtype": cfg.dtype,
        "quantization": cfg.quantization,
    }
    tree = Tree(root, options | made_by | {"drawn_together": cfg.samples}, cfg.overwrite)
    work = pending(tree, targets, cfg.rank, cfg.world_size)
    write_geneval_metadata(rows, root)

    def draw(prompt: str, images: Sequence[Path], seeds: Sequence[int]) -> list[Image.Image]:
        return pipeline(
            prompt,
            num_inference_steps=options["num_inference_steps"],
            guidance_scale=options["guidance_scale"],
            num_images_per_prompt=len(seeds),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        ).images

    total = sum(len(item.missing) for item in work)
    log.info("%d pictures to make in %s", total, root)
    for _ in tqdm(generate(tree, work, draw, options["seed"]), total=total, unit="picture"):
        pass


def judge_tree(
    rows: list[dict], targets: Sequence[Target], root: Path, detector: Any, samples: int
) -> Iterator[dict[str, Any]]:
    """A verdict on each picture; one that is absent or can't be read is wrong, and said to be missing."""
    for number, target in enumerate(targets):
        row = rows[number // samples]
        found = {"picture": target.path, "tag": row["tag"], "prompt": row["prompt"]}
        if not readable(root / target.path):
            yield {**found, "correct": False, "missing": True, "reason": "the picture is missing"}
            continue
        verdict = judge_geneval(detector(Image.open(root / target.path)).detections, row)
        yield {**found, "correct": verdict.correct, "missing": False, "reason": verdict.reason}


def geneval_report(cfg: DictConfig, results: list[dict[str, Any]], root: Path, out: Path) -> dict[str, Any]:
    """Scores with what they are comparable with, as JSON, as Markdown, and as sheets of right and wrong pictures."""
    scores = aggregate_by_tag([(row["tag"], row["correct"]) for row in results])
    missing = [row["picture"] for row in results if row["missing"]]
    protocol = (
        f"GenEval's rules; {len(results) // cfg.samples} prompts of {cfg.benchmark.file}, {cfg.samples} each; judge "
        f"{cfg.judge._target_}"
    )
    report = {**scores, "pictures": len(results), "missing": missing, "protocol": protocol, "comparable": False}
    lines = ["# GenEval", markdown([*scores], [[f"{v:.3f}" for v in scores.values()]])]
    lines.append(
        f"{protocol}. Not comparable with published numbers (TBAC-UniImage-3B: 0.87), which are of 553 prompts, 4 "
        "pictures each, judged by Mask2Former and CLIP."
    )
    if missing:
        lines.append(f"{len(missing)} of {len(results)} pictures are missing and count as wrong: {', '.join(missing)}")
    for title, right in (("right", True), ("wrong", False)):
        shown = [row for row in results if row["correct"] is right and not row["missing"]][:SHOWN]
        if shown:
            captions = [row["prompt"] if right else f"{row['prompt']}: {row['reason']}" for row in shown]
            images = [Image.open(root / row["picture"]).convert("RGB") for row in shown]
            scale = max(1, 96 // images[0].width)
            picture_grid(images, columns=10, scale=scale, captions=captions, wrap=15).save(out / f"{title}.png")
            lines.append(f"## Some of those that are {title}\n\n![{title}]({title}.png)")
    (out / "report.md").write_text("\n\n".join(lines) + "\n")
    return report


@hydra.main(version_base="1.3", config_path=CONF, config_name="evaluate")
@user_errors
def main(cfg: DictConfig) -> None:
    if cfg.benchmark.name not in READERS:
        raise ValueError(f"benchmark.name must be one of {', '.join(READERS)}; got {cfg.benchmark.name!r}")
    rows = READERS[cfg.benchmark.name](cfg.benchmark.file)
    detector = instantiate(cfg.judge)
    if cfg.benchmark.name == "geneval":
        out = Path(cfg.out).absolute()
        out.mkdir(parents=True, exist_ok=True)
        report = geneval(cfg, rows, detector, out)
        if report:
            (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
            log.info("geneval: overall %.3f; see %s", report["overall"], out / "report.md")
        return
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
