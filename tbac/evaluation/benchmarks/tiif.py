"""TIIF-Bench: pairs of a short and a long prompt, yes/no questions, and its averages."""

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
        kind: its type, such as `2d_spatial_relation`.
        row: its line in the file of that type, from 0: the name of its pictures.
        prompts: length -> prompt.
        questions: that both pictures are asked.
        answers: the right ones.
    """

    kind: str
    row: int
    prompts: Mapping[str, str]
    questions: Sequence[str] = ()
    answers: Sequence[bool] = ()


def read_pairs(prompts: str | Path, questions: str | Path | None = None) -> list[Pair]:
    """Pairs in the order of files and lines.

    Args:
        prompts: folder of `*.jsonl` with `type`, `short_description`, `long_description`.
        questions: folder of `*.jsonl` that have `yn_question_list` and `yn_answer_list` as well, in the same order;
            None where nothing is to be scored.

    Raises:
        BenchmarkFileError: naming file, line and field, or a type that isn't TIIF-Bench's.
    """
    rows = _read_rows_by_type(prompts, {"type": str, "short_description": str, "long_description": str})
    asked = (
        _read_rows_by_type(questions, {"type": str, "yn_question_list": list, "yn_answer_list": list})
        if questions
        else {}
    )
    pairs = []
    for kind, own in rows.items():
        if questions and len(asked.get(kind, ())) != len(own):
            raise BenchmarkFileError(
                f"{questions} has questions for {len(asked.get(kind, ()))} prompts of type {kind!r}, {prompts} has "
                f"{len(own)} such prompts"
            )
        for number, row in enumerate(own):
            question = asked[kind][number] if questions else {"yn_question_list": [], "yn_answer_list": []}
            texts, answers = question["yn_question_list"], question["yn_answer_list"]
            said = [str(answer).strip().lower() for answer in answers]
            if len(texts) != len(said) or not set(said) <= {"yes", "no"}:
                raise BenchmarkFileError(
                    f"{questions}: type {kind!r}, row {number}: yn_answer_list must hold yes or no for each question"
                )
            described = {length: row[f"{length}_description"] for length in LENGTHS}
            pairs.append(Pair(kind, number, described, texts, [answer == "yes" for answer in said]))
    return pairs


def _read_rows_by_type(folder: str | Path, required: Mapping[str, type]) -> dict[str, list[dict]]:
    folder = Path(folder).expanduser()
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise BenchmarkFileError(f"TIIF-Bench's folder {folder} has no *.jsonl file")
    rows: dict[str, list[dict]] = defaultdict(list)
    for file in files:
        for row in read_rows(
            file, required, lambda row: "" if row["type"] in TYPES else f"unknown type {row['type']!r}"
        ):
            rows[row["type"]].append(row)
    return rows


def name_picture(pair: Pair, length: str, model_name: str) -> str:
    """`<type>/<model>/{short,long}_description/<row>.png`."""
    return f"{pair.kind}/{model_name}/{length}_description/{pair.row}.png"


def list_tiif_targets(pairs: Sequence[Pair], model_name: str) -> list[Target]:
    """Every picture of every pair."""
    paths = [(name_picture(pair, length, model_name), pair.prompts[length]) for pair in pairs for length in LENGTHS]
    return [Target(path, path, prompt) for path, prompt in paths]


def average_tiif(by_type: Mapping[str, float]) -> dict[str, float]:
    """Averages of one prompt length.

    A sub-attribute is the mean of its types. `basic` and `advanced` are means of all their types, so that `text` and
    `style` weigh as one type each; `overall` is the mean of the nine sub-attributes. What has no type here is left out.

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
        own = [by_type[kind] for kinds in groups.values() for kind in kinds if kind in by_type]
        if own:
            levels[level] = mean(own)
        for name, kinds in groups.items():
            if found := [by_type[kind] for kind in kinds if kind in by_type]:
                subs[name] = mean(found)
    return {"overall": mean(subs.values()), **levels, **subs}


@dataclass(kw_only=True, eq=False)
class TIIF(PictureBenchmark):
    """Pairs of a short and a long prompt with yes/no questions.

    Attributes:
        file: folder of test prompts.
        questions: folder of eval prompts; None where pictures are only made.
        model_name: folder of the pictures within each type.
        published: pairs that published numbers are of.
    """

    needs: ClassVar[Needs] = "questions"

    file: str
    questions: str | None = None
    model_name: str = "tbac"
    published: int = 2538
    title: str = "TIIF-Bench"

    def read_files(self) -> None:
        """Read the pairs; each picture belongs to one of them."""
        self.pairs = read_pairs(self.file, self.questions)
        self.pair_of: dict[str, Pair] = {}
        for pair in self.pairs:
            for length in LENGTHS:
                self.pair_of[name_picture(pair, length, self.model_name)] = pair

    def list_targets(self) -> list[Target]:
        """`<type>/<model>/{short,long}_description/<row>.png`."""
        return list_tiif_targets(self.pairs, self.model_name)

    def find_group(self, target: Target) -> str:
        """The type of its pair."""
        return self.pair_of[target.path].kind

    def check_judge(self, judge: Any) -> None:
        """Raise ValueError for a judge that can't be asked, or without questions."""
        super().check_judge(judge)
        if not self.questions:
            raise ValueError("benchmark.questions is needed for scoring: TIIF-Bench's folder of eval prompts")

    def judge_picture(self, target: Target, picture: Image.Image, judge: Any) -> PictureVerdict:
        """Ask all questions about a picture at once, as TIIF-Bench asks them."""
        pair = self.pair_of[target.path]
        texts = "\n".join(text.strip() for text in pair.questions)
        reply = judge.ask(LINES.format(questions=texts), [picture])
        answers = read_yes_or_no_lines(reply, len(pair.questions))
        if answers is None:
            raise JudgeError(f"{len(pair.questions)} questions were answered with: {reply}")
        right = [a == b for a, b in zip(answers, pair.answers, strict=True)]
        wrong = ", ".join(q for q, ok in zip(pair.questions, right, strict=True) if not ok)
        return PictureVerdict(float(mean(right)), wrong, {"right": sum(right), "asked": len(right)})

    def summarize(self, rows: Sequence[Row], judge_name: str) -> Summary:
        """Averages of both lengths; a missing picture answers nothing right, a failed one isn't counted."""
        scores: dict[str, float] = {}
        for length in LENGTHS:
            # Right answers out of all that were asked, by type.
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
        # What differs from how published numbers were reached.
        differences = list_count_difference(len(self.pairs), self.published, "pairs")
        absent = [name for groups in GROUPS.values() for name in groups if f"{name}, short" not in scores]
        if absent:
            differences.append(f"nothing of {', '.join(absent)}")
        differences += list_judge_difference(judge_name, "gpt-4", "GPT-4o")
        return Summary({"overall": mean(overall), **scores}, f"{len(self.pairs)} pairs of {self.file}", differences)
