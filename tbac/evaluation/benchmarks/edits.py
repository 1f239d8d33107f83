"""Edits that an exact detector can judge: whether the edit happened, and whether the rest stayed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, ClassVar

from PIL import Image

from tbac.evaluation.benchmarks.base import (
    Needs,
    PictureBenchmark,
    PictureVerdict,
    Row,
    Summary,
    list_edit_targets,
    read_rows,
)
from tbac.evaluation.detectors.base import Detection, Scan
from tbac.evaluation.picture_tree import Target
from tbac.evaluation.rules import EVERY, Thresholds, aggregate_by_tag, judge_edit

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
        self.folder = Path(self.file).expanduser().parent

    def list_targets(self) -> list[Target]:
        """List the targets `{i:04d}.png`."""
        return list_edit_targets(
            {f"{i:04d}": (edit["instruction"], self.folder / edit["image"]) for i, edit in enumerate(self.edits)}
        )

    def find_group(self, target: Target) -> str:
        """Find the kind of edit."""
        return self.edits[int(target.item)]["kind"]

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

    def summarize(self, rows: Sequence[Row], judge_name: str) -> Summary:
        """Average over all edits, and by kind of edit the share that happened; a missing picture counts as 0."""
        happened = [bool(row.details.get("happened", False)) for row in rows]
        by_kind = aggregate_by_tag([(row.group, done) for row, done in zip(rows, happened, strict=True)])
        scores = {
            "score": mean(row.score or 0.0 for row in rows),
            "happened": float(mean(happened)),
            "kept": mean(float(row.details.get("kept", 0.0)) for row in rows),
            **{f"{KIND}{kind}": share for kind, share in by_kind.items()},
        }
        return Summary(scores, f"{len(self.edits)} edits of {self.file}", ["there are no published numbers"])


def read_edits(path: str | Path) -> list[dict]:
    """Read rows with `image` (a file beside the list), `instruction`, `kind`, and the scans `source` and `target`."""
    return read_rows(path, {"image": str, "instruction": str, "kind": str, "source": dict, "target": dict})


def parse_scan(value: Mapping[str, Any]) -> Scan:
    """Make a `Scan` of `{background, objects: [{name, color, box}]}`."""
    items = (Detection(o["name"], o["color"], tuple(o["box"]), 1.0) for o in value["objects"])
    return Scan(value["background"], tuple(items))
