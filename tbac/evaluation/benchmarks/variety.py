"""How different the right pictures of one prompt are, in what the prompt leaves open."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import mean
from typing import Any, ClassVar

from PIL import Image

from tbac.evaluation.benchmarks.base import Needs, PictureBenchmark
from tbac.evaluation.benchmarks.geneval import read_geneval
from tbac.evaluation.benchmarks.rows import Count, PictureVerdict, Row
from tbac.evaluation.detectors.base import Scan, check_names
from tbac.evaluation.judges.detector import find_third
from tbac.evaluation.picture_tree import Target
from tbac.evaluation.rules import EVERY, judge_geneval

ASPECTS = ("places", "colors", "backgrounds")


@dataclass(kw_only=True, eq=False)
class Variety(PictureBenchmark):
    """The probability that two right pictures of a prompt differ, for prompts in GenEval's format.

    They may differ in the thirds of the picture where the objects that are asked for stand, in the colours of these,
    and in the background.
    Only pictures that are right by GenEval's rules count, since wrong ones differ for another reason. The probability
    is 1 minus the sum of squared shares, the quadratic entropy, estimated from all pairs, so that its mean doesn't
    depend on how many pictures of a prompt are right; a prompt with fewer than two is left out.

    Attributes:
        file: the prompts.
        samples: pictures of each prompt.
    """

    needs: ClassVar[Needs] = "detector"

    file: str
    samples: int = 8
    title: str = "Variety"

    def read_files(self) -> None:
        """Read the prompts."""
        if self.samples < 2:
            raise ValueError(f"benchmark.samples must be at least 2, since pictures are compared; got {self.samples}")
        self.prompts = read_geneval(self.file)

    def list_targets(self) -> list[Target]:
        """List the targets `{i:05d}.png`, a grid of all samples of a prompt each."""
        samples = tuple(range(self.samples))
        return [Target(f"{i:05d}.png", f"{i:05d}", row["prompt"], samples) for i, row in enumerate(self.prompts)]

    def find_group(self, target: Target) -> str:
        """Find the tag of its prompt."""
        return self.prompts[int(target.item)]["tag"]

    def check_judge(self, judge: Any) -> None:
        """Raise ValueError when the judge isn't a detector, or doesn't know a class that a prompt asks for."""
        super().check_judge(judge)
        check_names(judge, [entry["class"] for row in self.prompts for entry in row["include"]], self.file)

    def judge_picture(self, target: Target, picture: Image.Image, judge: Any) -> PictureVerdict:
        """Compare the right pictures of a grid, two by two."""
        row = self.prompts[int(target.item)]
        names = {wanted["class"] for wanted in row["include"]}
        cells = cut_grid(picture, self.samples)
        scans = [judge(cell, names) for cell in cells]
        thresholds = getattr(judge, "thresholds", EVERY)
        right = [scan for scan in scans if judge_geneval(scan.detections, row, thresholds).correct]
        details: dict[str, Any] = {"right": len(right) / len(scans)}
        if len(right) < 2:
            return PictureVerdict(None, "fewer than two pictures are right", details)
        size = cells[0].size
        views = [describe_scan(scan, names, size) for scan in right]
        for aspect in ASPECTS:
            details[aspect] = compute_difference([view[aspect] for view in views])
        return PictureVerdict(mean(details[aspect] for aspect in ASPECTS), details=details)

    def count(self, row: Row) -> list[Count]:
        """Count a prompt for each aspect, if two of its pictures are right, and its share of right pictures."""
        known = [name for name in (*ASPECTS, "right") if name in row.details]
        return [Count(name, float(row.details[name])) for name in known]

    def combine(self, means: Mapping[str, float]) -> dict[str, float]:
        """Compute the mean over the aspects, before the means."""
        known = [means[aspect] for aspect in ASPECTS if aspect in means]
        return ({"overall": mean(known)} if known else {}) | dict(means)

    def describe_rules(self) -> str:
        """Describe in a few words how detections become scores."""
        return "the share of pairs of right pictures that differ"


def describe_scan(scan: Scan, names: Collection[str], size: tuple[int, int]) -> dict[str, Any]:
    """Describe what a prompt may leave open in a picture of `size` (width, height), of the objects that it asks for."""
    asked = [detection for detection in scan.detections if detection.name in names]
    return {
        "places": sorted((detection.name, *find_third(detection, size)) for detection in asked),
        "colors": sorted((detection.name, detection.color) for detection in asked),
        "backgrounds": scan.background,
    }


def compute_difference(values: Sequence[Any]) -> float:
    """Compute the share of pairs that differ, of at least two values."""
    return mean(float(one != other) for one, other in combinations(values, 2))


def cut_grid(grid: Image.Image, count: int) -> list[Image.Image]:
    """Cut a grid in rows of two into its first `count` pictures."""
    width, height = grid.width // 2, grid.height // -(-count // 2)
    places = [(index % 2 * width, index // 2 * height) for index in range(count)]
    return [grid.crop((x, y, x + width, y + height)) for x, y in places]
