"""GenEval: 553 prompts, each with the objects that must be seen; four samples of each."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from tbac.evaluation.benchmarks.base import Needs, PictureBenchmark
from tbac.evaluation.benchmarks.files import quote, read_rows
from tbac.evaluation.benchmarks.rows import Count, PictureVerdict, Row
from tbac.evaluation.detectors.base import check_names
from tbac.evaluation.picture_tree import Target, name_records_folder
from tbac.evaluation.rules import EVERY, RELATIONS, judge_geneval
from tbac.files import shorten, write_whole


@dataclass(kw_only=True, eq=False)
class GenEval(PictureBenchmark):
    """Judges pictures by GenEval's rules, for prompts in the format of its `evaluation_metadata.jsonl`.

    Attributes:
        file: the prompts.
        samples: pictures of each prompt; published numbers have 4.
    """

    needs: ClassVar[Needs] = "detector"

    file: str
    samples: int = 1
    title: str = "GenEval"

    def read_files(self) -> None:
        """Read the prompts."""
        self.prompts = read_geneval(self.file)

    def list_targets(self) -> list[Target]:
        """List the targets `{i:05d}/samples/{k:05d}.png`."""
        return list_geneval_targets(self.prompts, self.samples)

    def write_other_files(self, root: Path) -> None:
        """Write `{i:05d}/metadata.jsonl`."""
        write_geneval_metadata(self.prompts, root)

    def find_group(self, target: Target) -> str:
        """Find the tag of its prompt."""
        return self.prompts[int(target.item)]["tag"]

    def check_judge(self, judge: Any) -> None:
        """Raise ValueError when the judge isn't a detector, or doesn't know a class that a prompt asks for."""
        super().check_judge(judge)
        parts = [row.get(part, []) for row in self.prompts for part in ("include", "exclude")]
        check_names(judge, [entry["class"] for entries in parts for entry in entries], self.file)

    def judge_picture(self, target: Target, picture: Image.Image, judge: Any) -> PictureVerdict:
        """Apply GenEval's rules to what the detector finds, with the colours that this prompt asks for."""
        row = self.prompts[int(target.item)]
        colored = {wanted["class"] for wanted in row["include"] if "color" in wanted}
        scan = judge(picture, colored)
        verdict = judge_geneval(scan.detections, row, getattr(judge, "thresholds", EVERY))
        return PictureVerdict(float(verdict.correct), verdict.reason)

    def count(self, row: Row) -> list[Count]:
        """Count every picture for its tag; one that is missing or has no verdict is wrong."""
        return [Count(row.group, row.score or 0.0)]

    def describe_questions(self) -> Any:
        """Return the objects that each prompt must and must not show."""
        return [(row["tag"], row["include"], row.get("exclude", [])) for row in self.prompts]


def read_geneval(path: str | Path) -> list[dict]:
    """Read the rows of GenEval's `evaluation_metadata.jsonl`: `tag`, `prompt`, `include`, and perhaps `exclude`."""
    return read_rows(path, {"tag": str, "prompt": str, "include": list}, describe_problem)


def describe_problem(row: dict) -> str:
    """Describe what is wrong with a row of GenEval's file; "" when nothing is."""
    for part in ("include", "exclude"):
        entries = row.get(part, [])
        if not isinstance(entries, list):
            return f"{part!r} must be a list, got {shorten(entries)}"
        for index, entry in enumerate(entries):
            problem = describe_problem_of_entry(entry, index)
            if problem:
                return f"{part}[{index}]{problem}"
    return "" if row.get("include") else "'include' must hold at least one object"


def describe_problem_of_entry(entry: Any, index: int) -> str:
    """Describe what is wrong with an object that a prompt asks for; "" when nothing is."""
    if not isinstance(entry, dict) or not isinstance(entry.get("class"), str):
        return f" needs a 'class', got {shorten(entry)}"
    if not is_whole(entry.get("count")) or entry["count"] < 1:
        return f" needs a positive whole 'count', got {quote(entry.get('count'))}"
    if not isinstance(entry.get("color", ""), str):
        return f".color must be a text, got {shorten(entry['color'])}"
    if "position" not in entry:
        return ""
    # A position is judged relative to objects of an earlier entry, so it must point at one.
    position = entry["position"]
    if not (isinstance(position, list) and len(position) == 2 and position[0] in RELATIONS):
        return f".position must be [one of {', '.join(RELATIONS)}, index], got {shorten(position)}"
    if not (is_whole(position[1]) and 0 <= position[1] < index):
        return f".position must point at an earlier entry, got {shorten(position[1])}"
    return ""


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number; JSON's true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def list_geneval_targets(rows: Sequence[Mapping], samples: int = 4) -> list[Target]:
    """List the targets `{i:05d}/samples/{k:05d}.png`, as GenEval's `evaluate_images.py` reads them."""
    return [
        Target(f"{i:05d}/samples/{k:05d}.png", f"{i:05d}", row["prompt"], (k,))
        for i, row in enumerate(rows)
        for k in range(samples)
    ]


def write_geneval_metadata(rows: Sequence[Mapping], root: Path) -> None:
    """Write the row of each prompt into `{i:05d}/metadata.jsonl`."""
    for i, row in enumerate(rows):
        folder = root / f"{i:05d}"
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "metadata.jsonl", json.dumps(row).encode(), name_records_folder(root))
