"""Scores a checkpoint by a benchmark in steps: generate the tree of pictures, judge them, report."""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from PIL import Image
from tqdm import tqdm

from experiments.scores.benchmarks import make_benchmark
from experiments.scores.report import Evaluation, Report, write_report
from experiments.scores.results import (
    Results,
    check_asked,
    check_pictures,
    compute_picture_digest,
    describe_asked,
    read_drawn,
    read_results,
    write_results,
)
from tbac.app import check_members, compose_checked, make_part, open_model, read_opening_options, to_plain
from tbac.evaluation.benchmarks.answers import Answers
from tbac.evaluation.benchmarks.base import PictureBenchmark, make_picture_finder
from tbac.evaluation.benchmarks.rows import Drawn
from tbac.evaluation.judges.base import JudgeFacts, read_facts
from tbac.evaluation.judges.cache import Cache, CachedDetector, keep_replies
from tbac.evaluation.judges.detector import answer_by_detection
from tbac.evaluation.picture_tree import (
    Tree,
    TreeError,
    describe_changes,
    generate,
    list_pending,
    read_settings,
)
from tbac.evaluation.protocol import UNKNOWN
from tbac.files import ForeignFileError, read_json, reading, write_whole
from tbac.models.trained_digest import compute_trained_digest
from tbac.models.weights import compute_digest
from tbac.pictures import open_picture
from tbac.redaction import hide_secrets
from tbac.training.tracking import add_to_run, find_run_id, make_tag_name, open_parent_run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointScores:
    """A benchmark's title, and its scores of a checkpoint by name."""

    title: str
    scores: Mapping[str, float]


def run_benchmark(cfg: DictConfig, benchmark: PictureBenchmark | Answers) -> CheckpointScores:
    """Run the steps that a config of `evaluate.py` asks for; the scores are empty unless `report` is one of them."""
    out = Path(cfg.out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    if isinstance(benchmark, Answers):
        return CheckpointScores(benchmark.name, score_answers(cfg, benchmark, out))
    return CheckpointScores(benchmark.title, run_steps(cfg, benchmark, out))


def score_checkpoint(
    name: str, checkpoint: Path, out: Path, tracking_uri: str, overrides: Sequence[str] = ()
) -> CheckpointScores:
    """Run all steps of a benchmark on the CPU, with the options of its YAML, and overrides of `evaluate.py`."""
    chosen = [
        f"benchmark={name}",
        f"checkpoint={checkpoint}",
        f"out={out.absolute()}",
        "overwrite=true",
    ]
    fixed = [f"tracking_uri={tracking_uri}", "device=cpu", "rank=0", "world_size=1"]
    cfg = compose_checked("evaluate", [*chosen, *fixed, *overrides])
    return run_benchmark(cfg, make_benchmark(cfg))


def score_answers(cfg: DictConfig, benchmark: Answers, out: Path) -> Mapping[str, float]:
    """Ask the benchmark's questions, and write the share of right answers to `report.json`."""
    pipeline = open_model(cfg.checkpoint, **read_opening_options(cfg))
    scores = {"accuracy": benchmark.score(pipeline.model).accuracy}
    write_whole(out / "report.json", (json.dumps(scores, indent=2) + "\n").encode())
    log_scores(cfg, str(cfg.checkpoint), scores, [out / "report.json"])
    log.info("%s: %s", benchmark.name, json.dumps(scores))
    return scores


@dataclass(frozen=True)
class Contender:
    """A model that is evaluated: its checkpoint with its digest, and where its pictures and their scores lie."""

    checkpoint: str
    digest: str
    root: Path
    results: Path
    drawn: Path


def list_contenders(cfg: DictConfig, name: str, out: Path) -> list[Contender]:
    """List the model, and the one that it is held against."""
    folders = [(str(cfg.checkpoint), compute_trained_digest(cfg.checkpoint), out)]
    if cfg.get("against") is not None:
        # The message about a checkpoint doesn't say which option named it.
        try:
            digest = compute_trained_digest(cfg.against)
        except ValueError as error:
            raise ValueError(f"against={cfg.against}: {error}") from None
        folders.append((str(cfg.against), digest, out / "against"))
    return [
        Contender(checkpoint, digest, folder / name, folder / f"{name}.results.jsonl", folder / f"{name}.drawn.json")
        for checkpoint, digest, folder in folders
    ]


def run_steps(cfg: DictConfig, benchmark: PictureBenchmark, out: Path) -> Mapping[str, float]:
    """Run the steps that are asked for, in their order; returns the scores if one of them is `report`."""
    # Judge and checkpoints are looked at first, so that a wrong one is named before anything is drawn.
    judge = None
    if "score" in cfg.steps and benchmark.needs != "nothing":
        judge = make_judge(cfg, benchmark, out)
    contenders = list_contenders(cfg, benchmark.name, out)
    if "generate" in cfg.steps:
        for contender in contenders:
            draw_tree(cfg, benchmark, contender)
    if "score" in cfg.steps:
        for contender in contenders:
            score_tree(cfg, benchmark, contender, judge)
    return report_scores(cfg, benchmark, out, contenders) if "report" in cfg.steps else {}


def score_tree(cfg: DictConfig, benchmark: PictureBenchmark, contender: Contender, judge: Any) -> None:
    """Judge the pictures of a tree, and write a line for each, below one that says who judged."""
    # What the pictures are is known before they are judged, which may take hours.
    drawn = read_tree_facts(contender, benchmark)
    pictures = {target.path: compute_picture_digest(contender.root / target.path) for target in benchmark.targets}
    judged = benchmark.judge_pictures(make_picture_finder(contender.root), judge)
    rows = list(tqdm(judged, total=len(benchmark.targets), unit="picture", desc="judging"))
    # An endpoint has said by now which model it is.
    name = name_judge(cfg, judge)
    facts = read_facts(judge) if judge is not None else JudgeFacts(name)
    facts = replace(facts, name=name) if facts.name == UNKNOWN and not hasattr(judge, "describe_facts") else facts
    write_results(contender.results, Results(name, rows, facts, describe_asked(benchmark), drawn, pictures))


def make_judge(cfg: DictConfig, benchmark: PictureBenchmark, out: Path) -> Any:
    """Make the benchmark's judge; a slow one keeps its replies in `<benchmark>.judged.jsonl`, so that none is lost."""
    judge = make_part(cfg.judge, "judge")
    asks = benchmark.needs != "detector"
    if benchmark.needs == "questions":
        judge = answer_by_detection(judge)
    benchmark.check_judge(judge)
    if asks:
        check_members(judge, ("identity", "slow", "ask"), "judge")
    cache = Cache(out / f"{benchmark.name}.judged.jsonl")
    if asks:
        return benchmark.prepare_judge(keep_replies(judge, cache) if judge.slow else judge)
    return CachedDetector(judge, cache) if hasattr(judge, "identity") else judge


def name_judge(cfg: DictConfig, judge: Any) -> str:
    """Name the judge for the report."""
    return getattr(judge, "identity", cfg.judge._target_) if judge is not None else "nobody"


def draw_tree(cfg: DictConfig, benchmark: PictureBenchmark, contender: Contender) -> None:
    """Draw this process's share of a contender's pictures into its tree, and write how they are drawn beside it."""
    # What is missing of the tree, of this process's share.
    pipeline = open_model(contender.checkpoint, **read_opening_options(cfg))
    options = benchmark.build_sampling_options()
    root = contender.root
    tree = Tree(root, describe_pictures(cfg, benchmark, pipeline.model), cfg.overwrite)
    work = list_pending(tree, benchmark.targets, cfg.rank, cfg.world_size)
    benchmark.write_other_files(root)
    # How the pictures are drawn is written first, so that a drawing which is broken off has it too.
    drawn = Drawn(
        count_cut_prompts(benchmark, pipeline.model),
        {**options, "seed": benchmark.seed},
        contender.digest,
        tree.settings,
    )
    contender.drawn.parent.mkdir(parents=True, exist_ok=True)
    write_whole(contender.drawn, (json.dumps(asdict(drawn), indent=1) + "\n").encode())

    def draw(prompt: str, images: Sequence[Path], seeds: Sequence[int]) -> list[Image.Image]:
        return pipeline(
            prompt,
            image=[open_picture(path) for path in images] or None,
            num_images_per_prompt=len(seeds),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            **options,
        ).images

    total = sum(len(item.missing) for item in work)
    log.info("%d pictures to make in %s", total, root)
    for _ in tqdm(generate(tree, work, draw, benchmark.seed), total=total, unit="picture"):
        pass


def count_cut_prompts(benchmark: PictureBenchmark, model: Any) -> int:
    """Count the prompts that are longer than the model reads, which it therefore sees only the beginning of."""
    tokenizer, longest = model.prompt.tokenizer, model.prompt.max_text_tokens
    prompts = {target.item: target.prompt for target in benchmark.targets}
    lengths = [
        len(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
        for text in prompts.values()
    ]
    return sum(length > longest for length in lengths)


def read_tree_facts(contender: Contender, benchmark: PictureBenchmark) -> Drawn:
    """Read how a contender's pictures were drawn; what isn't there is unknown, as of pictures from elsewhere.

    Raises:
        ValueError: when there is no picture, when another checkpoint drew them, or when they don't belong together.
    """
    if not any((contender.root / target.path).is_file() for target in benchmark.targets):
        raise ValueError(
            f"{contender.root} holds no picture of {benchmark.title}; is out={contender.root.parent} the right folder? "
            "steps=[generate] draws them"
        )
    drawn = Drawn()
    try:
        if contender.drawn.is_file():
            drawn = read_drawn(read_json(contender.drawn, kind=dict))
    except ForeignFileError as error:
        log.warning("%s; how the pictures were drawn isn't known", error)
    check_drawn_by(contender, drawn)
    # What was written last of how they are drawn may have been another process's, or of a drawing that was broken off.
    settings = read_settings(contender.root, benchmark.targets)
    if settings is not None and drawn.settings not in (UNKNOWN, settings):
        changes = describe_changes(settings, drawn.settings)
        raise TreeError(
            f"the pictures in {contender.root} were made otherwise than {contender.drawn} says ({changes}); "
            "steps=[generate] draws them anew with overwrite=true"
        )
    return drawn if settings is not None else replace(drawn, checkpoint=UNKNOWN)


def check_drawn_by(contender: Contender, drawn: Drawn) -> None:
    """Raise ValueError when pictures are known to be another checkpoint's."""
    if drawn.checkpoint not in (UNKNOWN, contender.digest):
        raise ValueError(
            f"the pictures in {contender.root} were drawn by another checkpoint (digest {drawn.checkpoint[:12]}…) than "
            f"{contender.checkpoint} ({contender.digest[:12]}…); name that one, or another folder by out="
        )


def describe_pictures(cfg: DictConfig, benchmark: PictureBenchmark, model: Any) -> dict[str, Any]:
    """Describe all that the pictures depend on besides their prompts, so that a tree doesn't mix different ones.

    Pictures of one prompt that are drawn in one batch differ slightly from those drawn alone, so the largest number of
    samples of a prompt is part of it.
    """
    drawn_together = Counter(target.item for target in benchmark.targets for _ in target.samples)
    settings = benchmark.build_sampling_options() | {
        "seed": benchmark.seed,
        "trained": compute_digest(sorted(model.get_trained_state().items())),
        "frozen": model.provenance.digests,
        "dtype": cfg.dtype,
        "quantization": cfg.quantization,
        "drawn_together": max(drawn_together.values()),
    }
    additions = model.provenance.config.list_additions()
    if additions:
        settings["options"] = additions
    return settings


def report_scores(
    cfg: DictConfig, benchmark: PictureBenchmark, out: Path, contenders: Sequence[Contender]
) -> Mapping[str, float]:
    """Write the report of what was judged, and log its scores; returns them."""
    evaluations, judges = [], []
    for contender in contenders:
        results = read_results(contender.results, benchmark)
        # Scores are reported of those alone whose pictures were judged, and as they were judged.
        check_drawn_by(contender, results.drawn)
        check_asked(results, benchmark, contender.results)
        check_pictures(results, contender.root, contender.results)
        if all(row.state == "missing" for row in results.rows):
            raise ValueError(f"{contender.results} is of no picture at all; steps=[generate,score,report] draws them")
        failed = next((row for row in results.rows if row.state == "failed"), None)
        if failed is not None and all(row.state != "scored" for row in results.rows):
            raise ValueError(f"the judge judged no picture; the first failure, {failed.picture}: {failed.reason}")
        # What a benchmark finds in the details of a row is its own affair, so anything may be wrong with a damaged one.
        with reading(f"{contender.results}, which steps=[score] writes anew,"):
            summary = benchmark.summarize(results.rows, results.judge)
            protocol = benchmark.describe_protocol(results.rows, results.facts, results.drawn)
        protocol = replace(protocol, **results.asked)
        is_known = results.drawn.checkpoint == contender.digest
        evaluations.append(Evaluation(contender.checkpoint, results.rows, summary, protocol, contender.root, is_known))
        judges.append((results.judge, results.facts))
    if judges[0] != judges[-1]:
        raise ValueError(
            f"{contenders[0].checkpoint} was judged by {describe_judge(*judges[0])}, and {contenders[1].checkpoint} by "
            f"{describe_judge(*judges[1])}; steps=[score,report] judges both by one"
        )
    report = write_report(Report(benchmark, judges[0][0], *evaluations), out)
    files = [out / f"report.{kind}" for kind in ("json", "md", "html")]
    for evaluation in evaluations:
        # Pictures that anyone may have drawn say nothing about the run that made the checkpoint.
        drawn_by = evaluation.checkpoint if evaluation.is_known else None
        log_scores(cfg, drawn_by, evaluation.summary.scores, files)
    scores = evaluations[0].summary.scores
    log.info(
        "%s: %s %.3f; %d missing, %d failed; see %s",
        benchmark.name,
        *next(iter(scores.items())),
        len(report["missing"]),
        len(report["failed"]),
        out / "report.md",
    )
    return scores


def describe_judge(name: str, facts: JudgeFacts) -> str:
    """Describe a judge so far that two can be told apart."""
    return f"{name} ({', '.join(asdict(facts).values())})"


def log_scores(cfg: DictConfig, checkpoint: str | None, scores: Mapping[str, float], files: Sequence[Path]) -> None:
    """Log the scores and the report to the MLflow run that made the checkpoint, or to a new run if there is none."""
    name = cfg.benchmark.name
    run_id = find_run_id(Path(checkpoint)) if checkpoint is not None else None
    metrics = {f"{name}/{make_tag_name(key.replace(', ', '_'))}": value for key, value in scores.items()}
    if run_id is not None and add_to_run(cfg.tracking_uri, run_id, metrics, files=files):
        return
    with open_parent_run(cfg.tracking_uri, "tbac", f"evaluate {name}") as run:
        run.log_config(hide_secrets(to_plain(cfg)))
        run.log_metrics(metrics)
        for file in files:
            run.log_file(file)
