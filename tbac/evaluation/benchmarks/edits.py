"""Edits that an exact detector can judge: whether the edit happened, and whether the rest stayed."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, ClassVar

from PIL import Image

from tbac.evaluation.benchmarks.base import Needs, PictureBenchmark, list_edit_targets
from tbac.evaluation.benchmarks.files import locate_picture, read_rows
from tbac.evaluation.benchmarks.rows import Count, PictureVerdict, Row
from tbac.evaluation.detectors.base import Detection, Scan, check_names
from tbac.evaluation.picture_tree import Target
from tbac.evaluation.rules import EVERY, Thresholds, judge_edit
from tbac.files import describe_error, expand_path, shorten

KIND = "happened, "  # before the kind of edit, in the names of scores


@dataclass(kw_only=True, eq=False)
class Edits(PictureBenchmark):
    """Edits of pictures whose objects are known before and after.

    Attributes:
        file: JSON lines; see `read_edits`.
    """

    needs: ClassVar[Needs] = "detector"

    file: str
    image_guidance_scale: float | None = 1.5
    title: str = "Edits"

    def read_files(self) -> None:
        """Read the edits; their source pictures lie beside the file."""
        self.edits = read_edits(self.file)
        self.folder = expand_path(self.file, "benchmark.file").parent

    def list_targets(self) -> list[Target]:
        """List the targets `{i:04d}.png`."""
        return list_edit_targets(
            {f"{i:04d}": (edit["instruction"], self.folder / edit["image"]) for i, edit in enumerate(self.edits)}
        )

    def find_group(self, target: Target) -> str:
        """Find the kind of edit."""
        return self.edits[int(target.item)]["kind"]

    def check_judge(self, judge: Any) -> None:
        """Raise ValueError when the judge isn't a detector, or doesn't know an object of an edit."""
        super().check_judge(judge)
        scans = [parse_scan(edit[part]) for edit in self.edits for part in ("source", "target")]
        check_names(judge, [detection.name for scan in scans for detection in scan.detections], self.file)

    def judge_picture(self, target: Target, picture: Image.Image, judge: Any) -> PictureVerdict:
        """Apply the rules for edits to what the detector finds, with the colours of all objects before and after."""
        edit = self.edits[int(target.item)]
        source, wanted = parse_scan(edit["source"]), parse_scan(edit["target"])
        colored = {detection.name for scan in (source, wanted) for detection in scan.detections}
        scan = judge(picture, colored)
        # Objects that the detector isn't sure of count neither as added nor as still there.
        thresholds: Thresholds = getattr(judge, "thresholds", EVERY)
        counted = thresholds.apply(scan.detections, "")
        edited = Scan(scan.background, tuple(d for d in scan.detections if d in counted))
        verdict = judge_edit(source, wanted, edited, edit.get("anywhere", False))
        return PictureVerdict(verdict.score, details={"happened": verdict.happened, "kept": verdict.kept})

    def count(self, row: Row) -> list[Count]:
        """Count score, share that happened and share that stayed, and what happened by kind; a missing picture as 0."""
        happened = float(bool(row.details.get("happened", False)))
        kept = float(row.details.get("kept", 0.0))
        cells = {"score": row.score or 0.0, "happened": happened, "kept": kept, f"{KIND}{row.group}": happened}
        return [Count(cell, value) for cell, value in cells.items()]

    def combine(self, means: Mapping[str, float]) -> dict[str, float]:
        """Return the means, and the mean over kinds of what happened."""
        kinds = {cell: value for cell, value in means.items() if cell.startswith(KIND)}
        leading = {name: means[name] for name in ("score", "happened", "kept")}
        return leading | {f"{KIND}overall": mean(kinds.values())} | kinds


def read_edits(path: str | Path) -> list[dict]:
    """Read rows with `image` (a file beside the list), `instruction`, `kind`, and the scans `source` and `target`."""
    required = {"image": str, "instruction": str, "kind": str, "source": dict, "target": dict}
    rows = read_rows(path, required, describe_problem)
    folder = expand_path(path, "benchmark.file").parent
    for number, row in enumerate(rows):
        locate_picture(folder, row["image"], f"{path}: edit {number}")
    return rows


def describe_problem(row: dict) -> str:
    """Describe what is wrong with the scans of a row; "" when nothing is."""
    for name in ("source", "target"):
        try:
            parse_scan(row[name])
        except (KeyError, TypeError, ValueError) as error:
            return f"{name!r} must be {{background, objects: [{{name, color, box}}]}} ({describe_error(error)})"
    if not isinstance(row.get("anywhere", False), bool):
        return f"'anywhere' must be true or false, got {shorten(row['anywhere'])}"
    return ""


def parse_scan(value: Mapping[str, Any]) -> Scan:
    """Make a `Scan` of `{background, objects: [{name, color, box}]}`.

    Raises:
        KeyError: for a field that isn't there.
        TypeError: for one of another type.
        ValueError: for a box that isn't four finite numbers.
    """
    detections = []
    for item in value["objects"]:
        left, top, right, bottom = map(float, item["box"])
        if not math.isfinite(left + top + right + bottom):
            raise ValueError("a box must be four finite numbers")
        if not isinstance(item["name"], str) or not isinstance(item["color"], str):
            raise TypeError("name and color must be texts")
        detections.append(Detection(item["name"], item["color"], (left, top, right, bottom), 1.0))
    if not isinstance(value["background"], str):
        raise TypeError("background must be a text")
    return Scan(value["background"], tuple(detections))
