"""DPG-Bench: questions that depend on one another, and how their answers become a score."""

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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


def with_dependencies(
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


def dense_score(
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
    for item, own in questions.items():
        pictures = answers.get(item, ())
        if not pictures:
            missing.append(item)
            if mode == "fixed":
                scores.append(0.0)
                for question in own:
                    by_category[question.category].append(False)
            continue
        try:
            kept = [with_dependencies(picture, own, mode) for picture in pictures]
        except KeyError:
            dropped.append(item)
            continue
        scores.append(sum(sum(k.values()) / len(k) for k in kept) / len(kept))
        counted = [pictures[-1]] if mode == "official" else kept
        for picture in counted:
            for question in own:
                by_category[question.category].append(bool(picture[question.number]))
    if not scores:
        raise ValueError("no prompt of DPG-Bench has a picture that could be scored")
    broad: dict[str, list[bool]] = defaultdict(list)
    for category, results in by_category.items():
        broad[category.split("-")[0].strip()] += results
    categories = {name: 100 * sum(results) / len(results) for name, results in broad.items()}
    return DenseScore(100 * sum(scores) / len(scores), categories, len(scores), dropped, missing, mode)
