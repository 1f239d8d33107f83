"""What every benchmark shares.

A benchmark is a dataclass. Its fields are the options that its YAML in `conf/benchmark/` may set. It reads its files
when it is built, so that a wrong file is reported before a model is loaded. To add a benchmark, derive a class from
`PictureBenchmark`, and write a YAML that names it by `_target_`.
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from PIL import Image

from tbac.evaluation.benchmarks.published import PROTOCOLS
from tbac.evaluation.benchmarks.rows import Count, Drawn, PictureVerdict, Row, ScoreError, Summary, compute_means
from tbac.evaluation.judges.base import JudgeError, JudgeFacts, Manner, use_manner
from tbac.evaluation.picture_tree import Target
from tbac.evaluation.protocol import UNKNOWN, Protocol, compute_data_digest
from tbac.files import shorten
from tbac.pictures import PictureError, open_picture
from tbac.redaction import hide_in_text

FILE_NAME = re.compile(r"\w[\w.-]{0,99}")  # what may name a folder of ours
Needs = Literal["detector", "questions", "probabilities", "text", "nothing"]
ABSENT = "the picture is missing"
ENDINGS = (".jpg", ".jpeg", ".webp", ".PNG", ".JPG")  # that a picture may have where `.png` is wanted
OWN_WORDS = "The judge is asked in our own words; benchmark.script names the published script, to ask in its words."


@dataclass(kw_only=True, eq=False)
class PictureBenchmark(ABC):
    """A benchmark of pictures: it lists the pictures to draw, judges each of them, and summarizes the scores.

    Attributes:
        name: of its folder of pictures and of its scores in MLflow.
        title: its name in a report.
        num_inference_steps: steps of the solver.
        guidance_scale: of the text.
        image_guidance_scale: of the input pictures; only for benchmarks of edits.
        seed: base of every sample's seed.
        batch_size: how many pictures are drawn together when they are drawn in memory.
        limit: draw and judge only the first so many prompts; None for all.
        tries: how often the judge is asked in one run for a reply that can be used.
        steady: ask the judge at temperature 0 and in one wording, where the published way is another.
        published_protocol: fields of the published protocol that this package doesn't know, such as `judge_weights`.
        needs: what judges its pictures: a `detector`, a judge that answers `questions`, tells `probabilities` of
            answers or reads `text`, or `nothing`.
        questions_source: what its option `questions` must name before pictures can be judged; empty where it has none.
        published_manner: how its published script asks the judge; None leaves it to the judge.
        manner: the same, with the system message of the script where that was read.
        targets: the pictures to draw, within `limit`.

    Raises:
        ValueError: for an option that can't be used, a file of the wrong form, or a class that lacks a method.
    """

    needs: ClassVar[Needs]
    questions_source: ClassVar[str] = ""
    published_manner: ClassVar[Manner | None] = None

    name: str
    title: str = ""
    num_inference_steps: int = 30
    guidance_scale: float = 4.5
    image_guidance_scale: float | None = None
    seed: int = 42
    batch_size: int = 32
    limit: int | None = None
    tries: int = 3
    steady: bool = False
    published_protocol: Mapping[str, Any] | None = None

    def __new__(cls, *_: Any, **__: Any) -> Self:
        # Python's own message for a method that is missing comes as a TypeError, so as a traceback.
        missing = sorted(cls.__abstractmethods__)
        if not hasattr(cls, "needs"):
            missing.append("needs")
        if missing:
            raise ValueError(f"the benchmark {cls.__name__} must define {', '.join(missing)}; see PictureBenchmark")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for option in ("num_inference_steps", "batch_size", "limit", "tries", "samples"):
            value = getattr(self, option, 1)  # not every benchmark has samples
            if (type(value) is not int or value < 1) and not (option == "limit" and value is None):
                raise ValueError(f"benchmark.{option} must be a whole number of at least 1, got {value!r}")
        for option in ("guidance_scale", "image_guidance_scale"):
            value = getattr(self, option)
            is_number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
            if not is_number and not (option == "image_guidance_scale" and value is None):
                raise ValueError(f"benchmark.{option} must be a number of at least 0, got {value!r}")
        if type(self.seed) is not int or self.seed < 0:
            raise ValueError(f"benchmark.seed must be a whole number of at least 0, got {self.seed!r}")
        if not isinstance(self.name, str) or not FILE_NAME.fullmatch(self.name):
            raise ValueError(f"benchmark.name must be letters, digits, '_', '-' and '.', got {shorten(self.name)!r}")
        unknown = sorted(set(self.published_protocol or ()) - {part.name for part in fields(Protocol)})
        if unknown:
            raise ValueError(f"benchmark.published_protocol has no field {unknown[0]!r}")
        self.title = self.title or self.name
        self.manner = self.published_manner
        self.read_files()
        self.targets = self.list_targets()
        if self.limit is not None:
            items = set(list(dict.fromkeys(target.item for target in self.targets))[: self.limit])
            self.targets = [target for target in self.targets if target.item in items]
        self.check_targets()

    def check_targets(self) -> None:
        """Raise ValueError unless there are pictures to draw, each of which has a place of its own."""
        paths = [target.path for target in self.targets]
        if not paths:
            raise ValueError(f"the benchmark {self.name} lists no picture")
        if len(set(paths)) < len(paths):
            twice = next(path for path in paths if paths.count(path) > 1)
            raise ValueError(f"the benchmark {self.name} wants several pictures at the same place, {shorten(twice)}")

    @abstractmethod
    def read_files(self) -> None:
        """Read the files that the options name, into further attributes."""

    @abstractmethod
    def list_targets(self) -> list[Target]:
        """List every picture to draw."""

    def find_group(self, target: Target) -> str:
        """Find the tag, type, kind or category that a picture counts for."""
        return ""

    @abstractmethod
    def judge_picture(self, target: Target, picture: Image.Image, judge: Any) -> PictureVerdict:
        """Judge one picture.

        Raises:
            JudgeError: when the judge gives no usable reply.
        """

    def judge_sample(self, target: Target, picture: Image.Image, judge: Any) -> PictureVerdict:
        """Judge one sample of a target by itself, as a reward does.

        Raises:
            JudgeError: when the judge gives no usable reply.
            ValueError: when the benchmark judges several samples in a grid, and can't judge one alone.
        """
        if len(target.samples) > 1:
            raise ValueError(f"{self.title} judges grids of {len(target.samples)} pictures, so it can't be a reward")
        return self.judge_picture(target, picture, judge)

    def find_prompt(self, target: Target) -> str:
        """Find the name of the prompt that a picture belongs to; what belongs together is drawn together at random."""
        return target.item

    def count(self, row: Row) -> list[Count]:
        """List what a picture adds to which means: its score to that of its group; a missing picture adds 0."""
        return [] if row.state == "failed" else [Count(row.group, row.score or 0.0)]

    def combine(self, means: Mapping[str, float]) -> dict[str, float]:
        """Compute the scores from the means of all cells: these, and before them the mean over them."""
        overall = {"overall": sum(means.values()) / len(means)}
        return overall if len(means) == 1 else overall | dict(means)

    def describe_rules(self) -> str:
        """Describe in a few words how the judge's replies become scores."""
        return f"{self.title}'s rules"

    def list_notes(self, rows: Sequence[Row]) -> list[str]:
        """List further sentences for the report."""
        return []

    def summarize(self, rows: Sequence[Row], judge_name: str) -> Summary:
        """Compute the scores of all rows.

        Raises:
            ValueError: when no picture could be scored.
        """
        means = compute_means([count for row in rows for count in self.count(row)])
        if not means:
            raise ValueError(f"no picture of {self.title} could be scored")
        samples = self.count_samples()
        each = f", {max(samples.values())} each" if max(samples.values()) > 1 else ""
        protocol = f"{self.describe_rules()}; {len(samples)} prompts of {getattr(self, 'file', self.name)}{each}"
        return Summary(self.combine(means), protocol, self.list_notes(rows))

    def count_samples(self) -> dict[str, int]:
        """Count the samples of each prompt."""
        samples: dict[str, int] = {}
        for target in self.targets:
            samples[target.item] = samples.get(target.item, 0) + len(target.samples)
        return samples

    def use_system(self, system: str) -> None:
        """Ask the judge with a system message, which the published script has."""
        self.manner = replace(self.manner or Manner(), system=system)

    def describe_questions(self) -> Any:
        """Describe, as plain data, all that is asked or looked for in the pictures, with its wording."""
        return None

    def get_published(self) -> Protocol | None:
        """Return how the published numbers of this benchmark were reached; None when there are none."""
        known = PROTOCOLS.get(self.name)
        if known is None and not self.published_protocol:
            return None
        # The settings of a script with a system message are known; those of others follow from the manner.
        settings = {}
        if self.published_manner is not None and (known is None or known.judge_settings == UNKNOWN):
            settings["judge_settings"] = self.published_manner.describe()
        given = {name: tuple(v) if isinstance(v, list) else v for name, v in (self.published_protocol or {}).items()}
        return replace(known or Protocol(), **(settings | given))

    def describe_protocol(self, rows: Sequence[Row], facts: JudgeFacts, drawn: Drawn) -> Protocol:
        """Describe how the scores of rows were reached.

        Args:
            rows: one for each picture.
            facts: who judged.
            drawn: how the pictures were drawn.
        """
        samples = self.count_samples()
        return Protocol(
            judge=facts.name,
            judge_weights=facts.weights,
            judge_settings=facts.settings,
            prompts=compute_data_digest({target.item: target.prompt for target in self.targets}),
            questions=compute_data_digest(self.describe_questions()),
            rules=self.describe_rules(),
            num_prompts=len(samples),
            samples=max(samples.values()),
            missing=sum(row.state == "missing" for row in rows),
            failed=sum(row.state == "failed" or bool(row.details.get("unanswered")) for row in rows),
            cut=drawn.cut,
            sampling=drawn.sampling,
        )

    def list_other_pictures(self) -> list[str]:
        """List the paths of those pictures of the tree that `write_other_files` writes."""
        return []

    def write_other_files(self, root: Path) -> None:
        """Write the files other than pictures that the benchmark's published scorer expects in the tree, if any."""
        return

    def check_judge(self, judge: Any) -> None:
        """Raise ValueError when the judge is of the wrong kind, or an option that judging needs isn't set."""
        kind = type(judge).__name__
        if self.needs == "detector" and not callable(judge):
            raise ValueError(f"{self.title} needs a detector, judge=template or judge=mask2former; got {kind}")
        if self.needs == "questions" and not hasattr(judge, "ask"):
            raise ValueError(f"this benchmark asks questions; {kind} only detects")
        if self.needs == "probabilities" and not hasattr(judge, "compute_probability"):
            raise ValueError(
                f"{self.title} needs a judge that tells probabilities, judge=qwen or judge=endpoint; got {kind}"
            )
        if self.needs == "text" and not (hasattr(judge, "read_lines") or hasattr(judge, "ask")):
            raise ValueError(f"{self.title} needs a judge that reads text, judge=ocr, qwen or endpoint; got {kind}")
        if self.questions_source and not getattr(self, "questions", None):
            raise ValueError(f"benchmark.questions is needed for scoring: {self.questions_source}")

    def prepare_judge(self, judge: Any) -> Any:
        """Return the judge, after a check, as it is asked in this benchmark's manner."""
        self.check_judge(judge)
        manner = self.manner
        if manner is not None and self.steady:
            manner = replace(manner, temperature=0)
        return use_manner(judge, manner)

    def build_sampling_options(self) -> dict[str, Any]:
        """Build the options that the pipeline draws the pictures with, all but seed and batch size."""
        options = {"num_inference_steps": self.num_inference_steps, "guidance_scale": self.guidance_scale}
        if self.image_guidance_scale is not None:
            options["image_guidance_scale"] = self.image_guidance_scale
        return options

    def judge_pictures(self, find_picture: Callable[[Target], Image.Image | None], judge: Any) -> Iterator[Row]:
        """Judge every picture.

        Args:
            find_picture: returns the picture of a target, or None where there is none; raises PictureError for one
                that can't be used, which counts as missing.
            judge: a detector or a judge, whichever `needs` names.
        """
        for target in self.targets:
            group, lacking = self.find_group(target), ABSENT
            try:
                picture = find_picture(target)
            except PictureError as error:
                picture, lacking = None, str(error)
            if picture is None:
                yield Row(target.path, group, target.prompt, "missing", None, lacking)
                continue
            try:
                verdict = self.judge_picture(target, picture, judge)
            except (JudgeError, ScoreError) as error:
                replies = {"replies": [hide_in_text(reply) for reply in getattr(error, "replies", ())]}
                yield Row(target.path, group, target.prompt, "failed", None, hide_in_text(str(error)), replies)
                continue
            yield Row(target.path, group, target.prompt, "scored", verdict.score, verdict.reason, dict(verdict.details))


def make_picture_finder(root: Path) -> Callable[[Target], Image.Image | None]:
    """Make a function that opens the picture of a target in a tree; None when it is absent.

    It raises PictureError for a picture that can't be decoded, and where only one with another ending lies there.
    """

    def find_picture(target: Target) -> Image.Image | None:
        path = root / target.path
        if path.exists() or path.is_symlink():
            return open_picture(path, target.path)
        for ending in ENDINGS:
            if path.with_suffix(ending).is_file():
                raise PictureError(f"{target.path} is wanted, and {path.with_suffix(ending).name} lies there")
        return None

    return find_picture


def list_extra_pictures(root: Path, benchmark: PictureBenchmark) -> list[str]:
    """List the pictures in a tree that the benchmark doesn't ask for, by their paths in it."""
    known = {target.path for target in benchmark.targets} | set(benchmark.list_other_pictures())
    found = [file.relative_to(root).as_posix() for file in root.rglob("*") if file.suffix in (".png", *ENDINGS)]
    return sorted(set(found) - known)


def list_edit_targets(edits: Mapping[str, tuple[str, Path]]) -> list[Target]:
    """List the targets `<key>.png`, as ImgEdit's scorer reads them.

    Args:
        edits: key -> instruction and source picture.
    """
    return [Target(f"{key}.png", key, instruction, (0,), (image,)) for key, (instruction, image) in edits.items()]
