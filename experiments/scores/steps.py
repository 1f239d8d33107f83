"""Scores a checkpoint by a benchmark in steps: generate the tree of pictures, judge them, report."""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from PIL import Image
from tqdm import tqdm

from experiments.scores.benchmarks import make_benchmark
from experiments.scores.report import Evaluation, Report, write_report
from tbac.app import check_members, compose_checked, make_part, open_model, read_opening_options, to_plain
from tbac.evaluation.benchmarks.answers import Answers
from tbac.evaluation.benchmarks.base import PictureBenchmark, make_picture_finder
from tbac.evaluation.benchmarks.rows import STATES, Drawn, Row, check_score
from tbac.evaluation.judges.base import JudgeFacts, read_facts
from tbac.evaluation.judges.cache import Cache, CachedDetector, keep_replies
from tbac.evaluation.judges.detector import answer_by_detection
from tbac.evaluation.picture_tree import Tree, generate, list_pending
from tbac.evaluation.protocol import UNKNOWN
from tbac.files import ForeignFileError, parse_json, read_json, read_text, reading, shorten, write_whole
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
    """A model that is evaluated: its checkpoint, and where its pictures and their scores lie."""

    checkpoint: str
    root: Path
    results: Path
    drawn: Path


def list_contenders(cfg: DictConfig, name: str, out: Path) -> list[Contender]:
    """List the model, and the one that it is held against."""
    folders = [(cfg.checkpoint, out)]
    if cfg.get("against") is not None:
        folders.append((cfg.against, out / "against"))
    return [
        Contender(str(checkpoint), folder / name, folder / f"{name}.results.jsonl", folder / f"{name}.drawn.json")
        for checkpoint, folder in folders
    ]


def run_steps(cfg: DictConfig, benchmark: PictureBenchmark, out: Path) -> Mapping[str, float]:
    """Run the steps that are asked for, in their order; returns the scores if one of them is `report`."""
    contenders = list_contenders(cfg, benchmark.name, out)
    # The judge is made first, so that a wrong one is named before anything is drawn.
    judge = None
    if "score" in cfg.steps and benchmark.needs != "nothing":
        judge = make_judge(cfg, benchmark, out)
    if "generate" in cfg.steps:
        for contender in contenders:
            draw_tree(cfg, benchmark, contender)
    if "score" in cfg.steps:
        for contender in contenders:
            score_tree(cfg, benchmark, contender, judge)
    return report_scores(cfg, benchmark, out, contenders) if "report" in cfg.steps else {}


def score_tree(cfg: DictConfig, benchmark: PictureBenchmark, contender: Contender, judge: Any) -> None:
    """Judge the pictures of a tree, and write a line for each, below one that says who judged."""
    judged = benchmark.judge_pictures(make_picture_finder(contender.root), judge)
    rows = list(tqdm(judged, total=len(benchmark.targets), unit="picture", desc="judging"))
    name = name_judge(cfg, judge)
    facts = read_facts(judge) if judge is not None else JudgeFacts(name)
    facts = replace(facts, name=name) if facts.name == UNKNOWN and not hasattr(judge, "describe_facts") else facts
    lines = [json.dumps({"judge": name, "facts": asdict(facts)}), *(json.dumps(asdict(row)) for row in rows)]
    write_whole(contender.results, ("\n".join(lines) + "\n").encode())


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
    pipeline = open_model(contender.checkpoint, **read_opening_options(cfg))
    options = benchmark.build_sampling_options()
    root = contender.root
    tree = Tree(root, describe_pictures(cfg, benchmark, pipeline.model), cfg.overwrite)
    work = list_pending(tree, benchmark.targets, cfg.rank, cfg.world_size)
    benchmark.write_other_files(root)
    drawn = {"cut": count_cut_prompts(benchmark, pipeline.model), "sampling": {**options, "seed": benchmark.seed}}
    contender.drawn.parent.mkdir(parents=True, exist_ok=True)
    write_whole(contender.drawn, (json.dumps(drawn, indent=1) + "\n").encode())

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


def read_drawn(file: Path) -> Drawn:
    """Read how a tree was drawn; what isn't there is unknown, as of pictures from elsewhere."""
    try:
        values = read_json(file, kind=dict) if file.is_file() else {}
    except ForeignFileError as error:
        log.warning("%s; how the pictures were drawn isn't known", error)
        values = {}
    cut, sampling = values.get("cut"), values.get("sampling")
    return Drawn(cut if type(cut) is int else UNKNOWN, sampling if isinstance(sampling, dict) else UNKNOWN)


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
        # What a benchmark finds in the details of a row is its own affair, so anything may be wrong with a damaged one.
        with reading(f"{contender.results}, which steps=[score] writes anew,"):
            summary = benchmark.summarize(results.rows, results.judge)
            protocol = benchmark.describe_protocol(results.rows, results.facts, read_drawn(contender.drawn))
        evaluations.append(Evaluation(contender.checkpoint, results.rows, summary, protocol, contender.root))
        judges.append(results.judge)
    report = write_report(Report(benchmark, judges[0], *evaluations), out)
    files = [out / f"report.{kind}" for kind in ("json", "md", "html")]
    for evaluation in evaluations:
        log_scores(cfg, evaluation.checkpoint, evaluation.summary.scores, files)
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


class Results(NamedTuple):
    """What `steps=[score]` has found: the judge's name, a row for each picture, and who the judge was."""

    judge: str
    rows: list[Row]
    facts: JudgeFacts


def read_results(file: Path, benchmark: PictureBenchmark) -> Results:
    """Read what `steps=[score]` has written.

    Raises:
        ValueError: when there is no such file, or it isn't of this benchmark, or is damaged.
    """
    if not file.is_file():
        raise ValueError(f"{file} doesn't exist; steps=[score] writes it")
    first, *lines = [line for line in read_text(file).split("\n") if line] or [""]
    named = parse_json(first, f"{file}:1", dict)
    if not isinstance(named.get("judge"), str):
        raise ValueError(f"{file}:1 must name the judge, got {shorten(named)}; steps=[score] writes it anew")
    # Results that an earlier version has written don't say who judged.
    facts = named.get("facts")
    is_whole = isinstance(facts, dict) and all(isinstance(facts.get(part.name), str) for part in fields(JudgeFacts))
    known = JudgeFacts(**{part.name: facts[part.name] for part in fields(JudgeFacts)}) if is_whole else JudgeFacts()
    targets = {target.path: target for target in benchmark.targets}
    rows = []
    for number, line in enumerate(lines, start=2):
        row = read_row(parse_json(line, f"{file}:{number}", dict), f"{file}:{number}")
        target = targets.pop(row.picture, None)
        if target is None or row.prompt != target.prompt:
            raise ValueError(
                f"{file}:{number}: {shorten(row.picture)!r} isn't a picture of this benchmark, or stands there twice; "
                "steps=[score] writes the file anew"
            )
        rows.append(row)
    if targets:
        some = next(iter(targets))
        raise ValueError(f"{file} has no row for {len(targets)} pictures, such as {some}; steps=[score] writes it anew")
    return Results(named["judge"], rows, known)


def read_row(values: Mapping[str, Any], place: str) -> Row:
    """Read the row of one picture.

    Args:
        values: what stands in the file.
        place: file and line, for messages.

    Raises:
        ValueError: for other fields, other types, an unknown state, or a score that isn't in [0, 1].
    """
    texts = ("picture", "group", "prompt", "state", "reason")
    if set(values) != {*texts, "score", "details"}:
        raise ValueError(f"{place} must have the fields of a scored picture, got {shorten(sorted(values))}")
    for name in texts:
        if not isinstance(values[name], str):
            raise ValueError(f"{place} needs {name!r} as str, got {shorten(values[name])}")
    if values["state"] not in STATES:
        raise ValueError(f"{place}: state must be one of {', '.join(STATES)}, got {shorten(values['state'])!r}")
    if not isinstance(values["details"], dict):
        raise ValueError(f"{place} needs 'details' as dict, got {shorten(values['details'])}")
    try:
        check_score(values["score"])
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    if values["score"] is not None and values["state"] != "scored":
        raise ValueError(f"{place}: a picture whose state is {values['state']!r} has no score, got {values['score']}")
    return Row(**values)


def log_scores(cfg: DictConfig, checkpoint: str, scores: Mapping[str, float], files: Sequence[Path]) -> None:
    """Log the scores and the report to the MLflow run that made the checkpoint, or to a new run if there is none."""
    name, run_id = cfg.benchmark.name, find_run_id(Path(checkpoint))
    metrics = {f"{name}/{make_tag_name(key.replace(', ', '_'))}": value for key, value in scores.items()}
    if run_id is not None and add_to_run(cfg.tracking_uri, run_id, metrics, files=files):
        return
    with open_parent_run(cfg.tracking_uri, "tbac", f"evaluate {name}") as run:
        run.log_config(hide_secrets(to_plain(cfg)))
        run.log_metrics(metrics)
        for file in files:
            run.log_file(file)
