"""DPG-Bench: dense prompts, questions that depend on one another, and how their answers become a score."""

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any, ClassVar, Literal

from PIL import Image

from tbac.evaluation.benchmarks.base import (
    Needs,
    PictureBenchmark,
    PictureVerdict,
    Row,
    Summary,
    list_count_difference,
    list_judge_difference,
)
from tbac.evaluation.benchmarks.folder import read_prompt_folder
from tbac.evaluation.judges.base import JudgeError, read_yes_or_no
from tbac.evaluation.picture_tree import Target

YES_OR_NO = "{question} Answer with yes or no."
Mode = Literal["official", "fixed"]


@dataclass(frozen=True)
class Question:
    """A proposition of a dense prompt.

    Attributes:
        number: within its prompt, from 1.
        text: asked of the picture; "yes" is right.
        parents: questions that must be right for this one to count.
        category: such as `entity - whole`; what stands before the dash is its broad category.
    """

    number: int
    text: str
    parents: tuple[int, ...] = ()
    category: str = ""


def read_dpg_questions(path: str | Path, mode: Mode = "fixed") -> dict[str, list[Question]]:
    """Questions of each prompt, by its `item_id`, from `dpg_bench.csv`.

    Args:
        path: the file.
        mode: `official` leaves out the first row of the file, as the official scorer does by mistake.

    Raises:
        ValueError: when the file, a column or a number isn't there.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"DPG-Bench's questions {path} don't exist")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    needed = {"item_id", "proposition_id", "dependency", "tuple", "question_natural_language"}
    absent = needed - set(rows[0] if rows else ())
    if absent:
        raise ValueError(f"{path} lacks the columns {', '.join(sorted(absent))}")
    questions: dict[str, list[Question]] = defaultdict(list)
    for line, row in enumerate(rows[1:] if mode == "official" else rows, start=3 if mode == "official" else 2):
        try:
            number = int(row["proposition_id"])
            parents = tuple(int(d) for d in row["dependency"].split(",") if int(d) != 0)
        except ValueError:
            raise ValueError(
                f"{path}:{line}: proposition_id and dependency must be whole numbers, got "
                f"{row['proposition_id']!r} and {row['dependency']!r}"
            ) from None
        category = row["tuple"].split("(")[0].strip()
        questions[row["item_id"]].append(Question(number, row["question_natural_language"], parents, category))
    return dict(questions)


def apply_dependencies(
    right: Mapping[int, bool], questions: Sequence[Question], mode: Mode = "fixed"
) -> dict[int, bool]:
    """Answers, of which those are wrong that depend on a wrong one.

    Args:
        right: number of a question -> whether it was answered "yes".
        questions: of this prompt.
        mode: `official` goes through the questions once in the order of the file, so a chain breaks where a question
            stands before the one it depends on; `fixed` follows chains whatever the order.

    Raises:
        KeyError: when a parent isn't among the questions, in `official`, whose scorer then drops the picture.
        ValueError: for the same, or questions that depend on each other in a circle, in `fixed`.
    """
    if mode == "official":
        left = dict(right)
        for question in questions:
            if any(not left[parent] for parent in question.parents):
                left[question.number] = False
        return left
    parents = {q.number: q.parents for q in questions}
    decided: dict[int, bool] = {}

    def holds(number: int, path: tuple[int, ...]) -> bool:
        if number in path:
            raise ValueError(f"questions {', '.join(map(str, (*path, number)))} depend on each other in a circle")
        if number not in parents:
            raise ValueError(f"question {path[-1]} depends on question {number}, which isn't there")
        if number not in decided:
            decided[number] = right[number] and all([holds(p, (*path, number)) for p in parents[number]])
        return decided[number]

    return {q.number: holds(q.number, ()) for q in questions}


@dataclass(frozen=True)
class DenseScore:
    """Result of DPG-Bench.

    Attributes:
        overall: mean over prompts of the mean over pictures of the share of right questions, in percent.
        categories: broad category -> share of right questions, in percent.
        prompts: number of prompts that count.
        dropped: prompts that the official scorer drops without a word.
        missing: prompts without any picture; they count as wrong in `fixed`, and not at all in `official`.
        mode: whose rules these are.
    """

    overall: float
    categories: Mapping[str, float]
    prompts: int
    dropped: Sequence[str]
    missing: Sequence[str]
    mode: Mode


def aggregate_dense(
    answers: Mapping[str, Sequence[Mapping[int, bool]]], questions: Mapping[str, Sequence[Question]], mode: Mode
) -> DenseScore:
    """Aggregate the answers.

    In `official`, categories count the last picture of each prompt alone, without dependencies. In `fixed` they count
    all pictures, with dependencies, as the overall score does.

    Args:
        answers: prompt -> for each of its pictures: number of a question -> whether the answer was "yes".
        questions: of all prompts, those without answers included.
        mode: `official` or `fixed`.

    Raises:
        ValueError: when there is nothing to aggregate.
    """
    scores: list[float] = []
    by_category: dict[str, list[bool]] = defaultdict(list)
    dropped, missing = [], []
    for item, asked in questions.items():
        pictures = answers.get(item, ())
        # A prompt without any picture is wrong in `fixed`, and as if it weren't there in `official`.
        if not pictures:
            missing.append(item)
            if mode == "fixed":
                scores.append(0.0)
                for question in asked:
                    by_category[question.category].append(False)
            continue
        # So is, in `official`, one whose questions depend on a question that isn't there.
        try:
            kept = [apply_dependencies(picture, asked, mode) for picture in pictures]
        except KeyError:
            dropped.append(item)
            continue
        scores.append(sum(sum(right.values()) / len(right) for right in kept) / len(kept))
        # Categories count other pictures than the score does, in `official`.
        counted = [pictures[-1]] if mode == "official" else kept
        for picture in counted:
            for question in asked:
                by_category[question.category].append(bool(picture[question.number]))
    if not scores:
        raise ValueError("no prompt of DPG-Bench has a picture that could be scored")
    # A broad category is what stands before the dash.
    broad: dict[str, list[bool]] = defaultdict(list)
    for category, results in by_category.items():
        broad[category.split("-")[0].strip()] += results
    categories = {name: 100 * sum(results) / len(results) for name, results in broad.items()}
    return DenseScore(100 * sum(scores) / len(scores), categories, len(scores), dropped, missing, mode)


@dataclass(kw_only=True, eq=False)
class DPG(PictureBenchmark):
    """1,065 dense prompts with dependent yes/no questions; four samples each in a grid.

    Attributes:
        file: folder of prompts, or a text file of them.
        questions: DPG-Bench's `dpg_bench.csv`; None where pictures are only made.
        mode: whose rules give `overall`: `official` keeps the quirks of the official scorer, `fixed` doesn't.
    """

    needs: ClassVar[Needs] = "questions"

    file: str
    questions: str | None = None
    mode: Mode = "fixed"
    title: str = "DPG-Bench"
    questions_by_mode: dict[Mode, dict[str, list[Question]]] = field(init=False, default_factory=dict)

    def read_files(self) -> None:
        """Read the prompts, and the questions by the rules of both modes."""
        if self.mode not in ("official", "fixed"):
            raise ValueError(f"benchmark.mode must be official or fixed, got {self.mode!r}")
        self.prompts = read_prompt_folder(self.file)
        if not self.questions:
            return
        self.questions_by_mode["official"] = read_dpg_questions(self.questions, "official")
        self.questions_by_mode["fixed"] = read_dpg_questions(self.questions, "fixed")
        absent = sorted(set(self.prompts) - set(self.questions_by_mode["fixed"]))
        if absent:
            raise ValueError(f"{self.questions} has no question about {len(absent)} prompts, such as {absent[0]}")

    def list_targets(self) -> list[Target]:
        """`<stem>.png`."""
        return list_dpg_targets(self.prompts)

    def check_judge(self, judge: Any) -> None:
        """Raise ValueError for a judge that can't be asked, or without questions."""
        super().check_judge(judge)
        if not self.questions:
            raise ValueError("benchmark.questions is needed for scoring: DPG-Bench's dpg_bench.csv")

    def judge_picture(self, target: Target, picture: Image.Image, judge: Any) -> PictureVerdict:
        """Ask every question about every quarter of the grid.

        A question without a usable reply fails the picture, but the others are still asked, so that a judge whose
        replies are kept has them when scoring goes on.
        """
        questions = self.questions_by_mode["fixed"][target.item]
        answers: list[dict[str, bool]] = []
        failure = ""
        for quarter in cut_quarters(picture):
            of_quarter: dict[str, bool] = {}
            for question in questions:
                try:
                    reply = judge.ask(YES_OR_NO.format(question=question.text), [quarter])
                except JudgeError as error:
                    failure = f"{question.text} {error}"
                    continue
                answer = read_yes_or_no(reply)
                if answer is None:
                    failure = f"{question.text} {reply}"
                else:
                    of_quarter[str(question.number)] = answer
            answers.append(of_quarter)
        if failure:
            raise JudgeError(failure)
        wrong = []
        for question in questions:
            if not all(of_quarter[str(question.number)] for of_quarter in answers):
                wrong.append(question.text)
        share = mean(mean(of_quarter.values()) for of_quarter in answers)
        return PictureVerdict(float(share), f"not in all: {', '.join(wrong)}", {"answers": answers})

    def summarize(self, rows: Sequence[Row], judge_name: str) -> Summary:
        """Scores of both modes; `overall` is that of `benchmark.mode`."""
        stems = {target.path: target.item for target in self.list_targets()}
        failed = {stems[row.picture] for row in rows if row.state == "failed"}
        answers = {stems[row.picture]: read_answers(row) for row in rows if row.state == "scored"}
        scores: dict[str, float] = {}
        notes: list[str] = []
        # The asked mode comes first, so that its `overall` leads the report; the other one stands beside it.
        for mode in (self.mode, "fixed" if self.mode == "official" else "official"):
            try:
                result = self._score_by_rules_of(mode, answers, failed)
            except ValueError as error:
                notes.append(f"No score by the {mode} rules: {error}")
                continue
            if mode == self.mode:
                scores |= {"overall": result.overall, **result.categories}
            else:
                scores |= {f"overall, {mode} rules": result.overall}
            if result.dropped:
                notes.append(f"The {mode} rules drop {len(result.dropped)} prompts without a word.")
        if not scores:
            raise ValueError(" ".join(notes))
        if failed:
            notes.append(f"{len(failed)} prompts without usable replies are in no mean.")
        # What differs from how published numbers were reached.
        differences = list_count_difference(len(self.prompts), 1065, "prompts")
        differences += list_judge_difference(judge_name, "mplug", "mPLUG-large")
        if self.mode == "fixed":
            differences.append("scored by the fixed rules; benchmark.mode=official keeps the official scorer's quirks")
        return Summary(scores, f"{len(self.prompts)} prompts of {self.file}, {self.mode} rules", differences, notes)

    def _score_by_rules_of(
        self, mode: Mode, answers: Mapping[str, Sequence[Mapping[int, bool]]], failed: set[str]
    ) -> DenseScore:
        """The score of the prompts that have usable replies, by the questions that this mode knows."""
        known = self.questions_by_mode[mode]
        questions = {item: known[item] for item in known if item in self.prompts and item not in failed}
        asked: dict[str, list[dict[int, bool]]] = {}
        for item, pictures in answers.items():
            if item in questions:
                numbers = [question.number for question in questions[item]]
                asked[item] = [{number: picture[number] for number in numbers} for picture in pictures]
        return aggregate_dense(asked, questions, mode)


def read_answers(row: Row) -> list[dict[int, bool]]:
    """The answers about each quarter of a scored picture: number of a question -> whether it was "yes"."""
    pictures = []
    for answers in row.details["answers"]:
        pictures.append({int(number): answer for number, answer in answers.items()})
    return pictures


def list_dpg_targets(prompts: Mapping[str, str]) -> list[Target]:
    """`<stem>.png`, four samples in a grid, as DPG-Bench's scorer cuts them apart.

    Args:
        prompts: stem of the prompt's file -> prompt.
    """
    return [Target(f"{stem}.png", stem, prompt, (0, 1, 2, 3)) for stem, prompt in prompts.items()]


def cut_quarters(grid: Image.Image) -> list[Image.Image]:
    """The four pictures of a grid, row by row."""
    width, height = grid.width // 2, grid.height // 2
    places = [(x, y) for y in (0, height) for x in (0, width)]
    return [grid.crop((x, y, x + width, y + height)) for x, y in places]
