"""ImgEdit: edits of nine kinds, and from a judge's replies to scores by kind."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from tbac.evaluation.benchmarks.base import (
    BenchmarkFileError,
    Needs,
    PictureBenchmark,
    PictureVerdict,
    Row,
    Summary,
    list_count_difference,
    list_edit_targets,
    list_judge_difference,
    open_picture,
)
from tbac.evaluation.judges.base import JudgeError
from tbac.evaluation.picture_tree import Target

PLACEHOLDER = "<edit_prompt>"  # in the judge's prompts: where the instruction stands
NUM_KINDS = 9  # of the published macro mean


def read_score(reply: str) -> float | None:
    """Mean of the ratings in a reply, to two decimals; None when it holds none.

    A rating is a line `<name>: <whole number>` with exactly one colon and space, as the official scorer reads it.
    """
    ratings = []
    for line in reply.splitlines():
        parts = line.strip().split(": ")
        if len(parts) == 2 and parts[1].isdecimal():
            ratings.append(int(parts[1]))
    return round(sum(ratings) / len(ratings), 2) if ratings else None


@dataclass(frozen=True)
class EditScores:
    """Result of ImgEdit.

    Attributes:
        macro: mean over kinds, each rounded to two decimals: the published number.
        micro: mean over edits.
        by_kind: kind -> mean, to two decimals.
        scored: edits with a score.
        unscored: edits without a reply, or with one that holds no rating; they are in no mean.
    """

    macro: float
    micro: float
    by_kind: Mapping[str, float]
    scored: int
    unscored: Sequence[str]

    @property
    def comparable(self) -> bool:
        """Whether every edit was scored and every kind is there, as for published numbers."""
        return not self.unscored and len(self.by_kind) == NUM_KINDS


def aggregate_edits(replies: Mapping[str, str | None], kinds: Mapping[str, str]) -> EditScores:
    """Aggregate replies.

    Args:
        replies: key of an edit -> what the judge said, or None when it failed.
        kinds: key -> kind, of every edit of the benchmark.

    Raises:
        ValueError: for a reply to an unknown edit, or when none has a score.
    """
    unknown = sorted(replies.keys() - kinds.keys())
    if unknown:
        raise ValueError(f"replies to edits that the benchmark doesn't have: {', '.join(unknown[:5])}")
    by_kind: dict[str, list[float]] = defaultdict(list)
    unscored = []
    for key, kind in kinds.items():
        reply = replies.get(key)
        score = None if reply is None else read_score(reply)
        if score is None:
            unscored.append(key)
        else:
            by_kind[kind].append(score)
    if not by_kind:
        raise ValueError("no reply of the judge holds a rating")
    means = {kind: round(sum(scores) / len(scores), 2) for kind, scores in by_kind.items()}
    every = [score for scores in by_kind.values() for score in scores]
    return EditScores(sum(means.values()) / len(means), sum(every) / len(every), means, len(every), unscored)


@dataclass(frozen=True)
class EditItem:
    """An edit of ImgEdit: its kind, the instruction, and the picture that it changes."""

    kind: str
    instruction: str
    image: Path


def read_imgedit(path: str | Path, images: str | Path) -> dict[str, EditItem]:
    """Edits by key, from ImgEdit's single-turn file.

    Args:
        path: JSON: key -> `id` (the picture, relative to `images`), `prompt`, `edit_type`.
        images: folder of the source pictures.

    Raises:
        BenchmarkFileError: naming file, key and field, or a picture that isn't there.
    """
    rows = _read_object(path)
    items = {}
    for key, row in rows.items():
        for name in ("id", "prompt", "edit_type"):
            if not isinstance(row, dict) or not isinstance(row.get(name), str):
                raise BenchmarkFileError(f"{path}: edit {key!r} needs {name!r} as str")
        items[key] = EditItem(row["edit_type"], row["prompt"], Path(images).expanduser() / row["id"])
    if absent := [item.image for item in items.values() if not item.image.is_file()]:
        raise BenchmarkFileError(f"{len(absent)} pictures of {path} aren't there, such as {absent[0]}")
    return items


def read_judge_prompts(path: str | Path, kinds: set[str]) -> dict[str, str]:
    """Kind -> what the judge is told, with `<edit_prompt>` for the instruction.

    Raises:
        BenchmarkFileError: when one of `kinds` has none, or one without the placeholder.
    """
    prompts = _read_object(path)
    for kind in sorted(kinds):
        if not isinstance(prompts.get(kind), str) or PLACEHOLDER not in prompts[kind]:
            raise BenchmarkFileError(f"{path} needs a prompt with {PLACEHOLDER} for edits of kind {kind!r}")
    return prompts


def _read_object(path: str | Path) -> dict:
    file = Path(path).expanduser()
    if not file.is_file():
        raise BenchmarkFileError(f"benchmark file {file} doesn't exist")
    try:
        rows = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BenchmarkFileError(f"{file} isn't JSON ({error})") from None
    if not isinstance(rows, dict) or not rows:
        raise BenchmarkFileError(f"{file} must hold a JSON object with at least one entry")
    return rows


@dataclass(kw_only=True, eq=False)
class ImgEdit(PictureBenchmark):
    """737 edits of nine kinds, rated by a judge from 1 to 5.

    Attributes:
        file: ImgEdit's `basic_edit.json`.
        images: folder that its `id` is relative to.
        questions: its `prompts.json`; None where pictures are only made.
    """

    needs: ClassVar[Needs] = "questions"

    file: str
    images: str
    questions: str | None = None
    image_guidance_scale: float | None = 1.5
    title: str = "ImgEdit"

    def read_files(self) -> None:
        """Read the edits, and what the judge is told about each kind."""
        self.edits = read_imgedit(self.file, self.images)
        kinds = {edit.kind for edit in self.edits.values()}
        self.judge_prompts = read_judge_prompts(self.questions, kinds) if self.questions else {}

    def list_targets(self) -> list[Target]:
        """`<key>.png`."""
        return list_edit_targets({key: (edit.instruction, edit.image) for key, edit in self.edits.items()})

    def find_group(self, target: Target) -> str:
        """The kind of edit."""
        return self.edits[target.item].kind

    def check_judge(self, judge: Any) -> None:
        """Raise ValueError for a judge that can't be asked, or without its prompts."""
        super().check_judge(judge)
        if not self.judge_prompts:
            raise ValueError("benchmark.questions is needed for scoring: ImgEdit's prompts.json")

    def judge_picture(self, target: Target, picture: Image.Image, judge: Any) -> PictureVerdict:
        """The judge sees the source and the edited picture."""
        edit = self.edits[target.item]
        text = self.judge_prompts[edit.kind].replace(PLACEHOLDER, edit.instruction)
        reply = judge.ask(text, [open_picture(edit.image), picture])
        score = read_score(reply)
        if score is None:
            raise JudgeError(f"no rating in: {reply}")
        return PictureVerdict(score / 5, reply, {"reply": reply})

    def summarize(self, rows: Sequence[Row], judge_name: str) -> Summary:
        """Macro and micro mean and kinds; edits without a rating are in no mean, as in the official scorer."""
        items = {target.path: target.item for target in self.list_targets()}
        replies = {items[row.picture]: row.details.get("reply") for row in rows}
        result = aggregate_edits(replies, {key: edit.kind for key, edit in self.edits.items()})
        differences = list_count_difference(len(self.edits), 737, "edits")
        differences += list_count_difference(len(result.by_kind), NUM_KINDS, "kinds")
        if result.unscored:
            differences.append(f"{len(result.unscored)} edits without a rating, which are in no mean")
        differences += list_judge_difference(judge_name, "gpt-4", "GPT-4o")
        scores = {"overall": result.macro, "mean over edits": result.micro, **result.by_kind}
        return Summary(scores, f"{len(self.edits)} edits of {self.file}", differences)
