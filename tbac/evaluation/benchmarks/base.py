"""What every benchmark shares.

A benchmark is a dataclass. Its fields are the options that its YAML in `conf/benchmark/` may set, and it reads its
files when it is made, so that a wrong file is named before a model is loaded. A YAML names the class by `_target_`; to
add a benchmark, derive from `PictureBenchmark` and write such a YAML.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from PIL import Image

from tbac.evaluation.judges.base import JudgeError
from tbac.evaluation.picture_tree import Target

Needs = Literal["detector", "questions", "nothing"]


class BenchmarkFileError(ValueError):
    """A benchmark file of the wrong form; the message names file, line and field."""


def read_rows(path: str | Path, required: Mapping[str, type], check: Callable[[dict], str] | None = None) -> list[dict]:
    """Rows of a JSON-lines file.

    Args:
        path: the file.
        required: field -> type of every row.
        check: returns what is wrong with a row, or "".

    Raises:
        BenchmarkFileError: when the file is absent, empty, or a row isn't of the form.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise BenchmarkFileError(f"benchmark file {path} doesn't exist")
    rows = []
    try:
        lines = path.read_text().splitlines()
    except UnicodeDecodeError:
        raise BenchmarkFileError(f"{path} is not UTF-8 text; JSON lines are expected") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise BenchmarkFileError(f"{path}:{number} is not JSON ({error})") from None
        # The fields that every row needs come first, so that `check` may rely on them.
        if not isinstance(row, dict):
            raise BenchmarkFileError(f"{path}:{number} must be a JSON object, got {type(row).__name__}")
        for name, kind in required.items():
            if not isinstance(row.get(name), kind):
                raise BenchmarkFileError(f"{path}:{number} needs {name!r} as {kind.__name__}, got {row.get(name)!r}")
        if check and (problem := check(row)):
            raise BenchmarkFileError(f"{path}:{number}: {problem}")
        rows.append(row)
    if not rows:
        raise BenchmarkFileError(f"{path} holds no row")
    return rows


@dataclass(frozen=True)
class PictureVerdict:
    """What a judge's reply, or a detector's scan, says about one picture.

    Attributes:
        score: in [0, 1]; None where the benchmark has no score.
        reason: what is wrong.
        details: what the benchmark's averages need besides.
    """

    score: float | None
    reason: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One picture of a benchmark, and what scoring found out about it.

    Attributes:
        picture: its path in the tree.
        group: tag, type, kind or category that it counts for.
        prompt: what it was to show.
        state: `scored`; `missing`, when it isn't there or can't be read; `failed`, when the judge gave no usable reply.
        score: in [0, 1]; None unless it was scored.
        reason: what is wrong.
        details: what the benchmark's averages need besides.
    """

    picture: str
    group: str
    prompt: str
    state: str = "scored"
    score: float | None = None
    reason: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Summary:
    """What a benchmark reports.

    Attributes:
        scores: name -> value; the most important one first.
        protocol: how they were reached.
        differences: why published numbers were reached in another way; empty where they were reached in this one.
        notes: further sentences.
    """

    scores: Mapping[str, float]
    protocol: str
    differences: Sequence[str] = ()
    notes: Sequence[str] = ()

    @property
    def comparable(self) -> bool:
        """Whether the numbers may stand beside published ones."""
        return not self.differences


@dataclass(kw_only=True, eq=False)
class PictureBenchmark(ABC):
    """A benchmark of pictures: which ones it wants, how one is judged, and what the scores of all are.

    Attributes:
        name: of its folder of pictures and of its scores in MLflow.
        title: what a report calls it.
        num_inference_steps: of the solver.
        guidance_scale: of the text.
        image_guidance_scale: of the input pictures; for benchmarks of edits alone.
        seed: base of every sample's seed.
        batch_size: pictures that are drawn together where they are drawn in memory.
        needs: what judges its pictures: a `detector`, a judge that answers `questions`, or `nothing`.

    Raises:
        ValueError: for an option that can't be used; for a file of the wrong form.
    """

    needs: ClassVar[Needs]

    name: str
    title: str = ""
    num_inference_steps: int = 30
    guidance_scale: float = 4.5
    image_guidance_scale: float | None = None
    seed: int = 42
    batch_size: int = 32

    def __post_init__(self) -> None:
        for option in ("num_inference_steps", "batch_size"):
            value = getattr(self, option)
            if type(value) is not int or value < 1:
                raise ValueError(f"benchmark.{option} must be a whole number of at least 1, got {value!r}")
        self.title = self.title or self.name
        self.read_files()

    @abstractmethod
    def read_files(self) -> None:
        """Read the files that the options name, into attributes of one's own."""

    @abstractmethod
    def list_targets(self) -> list[Target]:
        """Every picture."""

    def find_group(self, target: Target) -> str:
        """Tag, type, kind or category that a picture counts for."""
        return ""

    @abstractmethod
    def judge_picture(self, target: Target, picture: Image.Image, judge: Any) -> PictureVerdict:
        """The verdict on one picture.

        Raises:
            JudgeError: when the judge gives no usable reply.
        """

    @abstractmethod
    def summarize(self, rows: Sequence[Row], judge_name: str) -> Summary:
        """Scores of all rows."""

    def write_other_files(self, root: Path) -> None:
        """Write the files of the tree besides pictures, for benchmarks whose own scorer reads any."""
        return

    def check_judge(self, judge: Any) -> None:
        """Raise ValueError where the judge is of the wrong kind, or something that judging needs isn't given."""
        if self.needs == "detector" and not callable(judge):
            raise ValueError(
                f"{self.title} needs a detector, judge=template or judge=mask2former; got {type(judge).__name__}"
            )
        if self.needs == "questions" and not hasattr(judge, "ask"):
            raise ValueError(f"this benchmark asks questions; {type(judge).__name__} only detects")

    def build_sampling_options(self) -> dict[str, Any]:
        """How the pipeline draws its pictures; the seed and what is drawn together apart."""
        options = {"num_inference_steps": self.num_inference_steps, "guidance_scale": self.guidance_scale}
        if self.image_guidance_scale is not None:
            options["image_guidance_scale"] = self.image_guidance_scale
        return options

    def judge_pictures(self, find_picture: Callable[[Target], Image.Image | None], judge: Any) -> Iterator[Row]:
        """Judge every picture.

        Args:
            find_picture: a target -> its picture, or None where there is none.
            judge: see `needs`.
        """
        for target in self.list_targets():
            picture, group = find_picture(target), self.find_group(target)
            if picture is None:
                yield Row(target.path, group, target.prompt, "missing", None, "the picture is missing")
                continue
            try:
                verdict = self.judge_picture(target, picture, judge)
            except JudgeError as error:
                yield Row(target.path, group, target.prompt, "failed", None, str(error))
                continue
            yield Row(target.path, group, target.prompt, "scored", verdict.score, verdict.reason, dict(verdict.details))


def open_picture(path: Path) -> Image.Image:
    """A picture file, decoded."""
    with Image.open(path) as image:
        return image.convert("RGB")


def make_picture_finder(root: Path) -> Callable[[Target], Image.Image | None]:
    """What finds pictures in a tree: a target -> its picture; None when it isn't there or doesn't decode."""

    def find(target: Target) -> Image.Image | None:
        try:
            return open_picture(root / target.path)
        except (OSError, SyntaxError, ValueError):
            return None

    return find


def list_edit_targets(edits: Mapping[str, tuple[str, Path]]) -> list[Target]:
    """`<key>.png`, as ImgEdit's scorer reads them.

    Args:
        edits: key -> instruction and source picture.
    """
    return [Target(f"{key}.png", key, instruction, (0,), (image,)) for key, (instruction, image) in edits.items()]


def list_count_difference(found: int, published: int, what: str) -> list[str]:
    """Why a number of items isn't that of the published benchmark: one sentence or none."""
    return [] if found == published else [f"{found} {what} instead of {published}"]


def list_judge_difference(judge_name: str, word: str, published: str) -> list[str]:
    """Why the judge isn't that of published numbers, whose name holds `word`: one sentence or none."""
    return [] if word in judge_name.lower() else [f"judged by {judge_name} instead of {published}"]
