"""TIIF-Bench: pairs of a short and a long prompt, with yes/no questions about their pictures."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
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
    list_judge_difference,
    read_rows,
)
from tbac.evaluation.judges.base import JudgeError, read_yes_or_no_lines
from tbac.evaluation.picture_tree import Target
from tbac.files import expand_path, shorten

LINES = """Answer these questions about the picture, in this order. Write a line for each, which begins with yes or no.
{questions}"""
LENGTHS = ("short", "long")
REASONINGS = ("numeracy", "comparison", "differentiation", "negation")

# Sub-attributes by level, each with the types that it is the mean of (TIIF-Bench's summary_dimension_results.py).
GROUPS: dict[str, dict[str, tuple[str, ...]]] = {
    "basic": {
        "attribute": ("shape+color", "color+texture", "texture+color", "shape+texture"),
        "relation": ("2d_spatial_relation", "3d_spatial_relation", "action+2d", "action+3d"),
        "reasoning": ("numeracy", "negation", "differentiation", "comparison"),
    },
    "advanced": {
        "attribute+relation": (
            "action+color", "action+texture", "color+2d", "color+3d",
            "shape+2d", "shape+3d", "texture+2d", "texture+3d",
        ),
        "attribute+reasoning": tuple(f"{r}+{a}" for r in REASONINGS for a in ("color", "texture")),
        "relation+reasoning": tuple(f"{r}+{d}" for r in REASONINGS for d in ("2d", "3d")),
        "text": ("text",),
        "style": ("style",),
    },
    "real_world": {"complex": ("real_world",)},
}  # fmt: skip
TYPES = {kind for subs in GROUPS.values() for kinds in subs.values() for kind in kinds}


@dataclass(frozen=True)
class Pair:
    """A short and a long prompt of the same content.

    Attributes:
        kind: type of the pair, such as `2d_spatial_relation`.
        row: number of its line in the file of that type, from 0, which also names its pictures.
        prompts: length -> prompt.
        questions: about the pictures of both prompts.
        answers: whether the right answer to each question is yes.
    """

    kind: str
    row: int
    prompts: Mapping[str, str]
    questions: Sequence[str] = ()
    answers: Sequence[bool] = ()


def read_pairs(prompts: str | Path, questions: str | Path | None = None) -> list[Pair]:
    """Read the pairs in the order of files and lines.

    Args:
        prompts: folder of `*.jsonl` with `type`, `short_description`, `long_description`.
        questions: folder of `*.jsonl` that have `yn_question_list` and `yn_answer_list` as well, in the same order;
            None when nothing will be scored.

    Raises:
        BenchmarkFileError: when a file has the wrong form, or a type isn't one of TIIF-Bench's.
    """
    # A prompt and its questions lie in two files, and belong together by their type and their place in it.
    rows = _read_rows_by_type(prompts, {"type": str, "short_description": str, "long_description": str})
    asked = (
        _read_rows_by_type(questions, {"type": str, "yn_question_list": list, "yn_answer_list": list})
        if questions
        else {}
    )
    pairs = []
    for kind, rows_of_kind in rows.items():
        if questions and len(asked.get(kind, ())) != len(rows_of_kind):
            raise BenchmarkFileError(
                f"{questions} has questions for {len(asked.get(kind, ()))} prompts of type {kind!r}, {prompts} has "
                f"{len(rows_of_kind)} such prompts"
            )
        for number, row in enumerate(rows_of_kind):
            question = asked[kind][number] if questions else {"yn_question_list": [], "yn_answer_list": []}
            texts = question["yn_question_list"]
            # Some files say "Yes" and some "yes"; anything else would silently count as no.
            answers = [shorten(answer).strip().lower() for answer in question["yn_answer_list"]]
            place = f"{questions}: type {kind!r}, row {number}"
            if len(texts) != len(answers) or not set(answers) <= {"yes", "no"}:
                raise BenchmarkFileError(f"{place}: yn_answer_list must hold yes or no for each question")
            if questions and not (texts and all(isinstance(text, str) and text.strip() for text in texts)):
                raise BenchmarkFileError(f"{place}: yn_question_list must hold questions, got {shorten(texts)}")
            described = {length: row[f"{length}_description"] for length in LENGTHS}
            pairs.append(Pair(kind, number, described, texts, [answer == "yes" for answer in answers]))
    return pairs


def _read_rows_by_type(folder: str | Path, required: Mapping[str, type]) -> dict[str, list[dict]]:
    folder = expand_path(folder, "benchmark.file")
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise BenchmarkFileError(f"TIIF-Bench's folder {folder} has no *.jsonl file")
    rows: dict[str, list[dict]] = defaultdict(list)
    for file in files:
        for row in read_rows(file, required, _describe_unknown_type):
            rows[row["type"]].append(row)
    return rows


def _describe_unknown_type(row: Mapping[str, str]) -> str:
    """Describe what is wrong with the type of a row; "" when nothing is."""
    return "" if row["type"] in TYPES else f"unknown type {shorten(row['type'])!r}"


def name_picture(pair: Pair, length: str, model_name: str) -> str:
    """Name a picture: `<type>/<model>/{short,long}_description/<row>.png`."""
    return f"{pair.kind}/{model_name}/{length}_description/{pair.row}.png"


def list_tiif_targets(pairs: Sequence[Pair], model_name: str) -> list[Target]:
    """List both pictures of every pair."""
    paths = [(name_picture(pair, length, model_name), pair.prompts[length]) for pair in pairs for length in LENGTHS]
    return [Target(path, path, prompt) for path, prompt in paths]


def average_tiif(by_type: Mapping[str, float]) -> dict[str, float]:
    """Compute the averages for one prompt length.

    A sub-attribute is the mean of its types. `basic` and `advanced` are means of all their types, so that `text` and
    `style` each weigh as much as one type. `overall` is the mean of the nine sub-attributes. A mean leaves out the
    types that aren't given.

    Args:
        by_type: type -> share of right answers.

    Raises:
        ValueError: for no type, or one that isn't TIIF-Bench's.
    """
    unknown = sorted(set(by_type) - TYPES)
    if unknown or not by_type:
        raise ValueError(f"types of TIIF-Bench are needed, got {', '.join(unknown) or 'none'}")
    levels, subs = {}, {}
    for level, groups in GROUPS.items():
        # A level weighs its types alike, so it isn't the mean of its sub-attributes.
        level_shares: list[float] = []
        for name, kinds in groups.items():
            shares = [by_type[kind] for kind in kinds if kind in by_type]
            level_shares += shares
            if shares:
                subs[name] = mean(shares)
        if level_shares:
            levels[level] = mean(level_shares)
    return {"overall": mean(subs.values()), **levels, **subs}


@dataclass(kw_only=True, eq=False)
class TIIF(PictureBenchmark):
    """Pairs of a short and a long prompt with yes/no questions.

    Attributes:
        file: folder of test prompts.
        questions: folder of eval prompts; None when pictures are only drawn.
        model_name: name of the folder of the pictures within each type.
        published: how many pairs published numbers are averages of.
    """

    needs: ClassVar[Needs] = "questions"
    questions_source: ClassVar[str] = "TIIF-Bench's folder of eval prompts"

    file: str
    questions: str | None = None
    model_name: str = "tbac"
    published: int = 2538
    title: str = "TIIF-Bench"

    def read_files(self) -> None:
        """Read the pairs, and note which of them each picture belongs to."""
        self.pairs = read_pairs(self.file, self.questions)
        self.pair_of: dict[str, Pair] = {}
        for pair in self.pairs:
            for length in LENGTHS:
                self.pair_of[name_picture(pair, length, self.model_name)] = pair

    def list_targets(self) -> list[Target]:
        """List the targets `<type>/<model>/{short,long}_description/<row>.png`."""
        return list_tiif_targets(self.pairs, self.model_name)

    def find_group(self, target: Target) -> str:
        """Find the type of its pair."""
        return self.pair_of[target.path].kind

    def judge_picture(self, target: Target, picture: Image.Image, judge: Any) -> PictureVerdict:
        """Ask all questions about a picture at once, as TIIF-Bench asks them."""
        pair = self.pair_of[target.path]
        texts = "\n".join(text.strip() for text in pair.questions)
        reply = judge.ask(LINES.format(questions=texts), [picture])
        answers = read_yes_or_no_lines(reply, len(pair.questions))
        if answers is None:
            raise JudgeError(f"{len(pair.questions)} questions were answered with: {reply}")
        right = [given == expected for given, expected in zip(answers, pair.answers, strict=True)]
        wrong = [question for question, is_right in zip(pair.questions, right, strict=True) if not is_right]
        return PictureVerdict(float(mean(right)), ", ".join(wrong), {"right": sum(right), "asked": len(right)})

    def summarize(self, rows: Sequence[Row], judge_name: str) -> Summary:
        """Average over both lengths; a missing picture has no right answer, and a failed one isn't counted."""
        scores: dict[str, float] = {}
        for length in LENGTHS:
            # Questions of a type count alike, whichever picture they are about.
            right: dict[str, int] = defaultdict(int)
            asked: dict[str, int] = defaultdict(int)
            for row in rows:
                pair = self.pair_of[row.picture]
                if row.picture != name_picture(pair, length, self.model_name) or row.state == "failed":
                    continue
                right[pair.kind] += row.details.get("right", 0)
                asked[pair.kind] += len(pair.questions)
            by_type = {kind: 100 * right[kind] / asked[kind] for kind in asked}
            if by_type:
                scores |= {f"{name}, {length}": value for name, value in average_tiif(by_type).items()}
        if not scores:
            raise ValueError("no picture of TIIF-Bench could be scored")
        overall = [scores[f"overall, {length}"] for length in LENGTHS if f"overall, {length}" in scores]
        # Whoever compares with published numbers has to know what was done in another way.
        differences = list_count_difference(len(self.pairs), self.published, "pairs")
        absent = [name for groups in GROUPS.values() for name in groups if f"{name}, short" not in scores]
        if absent:
            differences.append(f"nothing of {', '.join(absent)}")
        differences += list_judge_difference(judge_name, "gpt-4", "GPT-4o")
        return Summary({"overall": mean(overall), **scores}, f"{len(self.pairs)} pairs of {self.file}", differences)
