"""A benchmark's report: JSON, Markdown and HTML, with sheets of the best and the worst prompts."""

import base64
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from textwrap import shorten
from typing import Any

from experiments.reports import format_table
from tbac.evaluation.benchmarks.base import Row, Summary
from tbac.evaluation.benchmarks.published import PUBLISHED
from tbac.files import write_whole
from tbac.pictures import open_picture
from tbac.sampling.grid import join_pictures

SHOWN = 40  # pictures on a sheet, but at most half of all
WIDTH = 96  # least pixels of a picture on a sheet
PROMPT, REASON = 100, 80  # characters of a caption


@dataclass(frozen=True)
class Table:
    """Columns and rows of cells."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Picture:
    """A picture file beside the report, with a title."""

    title: str
    file: str


Part = str | Table | Picture


@dataclass(frozen=True)
class Findings:
    """What a report says.

    Attributes:
        name: name of the benchmark, by which published numbers are looked up.
        title: title of the report.
        summary: the scores and how they were computed.
        rows: one for every picture.
        checkpoint: the checkpoint that was scored.
        judge: name of the judge.
    """

    name: str
    title: str
    summary: Summary
    rows: Sequence[Row]
    checkpoint: str
    judge: str


def render_markdown(title: str, parts: Sequence[Part]) -> str:
    """Render the report as Markdown, which shows the pictures beside it."""
    lines = [f"# {title}"]
    for part in parts:
        if isinstance(part, Table):
            lines.append(format_table(list(part.columns), [list(row) for row in part.rows]))
        elif isinstance(part, Picture):
            lines.append(f"## {part.title}\n\n![{part.title}]({part.file})")
        else:
            lines.append(part)
    return "\n\n".join(lines) + "\n"


def render_html(title: str, parts: Sequence[Part], folder: Path) -> str:
    """Render the report as one HTML file that contains its pictures."""
    style = (
        "body{font-family:sans-serif;max-width:70em;margin:2em auto}td,th{padding:.2em .6em;text-align:right}"
        "img{max-width:100%}"
    )
    lines = [f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><style>{style}</style>"]
    lines.append(f"<h1>{html.escape(title)}</h1>")
    for part in parts:
        if isinstance(part, Table):
            lines.append("<table>")
            lines.append("".join(["<tr>", *(f"<th>{html.escape(str(cell))}</th>" for cell in part.columns), "</tr>"]))
            for row in part.rows:
                lines.append("".join(["<tr>", *(f"<td>{html.escape(str(cell))}</td>" for cell in row), "</tr>"]))
            lines.append("</table>")
        elif isinstance(part, Picture):
            data = base64.b64encode((folder / part.file).read_bytes()).decode()
            lines.append(f'<h2>{html.escape(part.title)}</h2><img src="data:image/png;base64,{data}">')
        else:
            lines.append(f"<p>{html.escape(part)}</p>")
    return "\n".join(lines) + "\n"


def build_score_table(name: str, scores: Mapping[str, float], checkpoint: str) -> Table:
    """Build a table with our scores in its first row, and the published ones of other models below."""
    digits = 3 if max(scores.values()) <= 5 else 2

    def cells(values: Mapping[str, float], digits: int) -> list[str]:
        return [f"{values[key]:.{digits}f}" if key in values else "" for key in scores]

    rows = [[f"this model ({checkpoint})", *cells(scores, digits)]]
    rows += [[f"{model}, published", *cells(values, 2)] for model, values in PUBLISHED.get(name, {}).items()]
    return Table(["", *scores], rows)


def draw_sheet(rows: Sequence[Row], root: Path, file: Path) -> None:
    """Draw a sheet of pictures, each with its prompt and the reason for its score."""
    images = [open_picture(root / row.picture) for row in rows]
    captions = [shorten(row.prompt, PROMPT, placeholder=" …") for row in rows]
    for i, row in enumerate(rows):
        if row.reason and row.score != 1:
            captions[i] += f": {shorten(row.reason, REASON, placeholder=' …')}"
    join_pictures(images, columns=10, scale=max(1, WIDTH // images[0].width), captions=captions, wrap=15).save(file)


def sort_by_prompt(rows: Sequence[Row]) -> list[Row]:
    """Sort the scored pictures by the mean score of their prompt, best first; samples of a prompt stay together."""
    scored = [row for row in rows if row.state == "scored" and row.score is not None]
    prompts: dict[str, list[float]] = {}
    for row in scored:
        prompts.setdefault(f"{row.group}/{row.prompt}", []).append(row.score or 0.0)
    return sorted(scored, key=lambda row: -mean(prompts[f"{row.group}/{row.prompt}"]))


def write_report(findings: Findings, root: Path, out: Path) -> dict[str, Any]:
    """Write `report.json`, `report.md`, `report.html` and the sheets; returns what the first one holds.

    Args:
        findings: what is reported.
        root: the tree of pictures.
        out: folder of the report.
    """
    summary, rows = findings.summary, findings.rows
    missing = [row.picture for row in rows if row.state == "missing"]
    failed = {row.picture: row.reason for row in rows if row.state == "failed"}
    report = {
        **summary.scores,
        "pictures": len(rows),
        "missing": missing,
        "failed": failed,
        "protocol": f"{summary.protocol}; judge {findings.judge}",
        "comparable": summary.comparable,
        "differences": list(summary.differences),
    }
    # In the text, scores come first, then everything that a reader must know before comparing them.
    parts: list[Part] = [
        build_score_table(findings.name, summary.scores, findings.checkpoint),
        f"{report['protocol']}.",
    ]
    if summary.comparable:
        parts.append("Comparable with published numbers.")
    else:
        parts.append(f"Not comparable with published numbers: {'; '.join(summary.differences)}.")
    parts += summary.notes
    if missing:
        parts.append(f"{len(missing)} of {len(rows)} pictures are missing: {', '.join(missing)}")
    if failed:
        parts.append(f"{len(failed)} of {len(rows)} pictures have no usable reply of the judge: {', '.join(failed)}")
    # Pictures follow on sheets, each beside the report.
    for heading, file, chosen in choose_sheets(rows):
        draw_sheet(chosen, root, out / f"{file}.png")
        parts.append(Picture(heading, f"{file}.png"))
    write_whole(out / "report.json", (json.dumps(report, indent=2) + "\n").encode())
    write_whole(out / "report.md", render_markdown(findings.title, parts).encode())
    write_whole(out / "report.html", render_html(findings.title, parts, out).encode())
    return report


def choose_sheets(rows: Sequence[Row]) -> list[tuple[str, str, list[Row]]]:
    """Choose heading, file name and pictures of each sheet: best and worst prompts, or one sheet without scores."""
    ordered = sort_by_prompt(rows)
    most = min(SHOWN, -(-len(ordered) // 2))
    sheets = [("Of the best prompts", "best", ordered[:most]), ("Of the worst prompts", "worst", ordered[::-1][:most])]
    if not ordered:
        sheets = [("Pictures", "pictures", [row for row in rows if row.state == "scored"][:SHOWN])]
    return [sheet for sheet in sheets if sheet[2]]
