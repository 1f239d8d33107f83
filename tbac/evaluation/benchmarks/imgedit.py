"""ImgEdit: edits of nine kinds, which a judge rates; scores are averages by kind."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from tbac.evaluation.benchmarks.base import Needs, PictureBenchmark, list_edit_targets
from tbac.evaluation.benchmarks.files import BenchmarkFileError, check_fields, locate_picture
from tbac.evaluation.benchmarks.rows import Count, PictureVerdict, Row, Summary
from tbac.evaluation.judges.base import Asked, Manner, ask_until_usable
from tbac.evaluation.picture_tree import Target
from tbac.files import expand_path, read_json, shorten
from tbac.pictures import open_picture

PLACEHOLDER = "<edit_prompt>"  # marks the place of the instruction in the judge's prompts
BEST = 5  # the best rating


def read_score(reply: str) -> float | None:
    """Read the mean of the ratings in a reply, rounded to two decimals; None when there are none.

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
        by_kind: kind -> mean, rounded to two decimals.
        scored: number of edits with a score.
        unscored: keys of edits without a reply, or with one that holds no rating; no mean counts them.
    """

    macro: float
    micro: float
    by_kind: Mapping[str, float]
    scored: int
    unscored: Sequence[str]


def aggregate_edits(replies: Mapping[str, str | None], kinds: Mapping[str, str]) -> EditScores:
    """Compute ImgEdit's scores from the judge's replies.

    Args:
        replies: key of an edit -> what the judge said, or None when it failed.
        kinds: key -> kind, of every edit of the benchmark.

    Raises:
        ValueError: for a reply to an unknown edit, or when no reply holds a rating.
    """
    # A reply to another benchmark's edit means that files were mixed up.
    unknown = sorted(replies.keys() - kinds.keys())
    if unknown:
        raise ValueError(f"replies to edits that the benchmark doesn't have: {', '.join(unknown[:5])}")
    # The official scorer ignores edits without a rating, and a report has to say how many there were.
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
    # Kinds are rounded before they are averaged, as published numbers are.
    means = {kind: round(sum(scores) / len(scores), 2) for kind, scores in by_kind.items()}
    macro = sum(means.values()) / len(means)
    all_scores = [score for scores in by_kind.values() for score in scores]
    micro = sum(all_scores) / len(all_scores)
    return EditScores(macro, micro, means, len(all_scores), unscored)


@dataclass(frozen=True)
class EditItem:
    """An edit of ImgEdit: its kind, the instruction, and the picture that it changes."""

    kind: str
    instruction: str
    image: Path


def read_imgedit(path: str | Path, images: str | Path) -> dict[str, EditItem]:
    """Read ImgEdit's single-turn file; returns key -> edit.

    Args:
        path: JSON: key -> `id` (the picture, relative to `images`), `prompt`, `edit_type`.
        images: folder of the source pictures.

    Raises:
        BenchmarkFileError: when a field or a picture is missing; the message names file, key and field.
    """
    rows = _read_object(path)
    folder = expand_path(images, "benchmark.images")
    items = {}
    for key, row in rows.items():
        place = f"{path}: edit {shorten(key)!r}"
        check_fields(row, {"id": str, "prompt": str, "edit_type": str}, place)
        items[key] = EditItem(row["edit_type"], row["prompt"], locate_picture(folder, row["id"], place))
    return items


def read_judge_prompts(path: str | Path, kinds: set[str]) -> dict[str, str]:
    """Read the judge's prompts; returns kind -> prompt, in which `<edit_prompt>` marks the place of the instruction.

    Raises:
        BenchmarkFileError: when one of `kinds` has no prompt, or a prompt doesn't have the placeholder.
    """
    prompts = _read_object(path)
    for kind in sorted(kinds):
        if not isinstance(prompts.get(kind), str) or PLACEHOLDER not in prompts[kind]:
            raise BenchmarkFileError(f"{path} needs a prompt with {PLACEHOLDER} for edits of kind {kind!r}")
    return prompts


def _read_object(path: str | Path) -> dict:
    """Read a JSON file that holds an object with at least one entry."""
    file = expand_path(path, "benchmark.file")
    if not file.exists():
        raise BenchmarkFileError(f"benchmark file {file} doesn't exist")
    rows: dict = read_json(file, kind=dict)
    if not rows:
        raise BenchmarkFileError(f"{file} must hold a mapping with at least one entry")
    return rows


@dataclass(kw_only=True, eq=False)
class ImgEdit(PictureBenchmark):
    """737 edits of nine kinds, rated by a judge from 1 to 5.

    Attributes:
        file: ImgEdit's `basic_edit.json`.
        images: folder that the `id` of each edit is relative to.
        questions: ImgEdit's `prompts.json`; None when pictures are only drawn.
    """

    needs: ClassVar[Needs] = "questions"
    questions_source: ClassVar[str] = "ImgEdit's prompts.json"
    published_manner: ClassVar[Manner | None] = Manner()

    file: str
    images: str
    questions: str | None = None
    image_guidance_scale: float | None = 1.5
    title: str = "ImgEdit"

    def read_files(self) -> None:
        """Read the edits, and the judge's prompt for each kind."""
        self.edits = read_imgedit(self.file, self.images)
        kinds = {edit.kind for edit in self.edits.values()}
        self.judge_prompts = read_judge_prompts(self.questions, kinds) if self.questions else {}

    def list_targets(self) -> list[Target]:
        """List the targets `<key>.png`."""
        return list_edit_targets({key: (edit.instruction, edit.image) for key, edit in self.edits.items()})

    def find_group(self, target: Target) -> str:
        """Find the kind of edit."""
        return self.edits[target.item].kind

    def judge_picture(self, target: Target, picture: Image.Image, judge: Any) -> PictureVerdict:
        """Ask the judge to rate the edit; it sees the source and the edited picture."""
        edit = self.edits[target.item]
        text = self.judge_prompts[edit.kind].replace(PLACEHOLDER, edit.instruction)
        asked = Asked([text], [open_picture(edit.image), picture], self.tries)

        def read(reply: str) -> float | None:
            # A mean above the best rating can't come from ratings alone; the published script would count it.
            score = read_score(reply)
            return None if score is None or score > BEST else score

        score, reply = ask_until_usable(judge, asked, read)
        return PictureVerdict(score / BEST, reply, {"reply": reply})

    def summarize(self, rows: Sequence[Row], judge_name: str) -> Summary:
        """Compute the means over kinds, over edits and by kind; like the official scorer, none counts unrated edits."""
        items = {target.path: target.item for target in self.targets}
        replies = {items[row.picture]: row.details.get("reply") if row.state == "scored" else None for row in rows}
        result = aggregate_edits(replies, {item: self.edits[item].kind for item in items.values()})
        notes = []
        if result.unscored:
            notes.append(f"{len(result.unscored)} edits without a rating are in no mean, as in the published script.")
        scores = {"overall": result.macro, "mean over edits": result.micro, **result.by_kind}
        return Summary(scores, f"{len(items)} edits of {self.file}", notes)

    def count(self, row: Row) -> list[Count]:
        """Count the rating for its kind and for the mean over edits; an edit without one isn't counted."""
        score = read_score(row.details["reply"]) if row.state == "scored" else None
        return [] if score is None else [Count(row.group, score), Count("mean over edits", score)]

    def combine(self, means: Mapping[str, float]) -> dict[str, float]:
        """Round the means of kinds, and average them."""
        by_kind = {kind: round(value, 2) for kind, value in means.items() if kind != "mean over edits"}
        overall = sum(by_kind.values()) / len(by_kind)
        return {"overall": overall, "mean over edits": means["mean over edits"], **by_kind}

    def describe_questions(self) -> Any:
        """Return the judge's prompts, and the kind of each edit."""
        return [self.judge_prompts, [edit.kind for edit in self.edits.values()]]
