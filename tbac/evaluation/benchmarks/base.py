"""What every benchmark shares: reading its files with clear errors, what scoring finds out about each picture, and what
a benchmark makes of all of it.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from omegaconf import DictConfig
from PIL import Image

from tbac.evaluation.picture_tree import Target, readable, sample_seed

YES_OR_NO = "{question} Answer with yes or no."
LINES = """Answer these questions about the picture, in this order. Write a line for each, which begins with yes or no.
{questions}"""


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
class SamplingOptions:
    """How a benchmark's pictures are made."""

    num_inference_steps: int = 30
    guidance_scale: float = 3.0
    image_guidance_scale: float = 1.5
    batch_size: int = 32
    seed: int = 42


def chunks(rows: Sequence[Any], size: int) -> Iterable[tuple[int, Sequence[Any]]]:
    return ((start, rows[start : start + size]) for start in range(0, len(rows), size))


def seeded(options: SamplingOptions, prompts: Sequence[str]) -> list[torch.Generator]:
    """One generator per picture, so that a picture doesn't depend on its batch."""
    return [torch.Generator().manual_seed(sample_seed(options.seed, prompt, 0)) for prompt in prompts]


@dataclass(frozen=True)
class Row:
    """One picture.

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


def missing(target: Target, group: str, root: Path) -> Row | None:
    """The row of a picture that isn't there or doesn't decode; None for one that does."""
    if readable(root / target.path):
        return None
    return Row(target.path, group, target.prompt, "missing", None, "the picture is missing")


@dataclass(frozen=True)
class Summary:
    """What a benchmark reports.

    Attributes:
        scores: name -> value; `overall` first.
        protocol: how they were reached.
        comparable: whether published numbers were reached the same way; "" then, else why not.
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


class Benchmark(Protocol):
    """A benchmark: which pictures it wants, how they are judged, and what its scores are.

    Attributes:
        title: what it is called.
        judged: whether it has scores at all.
    """

    title: str
    judged: bool

    def __init__(self, cfg: DictConfig, samples: int) -> None:
        """Read the files that the benchmark's config names; `samples` of each prompt where their number is free."""
        ...

    def targets(self) -> list[Target]:
        """Every picture."""
        ...

    def write_beside(self, root: Path) -> None:
        """Files of the tree besides pictures."""
        ...

    def check_judge(self, judge: Any) -> None:
        """Raise ValueError where the judge is of the wrong kind, or something that judging needs isn't given."""
        ...

    def rows(self, root: Path, judge: Any) -> Iterator[Row]:
        """Judge every picture of a tree."""
        ...

    def summary(self, rows: Sequence[Row], judge_name: str) -> Summary:
        """Scores of all rows."""
        ...


def opened(path: Path) -> Image.Image:
    """A picture of a tree, decoded."""
    with Image.open(path) as image:
        return image.convert("RGB")


def count_difference(found: int, published: int, what: str) -> list[str]:
    """Why a number of items isn't that of the published benchmark."""
    return [] if found == published else [f"{found} {what} instead of {published}"]


class NothingBeside:
    def write_beside(self, root: Path) -> None:
        """Nothing but pictures belongs to the tree."""


class Asked(NothingBeside):
    """A benchmark whose pictures are judged by questions."""

    judged = True

    def check_judge(self, judge: Any) -> None:
        """Raise ValueError for a judge that can't be asked."""
        if not hasattr(judge, "ask"):
            raise ValueError(f"this benchmark asks questions; {type(judge).__name__} only detects")
