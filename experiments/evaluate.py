"""Score a model: python experiments/evaluate.py checkpoint=PATH benchmark=NAME

NAME is geneval, dpg, tiif, tiif_mini, imgedit, wise or folder. Each has three steps, which go on where they stopped
when `out` is the same folder: `generate` writes the tree that the benchmark's own scorer reads, on any number of
processes (`torchrun`, `srun`); `score` judges what is there; `report` writes `report.json`, `report.md` and
`report.html`, and logs the scores to the checkpoint's MLflow run. `edits` and `answers` are small ones with files of
their own, without steps.
"""

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra import compose
from hydra.utils import instantiate
from omegaconf import DictConfig
from PIL import Image
from tqdm import tqdm

from experiments.scores.report import write_report
from tbac.app import CONF, open_model, output_dir, plain, user_errors
from tbac.evaluation.benchmarks.answers import read_questions, run_answers
from tbac.evaluation.benchmarks.base import Benchmark, Row, SamplingOptions, Summary, opened
from tbac.evaluation.benchmarks.edits import read_edits, run_edits
from tbac.evaluation.benchmarks.geneval import GenEval, read_geneval, run_geneval
from tbac.evaluation.benchmarks.registry import SUITES
from tbac.evaluation.detectors.template import TemplateDetector
from tbac.evaluation.judges.cache import Kept, KeptDetector, KeptJudge
from tbac.evaluation.judges.detector import DetectorJudge
from tbac.evaluation.picture_tree import Tree, generate, pending
from tbac.files import write_whole
from tbac.models.weights import digest_of
from tbac.sampling.grid import picture_grid
from tbac.training.tracking import parent_run, tag_name

log = logging.getLogger(__name__)
STEPS = ("generate", "score", "report")
READERS = {"edits": read_edits, "answers": read_questions}


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


def check(cfg: DictConfig) -> None:
    """Raise ValueError for steps and processes that don't go together."""
    unknown = set(cfg.steps) - set(STEPS)
    if unknown or not cfg.steps:
        raise ValueError(f"steps={list(cfg.steps)} must be some of {', '.join(STEPS)}")
    if not (cfg.samples >= 1 and 0 <= cfg.rank < cfg.world_size):
        raise ValueError(f"samples={cfg.samples} and rank={cfg.rank} of world_size={cfg.world_size} don't go together")
    if cfg.world_size > 1 and list(cfg.steps) != ["generate"]:
        raise ValueError("several processes take steps=[generate]; score and report are for one, when all are done")


def run_steps(cfg: DictConfig, suite: Benchmark, out: Path) -> None:
    """The steps that are asked for, in their order."""
    root, results = out / cfg.benchmark.name, out / f"{cfg.benchmark.name}.results.jsonl"
    judge = judge_for(suite, cfg, out) if "score" in cfg.steps and suite.judged else None
    if "generate" in cfg.steps:
        draw_tree(cfg, suite, root)
    if "score" in cfg.steps:
        rows = list(tqdm(suite.rows(root, judge), total=len(suite.targets()), unit="picture", desc="judging"))
        named = {"judge": judge_name(cfg, judge)}
        lines = [json.dumps(named), *(json.dumps(asdict(row)) for row in rows)]
        write_whole(results, ("\n".join(lines) + "\n").encode())
    if "report" in cfg.steps:
        if not results.is_file():
            raise ValueError(f"{results} doesn't exist; steps=[score] writes it")
        named, *found = (json.loads(line) for line in results.read_text().splitlines())
        rows, name = [Row(**row) for row in found], cfg.benchmark.name
        summary = suite.summary(rows, named["judge"])
        report = write_report(name, suite.title, summary, rows, root, out, str(cfg.checkpoint), named["judge"])
        log_scores(cfg, summary, [out / f"report.{kind}" for kind in ("json", "md", "html")])
        first = next(iter(summary.scores.items()))
        log.info(
            "%s: %s %.3f; %d missing, %d failed; see %s",
            name,
            *first,
            len(report["missing"]),
            len(report["failed"]),
            out / "report.md",
        )


def score_suite(name: str, checkpoint: Path, out: Path, tracking_uri: str) -> dict[str, Any]:
    """All steps of a benchmark with its default options, on the CPU; returns what its `report.json` holds."""
    out.mkdir(parents=True, exist_ok=True)
    chosen = [f"benchmark={name}", f"checkpoint='{checkpoint}'", f"out='{out.absolute()}'", "overwrite=true"]
    cfg = compose("evaluate", [*chosen, f"tracking_uri='{tracking_uri}'", "device=cpu", "rank=0", "world_size=1"])
    run_steps(cfg, SUITES[name](cfg.benchmark, cfg.samples), out)
    return json.loads((out / "report.json").read_text())


def judge_for(suite: Benchmark, cfg: DictConfig, out: Path) -> Any:
    """The judge of this benchmark; what is slow keeps what it found in `<benchmark>.judged.jsonl`."""
    judge = instantiate(cfg.judge)
    if isinstance(judge, TemplateDetector) and not isinstance(suite, GenEval):
        judge = DetectorJudge(judge, judge.glyph_names, judge.color_names)
    suite.check_judge(judge)
    kept = Kept(out / f"{cfg.benchmark.name}.judged.jsonl")
    if hasattr(judge, "ask"):
        return KeptJudge(judge, kept) if judge.slow else judge
    return KeptDetector(judge, kept) if hasattr(judge, "identity") else judge


def judge_name(cfg: DictConfig, judge: Any) -> str:
    """Who judged."""
    return getattr(judge, "identity", cfg.judge._target_) if judge is not None else "nobody"


def draw_tree(cfg: DictConfig, suite: Benchmark, root: Path) -> None:
    """Make this process's share of the tree."""
    pipeline = open_model(cfg.checkpoint, cfg.device, cfg.dtype, cfg.quantization)
    model = pipeline.model
    names = ("num_inference_steps", "guidance_scale", "image_guidance_scale", "seed")
    options = {name: cfg.benchmark[name] for name in names if name in cfg.benchmark}
    made_by = {
        "trained": digest_of(sorted(model.trained_state().items())),
        "frozen": model.provenance.digests,
        "dtype": cfg.dtype,
        "quantization": cfg.quantization,
    }
    if any(model.options().values()):
        made_by["options"] = model.options()
    targets = suite.targets()
    together = max(Counter(target.item for target in targets for _ in target.samples).values())
    tree = Tree(root, options | made_by | {"drawn_together": together}, cfg.overwrite)
    work = pending(tree, targets, cfg.rank, cfg.world_size)
    suite.write_beside(root)
    seed = options.pop("seed")

    def draw(prompt: str, images: Sequence[Path], seeds: Sequence[int]) -> list[Image.Image]:
        return pipeline(
            prompt,
            image=[opened(path) for path in images] or None,
            num_images_per_prompt=len(seeds),
            generator=[torch.Generator().manual_seed(one) for one in seeds],
            **options,
        ).images

    total = sum(len(item.missing) for item in work)
    log.info("%d pictures to make in %s", total, root)
    for _ in tqdm(generate(tree, work, draw, seed), total=total, unit="picture"):
        pass


def log_scores(cfg: DictConfig, summary: Summary, files: Sequence[Path]) -> None:
    """Add the scores and the report to the run that made the checkpoint, or to a run of their own."""
    name = cfg.benchmark.name
    folder = Path(cfg.checkpoint).expanduser().absolute()
    noted = [place / "mlflow_run_id" for place in (folder, *folder.parents[:2])]
    run_id_file = next((str(file) for file in noted if file.is_file()), None)
    with parent_run(cfg.tracking_uri, "tbac", f"evaluate {name}", run_id_file) as run:
        if run_id_file is None:
            run.log_config(plain(cfg))
        run.log_metrics({f"{name}/{tag_name(k.replace(', ', '_'))}": v for k, v in summary.scores.items()})
        for file in files:
            run.log_file(file)


@hydra.main(version_base="1.3", config_path=CONF, config_name="evaluate")
@user_errors
def main(cfg: DictConfig) -> None:
    name = cfg.benchmark.name
    if name in SUITES:
        check(cfg)
        suite = SUITES[name](cfg.benchmark, cfg.samples)
        out = Path(cfg.out).absolute()
        out.mkdir(parents=True, exist_ok=True)
        run_steps(cfg, suite, out)
        return
    if name not in READERS:
        raise ValueError(f"benchmark.name must be one of {', '.join([*SUITES, *READERS])}; got {name!r}")
    READERS[name](cfg.benchmark.file)  # before a model is loaded
    scores = evaluate(
        open_model(cfg.checkpoint, cfg.device, cfg.dtype, cfg.quantization),
        instantiate(cfg.judge),
        cfg.benchmark,
        output_dir() / "samples",
    )
    scores.pop("answers", None)
    (output_dir() / "report.json").write_text(json.dumps(scores, indent=2) + "\n")
    log.info("%s: %s", name, json.dumps(scores))


if __name__ == "__main__":
    main()
