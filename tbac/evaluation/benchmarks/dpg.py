"""DPG-Bench: dense prompts, with yes/no questions that depend on one another."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any, ClassVar, Literal

from PIL import Image

from tbac.evaluation.benchmarks.base import Needs, PictureBenchmark
from tbac.evaluation.benchmarks.files import BenchmarkFileError, check_fields
from tbac.evaluation.benchmarks.folder import read_prompt_folder
from tbac.evaluation.benchmarks.rows import Count, PictureVerdict, Row, Summary
from tbac.evaluation.judges.base import Asked, JudgeError, ask_until_usable, read_yes_or_no
from tbac.evaluation.picture_tree import Target
from tbac.files import expand_path, read_csv, shorten

YES_OR_NO = "{question} Answer with yes or no."
Mode = Literal["official", "fixed"]


@dataclass(frozen=True)
class Question:
    """One thing that a dense prompt says, as a question about the picture.

    Attributes:
        number: within its prompt, from 1.
        text: the question, to which "yes" is right.
        parents: numbers of the questions that must be right for this one to count as right.
        category: such as `entity - whole`; the words before the dash are its broad category.
    """

    number: int
    text: str
    parents: tuple[int, ...] = ()
    category: str = ""


def read_dpg_questions(path: str | Path, mode: Mode = "fixed") -> dict[str, list[Question]]:
    """Read the questions of each prompt, by its `item_id`, from `dpg_bench.csv`.

    Args:
        path: the file.
        mode: `official` leaves out the first row of the file, as the official scorer does by mistake.

    Raises:
        ValueError: when the file, a column or a number isn't there.
    """
    path = expand_path(path, "benchmark.questions")
    if not path.exists():
        raise BenchmarkFileError(f"DPG-Bench's questions {path} don't exist")
    rows = read_csv(path)
    needed = {"item_id", "proposition_id", "dependency", "tuple", "question_natural_language"}
    absent = needed - set(rows[0] if rows else ())
    if absent:
        raise BenchmarkFileError(f"{path} lacks the columns {', '.join(sorted(absent))}")
    # Line 1 of the file is its header, which messages have to count.
    questions: dict[str, list[Question]] = defaultdict(list)
    first = 1 if mode == "official" else 0
    for line, row in enumerate(rows[first:], start=2 + first):
        check_fields(row, dict.fromkeys(needed, str), f"{path}:{line}")
        try:
            number = int(row["proposition_id"])
            parents = tuple(int(d) for d in row["dependency"].split(",") if int(d) != 0)
        except ValueError:
            raise BenchmarkFileError(
                f"{path}:{line}: proposition_id and dependency must be whole numbers, got "
                f"{shorten(row['proposition_id'])!r} and {shorten(row['dependency'])!r}"
            ) from None
        category = row["tuple"].split("(")[0].strip()
        questions[row["item_id"]].append(Question(number, row["question_natural_language"], parents, category))
    return dict(questions)


def check_questions(questions: Sequence[Question], place: str) -> None:
    """Raise BenchmarkFileError for questions of a prompt that can't be told apart, or whose dependencies lead nowhere.

    Args:
        questions: of one prompt.
        place: file and prompt, for messages.
    """
    numbers = [question.number for question in questions]
    if len(set(numbers)) < len(numbers):
        twice = max(numbers, key=numbers.count)
        raise BenchmarkFileError(f"{place} has several questions with the proposition_id {twice}")
    try:
        apply_dependencies(dict.fromkeys(numbers, True), questions)
    except ValueError as error:
        raise BenchmarkFileError(f"{place}: {error}; mode=official leaves out what such questions spoil") from None


def apply_dependencies(
    right: Mapping[int, bool], questions: Sequence[Question], mode: Mode = "fixed"
) -> dict[int, bool]:
    """Mark the answers as wrong that depend on a wrong one.

    Args:
        right: number of a question -> whether it was answered "yes".
        questions: of this prompt.
        mode: `official` goes through the questions once in the order of the file, so a chain breaks where a question
            stands before the one that it depends on. `fixed` follows chains in any order.

    Returns:
        Number of a question -> whether it counts as right.

    Raises:
        KeyError: in `official`, when a parent isn't among the questions; its scorer then drops the picture.
        ValueError: in `fixed`, when a parent isn't among the questions, or they depend on each other in a circle.
    """
    # The official scorer changes answers while it reads them, so the order of the questions matters.
    if mode == "official":
        corrected = dict(right)
        for question in questions:
            if any(not corrected[parent] for parent in question.parents):
                corrected[question.number] = False
        return corrected
    # A question holds if its parents do, whose parents are asked first.
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
        overall: share of right questions in percent, averaged over the pictures of a prompt, and then over prompts.
        categories: broad category -> share of right questions, in percent.
        prompts: number of prompts that count.
        dropped: prompts that the official scorer silently drops.
        missing: prompts without any picture; they count as wrong in `fixed`, and not at all in `official`.
        mode: the rules that were applied.
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
    """Compute DPG-Bench's scores from the answers.

    In `official`, categories count only the last picture of each prompt, without dependencies. In `fixed` they count
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
        # Leaving out a prompt without a picture, as `official` does, would reward a model for failing on hard ones.
        if not pictures:
            missing.append(item)
            if mode == "fixed":
                scores.append(0.0)
                for question in asked:
                    by_category[question.category].append(False)
            continue
        # The official scorer drops a prompt whose questions depend on a question that isn't there.
        try:
            kept = [apply_dependencies(picture, asked, mode) for picture in pictures]
        except KeyError:
            dropped.append(item)
            continue
        scores.append(sum(sum(right.values()) / len(right) for right in kept) / len(kept))
        # In `official` the categories don't count the same pictures as the overall score.
        counted = [pictures[-1]] if mode == "official" else kept
        for picture in counted:
            for question in asked:
                by_category[question.category].append(bool(picture[question.number]))
    if not scores:
        raise ValueError("no prompt of DPG-Bench has a picture that could be scored")
    # Reports show the broad categories, the words before the dash.
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
        questions: DPG-Bench's `dpg_bench.csv`; None when pictures are only drawn.
        mode: rules for `overall`: `official` keeps the quirks of the official scorer, `fixed` doesn't.
    """

    needs: ClassVar[Needs] = "questions"
    questions_source: ClassVar[str] = "DPG-Bench's dpg_bench.csv"

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
            raise BenchmarkFileError(
                f"{self.questions} has no question about {len(absent)} prompts, such as {absent[0]}"
            )
        # The official rules drop prompts with such questions; the fixed ones could give no score, after all judging.
        if self.mode == "fixed":
            for item in self.prompts:
                check_questions(self.questions_by_mode["fixed"][item], f"{self.questions}: prompt {shorten(item)!r}")

    def list_targets(self) -> list[Target]:
        """List the targets `<stem>.png`."""
        return list_dpg_targets(self.prompts)

    def judge_picture(self, target: Target, picture: Image.Image, judge: Any) -> PictureVerdict:
        """Ask every question about every quarter of the grid.

        A question without a usable reply fails the picture, but the others are still asked, so that a judge whose
        replies are kept has them when scoring goes on.
        """
        # The questions of `fixed` include those of `official`, so each is asked only once.
        questions = self.questions_by_mode["fixed"][target.item]
        answers = self._ask_about(cut_quarters(picture), questions, judge)
        # The score of a single picture is for the report; `summarize` computes the benchmark's from the answers.
        wrong = []
        for question in questions:
            if not all(quarter_answers[str(question.number)] for quarter_answers in answers):
                wrong.append(question.text)
        share = mean(mean(quarter_answers.values()) for quarter_answers in answers)
        return PictureVerdict(float(share), f"not in all: {', '.join(wrong)}", {"answers": answers})

    def judge_sample(self, target: Target, picture: Image.Image, judge: Any) -> PictureVerdict:
        """Ask every question about one picture, and score the share of right answers by the rules of `fixed`."""
        questions = self.questions_by_mode["fixed"][target.item]
        answers = self._ask_about([picture], questions, judge)[0]
        right = apply_dependencies({int(number): answer for number, answer in answers.items()}, questions)
        return PictureVerdict(sum(right.values()) / len(right))

    def _ask_about(
        self, pictures: Sequence[Image.Image], questions: Sequence[Question], judge: Any
    ) -> list[dict[str, bool]]:
        """Ask every question about each picture: for each, number of a question -> whether the answer is yes.

        Raises:
            JudgeError: when a question has no usable reply, after all others were asked.
        """
        answers: list[dict[str, bool]] = []
        failure = ""
        replies: list[str] = []
        for picture in pictures:
            of_picture: dict[str, bool] = {}
            for question in questions:
                asked = Asked([YES_OR_NO.format(question=question.text)], [picture], self.tries)
                try:
                    of_picture[str(question.number)] = ask_until_usable(judge, asked, read_yes_or_no)[0]
                except JudgeError as error:
                    failure = f"{question.text} {error}"
                    replies += error.replies
            answers.append(of_picture)
        if failure:
            raise JudgeError(failure, replies)
        return answers

    def summarize(self, rows: Sequence[Row], judge_name: str) -> Summary:
        """Compute the scores of both modes; `overall` is that of `benchmark.mode`."""
        stems = {target.path: target.item for target in self.targets}
        failed = {stems[row.picture] for row in rows if row.state == "failed"}
        answers = {stems[row.picture]: read_answers(row) for row in rows if row.state == "scored"}
        scores: dict[str, float] = {}
        notes: list[str] = []
        # The mode that was asked for comes first, so that its `overall` leads the report.
        for mode in (self.mode, "fixed" if self.mode == "official" else "official"):
            try:
                result = self._compute_scores(mode, answers, failed)
            except ValueError as error:
                notes.append(f"No score by the {mode} rules: {error}")
                continue
            if mode == self.mode:
                scores |= {"overall": result.overall, **result.categories}
            else:
                scores |= {f"overall, {mode} rules": result.overall}
            if result.dropped:
                notes.append(f"The {mode} rules silently drop {len(result.dropped)} prompts.")
        if not scores:
            raise ValueError(" ".join(notes))
        if failed:
            notes.append(f"{len(failed)} prompts without usable replies are in no mean.")
        return Summary(scores, f"{len(stems)} prompts of {self.file}, {self.describe_rules()}", notes)

    def count(self, row: Row) -> list[Count]:
        """List what a prompt adds to the overall score of each mode, and to the categories of `benchmark.mode`."""
        stem = row.picture.removesuffix(".png")
        if row.state == "failed":
            return []
        counts = []
        for mode in self.questions_by_mode:
            answers = {stem: read_answers(row)} if row.state == "scored" else {}
            try:
                result = self._compute_scores(mode, answers, set(), [stem])
            except ValueError:  # the official rules drop it
                continue
            ending = "" if mode == self.mode else f", {mode} rules"
            counts.append(Count(f"overall{ending}", result.overall))
            # Questions count alike in their category, so a prompt counts as often as it has some, for all pictures.
            for category, share in result.categories.items() if mode == self.mode else ():
                counts.append(Count(category, share, self._count_questions(stem, category)))
        return counts

    def _count_questions(self, stem: str, category: str) -> int:
        """Count the questions about a prompt in a broad category."""
        questions = self.questions_by_mode[self.mode][stem]
        return sum(question.category.split("-")[0].strip() == category for question in questions)

    def combine(self, means: Mapping[str, float]) -> dict[str, float]:
        """Return the means."""
        return dict(means)

    def describe_rules(self) -> str:
        """Name the mode."""
        return f"{self.mode} rules"

    def describe_questions(self) -> Any:
        """Return the questions of the mode."""
        rows = []
        for stem, questions in sorted(self.questions_by_mode.get(self.mode, {}).items()):
            rows.append([stem, [[q.number, q.text, list(q.parents), q.category] for q in questions]])
        return [YES_OR_NO, rows]

    def _compute_scores(
        self,
        mode: Mode,
        answers: Mapping[str, Sequence[Mapping[int, bool]]],
        failed: set[str],
        stems: Sequence[str] | None = None,
    ) -> DenseScore:
        """Compute the scores of prompts with usable replies, or of some, from the questions that this mode reads."""
        wanted = [target.item for target in self.targets] if stems is None else stems
        asked_of = self.questions_by_mode[mode]
        questions = {item: asked_of[item] for item in wanted if item in asked_of and item not in failed}
        answers_of_mode: dict[str, list[dict[int, bool]]] = {}
        for item, pictures in answers.items():
            if item in questions:
                answers_of_mode[item] = [_select_answers(picture, questions[item]) for picture in pictures]
        return aggregate_dense(answers_of_mode, questions, mode)


def _select_answers(picture: Mapping[int, bool], questions: Sequence[Question]) -> dict[int, bool]:
    """Select the answers about a picture to some of the questions."""
    return {question.number: picture[question.number] for question in questions}


def read_answers(row: Row) -> list[dict[int, bool]]:
    """Read the answers about each quarter of a scored picture: number of a question -> whether it was "yes"."""
    # JSON has no numbers as keys, so they were kept as text.
    pictures = []
    for answers in row.details["answers"]:
        pictures.append({int(number): answer for number, answer in answers.items()})
    return pictures


def list_dpg_targets(prompts: Mapping[str, str]) -> list[Target]:
    """List the targets `<stem>.png`, each a grid of four samples, as DPG-Bench's scorer cuts them apart.

    Args:
        prompts: stem of the prompt's file -> prompt.
    """
    return [Target(f"{stem}.png", stem, prompt, (0, 1, 2, 3)) for stem, prompt in prompts.items()]


def cut_quarters(grid: Image.Image) -> list[Image.Image]:
    """Cut a grid into its four pictures, row by row."""
    width, height = grid.width // 2, grid.height // 2
    places = [(x, y) for y in (0, height) for x in (0, width)]
    return [grid.crop((x, y, x + width, y + height)) for x, y in places]
