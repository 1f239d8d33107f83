"""What `steps=[score]` has found, as its file keeps it: who judged, what was asked, who drew, a row of each picture.

A report is written from this file alone, so it says of scores what was true when they were given.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from tbac.evaluation.benchmarks.base import PictureBenchmark
from tbac.evaluation.benchmarks.rows import STATES, Drawn, Row, check_score
from tbac.evaluation.judges.base import JudgeFacts
from tbac.evaluation.protocol import UNKNOWN
from tbac.files import parse_json, read_text, shorten, write_whole

ASKED = ("prompts", "questions", "rules")  # fields of the protocol that the benchmark's files and options decide
PICTURE = "sha256"  # of a picture's file, in its row


@dataclass(frozen=True)
class Results:
    """What `steps=[score]` has found.

    Attributes:
        judge: its name.
        rows: one for each picture.
        facts: who the judge was.
        asked: digests of prompts and questions, and the rules, as the protocol names them.
        drawn: how the pictures were drawn.
        pictures: path -> digest of the file that was judged; None where there was none.
    """

    judge: str
    rows: list[Row]
    facts: JudgeFacts = field(default_factory=JudgeFacts)
    asked: Mapping[str, Any] = field(default_factory=lambda: dict.fromkeys(ASKED, UNKNOWN))
    drawn: Drawn = field(default_factory=Drawn)
    pictures: Mapping[str, str | None] = field(default_factory=dict)


def describe_asked(benchmark: PictureBenchmark) -> dict[str, Any]:
    """Describe what a benchmark asks for, by the digests of its protocol."""
    protocol = benchmark.describe_protocol([], JudgeFacts(), Drawn())
    return {name: getattr(protocol, name) for name in ASKED}


def compute_picture_digest(path: Path) -> str | None:
    """Compute a short digest of a picture's file; None where there is none."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def write_results(file: Path, results: Results) -> None:
    """Write what was found: a line of who judged, what was asked and how the pictures were drawn, then all rows."""
    first = {
        "judge": results.judge,
        "facts": asdict(results.facts),
        "asked": dict(results.asked),
        "drawn": asdict(results.drawn),
    }
    lines = [first, *(asdict(row) | {PICTURE: results.pictures[row.picture]} for row in results.rows)]
    write_whole(file, ("\n".join(map(json.dumps, lines)) + "\n").encode())


def check_asked(results: Results, benchmark: PictureBenchmark, file: Path) -> None:
    """Raise ValueError when results were judged by other prompts, questions or rules than the options name now."""
    for name, now in describe_asked(benchmark).items():
        then = results.asked[name]
        if then not in (UNKNOWN, now):
            raise ValueError(
                f"{file} was judged with other {name} ({then}) than these options name ({now}); give the same "
                "benchmark.* as then, or judge anew by steps=[score,report]"
            )


def check_pictures(results: Results, root: Path, file: Path) -> None:
    """Raise ValueError when the pictures of a tree aren't those that were judged."""
    changed = [name for name, digest in results.pictures.items() if compute_picture_digest(root / name) != digest]
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise ValueError(
            f"{file} is of other pictures than lie in {root} now ({changed[0]}{more}); "
            "steps=[score,report] judges these"
        )


def read_drawn(values: Any) -> Drawn:
    """Read how pictures were drawn out of what a file holds; what isn't there is unknown."""
    values = values if isinstance(values, dict) else {}
    kinds: dict[str, type] = {"cut": int, "sampling": dict, "checkpoint": str, "settings": dict}
    return Drawn(**{name: v for name, v in values.items() if name in kinds and type(v) is kinds[name]})


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
    # Results that an earlier version has written don't say who judged, what was asked, or which pictures they are of.
    facts, asked = named.get("facts"), named.get("asked")
    is_whole = isinstance(facts, dict) and all(isinstance(facts.get(part.name), str) for part in fields(JudgeFacts))
    known = JudgeFacts(**{part.name: facts[part.name] for part in fields(JudgeFacts)}) if is_whole else JudgeFacts()
    asked = {name: (asked if isinstance(asked, dict) else {}).get(name, UNKNOWN) for name in ASKED}
    # Every picture of the benchmark has one row.
    targets = {target.path: target for target in benchmark.targets}
    rows, pictures = [], {}
    for number, line in enumerate(lines, start=2):
        values = parse_json(line, f"{file}:{number}", dict)
        is_digested, digest = PICTURE in values, values.pop(PICTURE, None)
        row = read_row(values, f"{file}:{number}")
        target = targets.pop(row.picture, None)
        if target is None or row.prompt != target.prompt:
            raise ValueError(
                f"{file}:{number}: {shorten(row.picture)!r} isn't a picture of this benchmark, or stands there twice; "
                "steps=[score] writes the file anew"
            )
        rows.append(row)
        if is_digested:
            pictures[row.picture] = digest
    if targets:
        some = next(iter(targets))
        raise ValueError(f"{file} has no row for {len(targets)} pictures, such as {some}; steps=[score] writes it anew")
    return Results(named["judge"], rows, known, asked, read_drawn(named.get("drawn")), pictures)


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
