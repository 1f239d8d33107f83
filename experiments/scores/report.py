"""A benchmark's report: JSON, Markdown with sheets of pictures, and a page of HTML."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from textwrap import shorten
from typing import Any

from experiments.reports import format_table
from experiments.scores.page import Card, Page, ShownPicture, render_page
from tbac.evaluation.benchmarks.base import ABSENT, PictureBenchmark, list_extra_pictures
from tbac.evaluation.benchmarks.published import PUBLISHED, REWRITTEN
from tbac.evaluation.benchmarks.rows import Row, Summary
from tbac.evaluation.intervals import Interval, compute_differences, compute_intervals
from tbac.evaluation.protocol import UNKNOWN, Protocol, describe, is_comparable, is_followed, list_differences
from tbac.files import write_whole
from tbac.pictures import open_picture
from tbac.sampling.grid import join_pictures

SHOWN = 40  # prompts on a sheet
MOST_PICTURES = 240  # on the page
WIDTH = 96  # least pixels of a picture on a sheet
PROMPT, REASON = 100, 80  # characters of a caption on a sheet


@dataclass(frozen=True)
class Evaluation:
    """A model's pictures and what became of them.

    Attributes:
        checkpoint: that was scored.
        rows: one for every picture.
        summary: the scores and how they were computed.
        protocol: how they were reached.
        root: the tree of pictures.
        is_known: whether it is known that this checkpoint drew them.
    """

    checkpoint: str
    rows: Sequence[Row]
    summary: Summary
    protocol: Protocol
    root: Path
    is_known: bool = True


@dataclass(frozen=True)
class Prompt:
    """A prompt and its pictures.

    Attributes:
        text: in full.
        group: that it counts for.
        rows: of its pictures.
        score: mean over those that were scored; None without any.
        rank: `best` above the mean of all prompts, `worst` below it, or "".
    """

    text: str
    group: str
    rows: Sequence[Row]
    score: float | None
    rank: str


def list_prompts(benchmark: PictureBenchmark, rows: Sequence[Row]) -> list[Prompt]:
    """List the prompts of a benchmark with their pictures, in its order."""
    item_of = {target.path: target.item for target in benchmark.targets}
    rows_of: dict[str, list[Row]] = {}
    for row in rows:
        rows_of.setdefault(item_of[row.picture], []).append(row)
    scores: dict[str, float] = {}
    for item, of_item in rows_of.items():
        known = [row.score for row in of_item if row.score is not None]
        if known:
            scores[item] = mean(known)
    # A prompt is among the best or the worst, never both; where all are alike there is neither.
    middle = mean(scores.values()) if scores else 0.0
    prompts = []
    for item, of_item in rows_of.items():
        score = scores.get(item)
        distance = 0.0 if score is None else score - middle
        rank = "" if abs(distance) < 1e-9 else ("best" if distance > 0 else "worst")
        prompts.append(Prompt(of_item[0].prompt, of_item[0].group, of_item, score, rank))
    return prompts


def select_prompts(prompts: Sequence[Prompt], most: int) -> list[Prompt]:
    """Select at most so many prompts: of each group as many of the best as of the worst; the worst come first."""
    ordered = sorted(prompts, key=lambda prompt: -1.0 if prompt.score is None else prompt.score)
    if len(ordered) <= most:
        return ordered
    groups = list(dict.fromkeys(prompt.group for prompt in prompts))
    half = max(1, most // len(groups) // 2)
    chosen = []
    for group in groups:
        of_group = [prompt for prompt in ordered if prompt.group == group]
        chosen += of_group if len(of_group) <= 2 * half else of_group[:half] + of_group[-half:]
    return sorted(chosen[:most], key=ordered.index)


def format_score(value: float, digits: int, interval: Interval | None = None, sign: bool = False) -> str:
    """Format a score or a difference with its 95 % interval."""
    plus = "+" if sign else ""
    text = f"{value:{plus}.{digits}f}"
    return text if interval is None else f"{text} [{interval[0]:{plus}.{digits}f}, {interval[1]:{plus}.{digits}f}]"


@dataclass(frozen=True)
class Report:
    """Everything that the files of a report say.

    Attributes:
        benchmark: what was evaluated.
        judge: name of the judge.
        main: the model.
        other: a second model, drawn from the same noise; None without one.
    """

    benchmark: PictureBenchmark
    judge: str
    main: Evaluation
    other: Evaluation | None = None

    @property
    def published(self) -> Protocol | None:
        """How the published scores were reached."""
        return self.benchmark.get_published()

    @property
    def is_comparable(self) -> bool:
        """Whether the scores may stand beside published ones; the protocols alone decide it."""
        return is_comparable(self.main.protocol, self.published)

    def list_differences(self) -> list[str]:
        """List in what the scores were reached otherwise than published ones."""
        if self.published is None:
            return ["there are no published scores of this benchmark"]
        return [str(difference) for difference in list_differences(self.main.protocol, self.published)]

    def give_verdict(self) -> str:
        """Say whether the scores may stand beside published ones, and if not why."""
        if self.is_comparable:
            return "Comparable with published numbers."
        return f"Not comparable with published numbers: {'; '.join(self.list_differences())}."


def build_score_table(report: Report, intervals: Mapping, differences: Mapping) -> tuple[list[str], list[list[str]]]:
    """Build columns and rows of the scores: ours, the other model's, their difference, and published ones if they fit.

    Args:
        report: what is reported.
        intervals: score -> its interval.
        differences: score -> interval of the difference of both models.
    """
    scores = report.main.summary.scores
    digits = 3 if max(scores.values()) <= 5 else 2
    columns: dict[str, list[str]] = {"": list(scores), "this model": format_scores(scores, scores, intervals, digits)}
    if report.other is not None:
        others = report.other.summary.scores
        bounds = compute_intervals(report.benchmark, report.other.rows)
        columns["against"] = format_scores(scores, others, bounds, digits)
        minus = {name: value - others[name] for name, value in scores.items() if name in others}
        columns["this model minus the other"] = format_scores(scores, minus, differences, digits, sign=True)
    # Published scores only where they were reached in the same way.
    published = PUBLISHED.get(report.benchmark.name, {}) if report.is_comparable else {}
    for model, values in published.items():
        columns[f"{model}, published"] = format_scores(scores, values, {}, 2)
    return list(columns), [list(row) for row in zip(*columns.values(), strict=True)]


def format_scores(names: Iterable[str], values: Mapping, bounds: Mapping, digits: int, sign: bool = False) -> list[str]:
    """Format a column of scores with their intervals; empty where there is none."""
    return [format_score(values[k], digits, bounds.get(k), sign) if k in values else "" for k in names]


def list_protocol_rows(report: Report) -> list[tuple[str, str, str, bool]]:
    """List every field of the protocol: its name, our value, the published one, and whether they agree."""
    ours = report.main.protocol.to_dict()
    theirs = report.published.to_dict() if report.published is not None else dict.fromkeys(ours, UNKNOWN)
    return [
        (name.replace("_", " "), describe(value), describe(theirs[name]), is_followed(value, theirs[name]))
        for name, value in ours.items()
    ]


def describe_models(report: Report) -> str:
    """Say which checkpoints were evaluated."""
    other = "" if report.other is None else f", against {report.other.checkpoint}"
    return f"This model: {report.main.checkpoint}{other}."


def list_notes(report: Report) -> list[str]:
    """List what a reader must know besides the scores: intervals, notes of the benchmark, what is missing."""
    models = [(report.main, "")]
    if report.other is not None:
        models.append((report.other, f"Of {report.other.checkpoint} (against), "))
    notes = [*report.main.summary.notes]
    for evaluation, of_whom in models:
        notes += list_gaps(evaluation, of_whom)
        extra = list_extra_pictures(evaluation.root, report.benchmark)
        if extra:
            more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
            notes.append(
                f"{of_whom}pictures that the benchmark doesn't ask for lie in {evaluation.root.name}: {extra[0]}{more}"
            )
    names = PUBLISHED.get(report.benchmark.name, {})
    if report.is_comparable and any(REWRITTEN in name for name in names):
        notes.append(f"{REWRITTEN} The prompts were rewritten by a language model before this model drew them.")
    if report.benchmark.published_protocol:
        given = ", ".join(name.replace("_", " ") for name in report.benchmark.published_protocol)
        notes.append(f"How published scores were reached was given by benchmark.published_protocol for: {given}.")
    if report.other is not None:
        notes.append(describe_noise(report.main.protocol.sampling, report.other.protocol.sampling))
    return notes


def list_gaps(evaluation: Evaluation, of_whom: str) -> list[str]:
    """List what lacks in an evaluation: who drew the pictures, pictures, usable replies.

    Args:
        evaluation: of one model.
        of_whom: what each sentence begins with.
    """
    rows, notes = evaluation.rows, []
    missing = [row.picture for row in rows if row.state == "missing"]
    failed = [row.picture for row in rows if row.state == "failed"]
    if not evaluation.is_known:
        notes.append(f"It isn't known which model drew the pictures of {evaluation.checkpoint}.")
    if missing:
        notes.append(f"{of_whom}{len(missing)} of {len(rows)} pictures are missing: {', '.join(missing)}")
    unusable = [row.reason for row in rows if row.state == "missing" and row.reason not in ("", ABSENT)]
    if unusable:
        notes.append(f"{of_whom}{len(unusable)} of these lie there and can't be used: {'; '.join(unusable)}")
    if failed:
        notes.append(
            f"{of_whom}{len(failed)} of {len(rows)} pictures have no usable reply of the judge: {', '.join(failed)}"
        )
    return notes


def describe_noise(ours: Any, theirs: Any) -> str:
    """Say whether two models drew from the same noise, and in the same way."""
    paired = "the interval of the difference pairs their prompts."
    if not isinstance(ours, Mapping) or not isinstance(theirs, Mapping):
        return f"It isn't known whether both models drew from the same noise; {paired}"
    names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    changes = ", ".join(f"{name} {ours.get(name)} and {theirs.get(name)}" for name in names)
    if "seed" in names:
        return f"The models drew from different noise ({changes}); {paired}"
    otherwise = f", otherwise in different ways ({changes})" if changes else ""
    return f"Both models drew from the same noise{otherwise}; {paired}"


def draw_sheet(prompts: Sequence[Prompt], root: Path, file: Path) -> None:
    """Draw a sheet of pictures, each with its prompt and the reason for its score."""
    rows = [row for prompt in prompts for row in prompt.rows if row.state == "scored"]
    images = [open_picture(root / row.picture) for row in rows]
    captions = [shorten(row.prompt, PROMPT, placeholder=" …") for row in rows]
    for i, row in enumerate(rows):
        if row.reason and row.score != 1:
            captions[i] += f": {shorten(row.reason, REASON, placeholder=' …')}"
    # A sheet has one size of picture; others are fitted into it.
    images = [image if image.size == images[0].size else image.resize(images[0].size) for image in images]
    join_pictures(images, columns=10, scale=max(1, WIDTH // images[0].width), captions=captions, wrap=15).save(file)


def choose_sheets(prompts: Sequence[Prompt]) -> list[tuple[str, str, list[Prompt]]]:
    """Choose heading, file name and prompts of each sheet: the best and the worst ones, or one sheet of all."""
    drawn = [prompt for prompt in prompts if any(row.state == "scored" for row in prompt.rows)]
    ranked = sorted((prompt for prompt in drawn if prompt.rank), key=lambda prompt: -(prompt.score or 0.0))
    best = [prompt for prompt in ranked if prompt.rank == "best"][:SHOWN]
    worst = [prompt for prompt in ranked[::-1] if prompt.rank == "worst"][:SHOWN]
    sheets = [("Of the best prompts", "best", best), ("Of the worst prompts", "worst", worst)]
    if not ranked:
        sheets = [("Pictures", "pictures", drawn[:SHOWN])]
    return [sheet for sheet in sheets if sheet[2]]


def write_report(report: Report, out: Path) -> dict[str, Any]:
    """Write `report.json`, `report.md`, `report.html` and the sheets; returns what the first one holds.

    Args:
        report: what is reported.
        out: folder of the report; the trees of pictures lie in it.
    """
    benchmark, main = report.benchmark, report.main
    intervals = compute_intervals(benchmark, main.rows)
    differences = compute_differences(benchmark, main.rows, report.other.rows) if report.other is not None else {}
    values = build_values(report, intervals, differences)
    columns, cells = build_score_table(report, intervals, differences)
    # In the text, scores come first, then everything that a reader must know before comparing them.
    prompts = list_prompts(benchmark, main.rows)
    explained = ["In brackets: 95 % intervals by a bootstrap over prompts."] if intervals else []
    parts = [
        f"# {benchmark.title}",
        format_table(columns, cells),
        *explained,
        describe_models(report),
        f"{values['protocol']}.",
        report.give_verdict(),
        *list_notes(report),
        format_table(
            ["field", "this score", "published scores"], [list(row[:3]) for row in list_protocol_rows(report)]
        ),
    ]
    for heading, file, chosen in choose_sheets(prompts):
        draw_sheet(chosen, main.root, out / f"{file}.png")
        listed = "\n".join(f"- {prompt.text}" for prompt in chosen)
        parts.append(f"## {heading}\n\n![{heading}]({file}.png)\n\n{listed}")
    page = Page(
        benchmark.title,
        [describe_models(report), f"{values['protocol']}."],
        (columns, cells),
        [*explained, *list_notes(report)],
        report.is_comparable,
        report.give_verdict(),
        list_protocol_rows(report),
        build_cards(report, prompts, out),
        list(dict.fromkeys(prompt.group for prompt in prompts)),
        len(prompts),
    )
    write_whole(out / "report.json", (json.dumps(values, indent=2) + "\n").encode())
    write_whole(out / "report.md", ("\n\n".join(parts) + "\n").encode())
    write_whole(out / "report.html", render_page(page, out).encode())
    return values


def build_values(report: Report, intervals: Mapping, differences: Mapping) -> dict[str, Any]:
    """Build what `report.json` holds."""
    main = report.main
    values: dict[str, Any] = {
        **main.summary.scores,
        "intervals": dict(intervals),
        "pictures": len(main.rows),
        **build_gaps(main),
        "protocol": f"{main.summary.protocol}; judge {report.judge}",
        "protocol_fields": main.protocol.to_dict(),
        "published_protocol": None if report.published is None else report.published.to_dict(),
        "comparable": report.is_comparable,
        "differences": report.list_differences(),
    }
    if report.other is not None:
        values["against"] = {
            "checkpoint": report.other.checkpoint,
            "scores": dict(report.other.summary.scores),
            **build_gaps(report.other),
            "sampling": report.other.protocol.sampling,
            "intervals_of_difference": dict(differences),
        }
    return values


def build_gaps(evaluation: Evaluation) -> dict[str, Any]:
    """Build what `report.json` says of pictures without a score, and of who drew them."""
    return {
        "missing": [row.picture for row in evaluation.rows if row.state == "missing"],
        "failed": {row.picture: row.reason for row in evaluation.rows if row.state == "failed"},
        "drawn_by_checkpoint": evaluation.is_known,
    }


def build_cards(report: Report, prompts: Sequence[Prompt], out: Path) -> list[Card]:
    """Build the cards of the page: all prompts, or the best and the worst of each group where there are many."""
    models = [report.main] if report.other is None else [report.main, report.other]
    other_rows = {row.picture: row for row in report.other.rows} if report.other is not None else {}
    samples = max((len(prompt.rows) for prompt in prompts), default=1)
    cards = []
    for prompt in select_prompts(prompts, max(1, MOST_PICTURES // samples // len(models))):
        shown: dict[str, list[ShownPicture]] = {}
        for model in models:
            rows = prompt.rows if model is report.main else [other_rows[row.picture] for row in prompt.rows]
            name = model.checkpoint if len(models) > 1 else ""
            folder = model.root.relative_to(out).as_posix()
            # One checkpoint against itself has one name, and still two columns.
            name = name if name not in shown else f"{name} (against)"
            shown[name] = []
            for row in rows:
                said = describe_row(row, with_score=len(models) > 1)
                shown[name].append(ShownPicture(f"{folder}/{row.picture}", said, row.score))
        score = "" if prompt.score is None else f"{prompt.score:.2f}"
        cards.append(Card(prompt.text, prompt.group, prompt.rank, score, shown))
    return cards


def describe_row(row: Row, with_score: bool) -> str:
    """Describe a picture's score, where there are several models, and the reason for it."""
    reason = row.reason if row.score != 1 else ""
    if with_score and row.score is not None:
        return f"{row.score:.2f}{': ' if reason else ''}{reason}"
    return reason
