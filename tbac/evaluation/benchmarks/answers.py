"""Questions about pictures, answered by the untouched MLLM."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tbac.evaluation.benchmarks.files import locate_picture, read_rows
from tbac.evaluation.rules import is_same_answer
from tbac.files import expand_path
from tbac.pictures import open_picture

MAX_NEW_TOKENS = 8  # of an answer


@dataclass(frozen=True)
class AnswerScores:
    """What a model answered.

    Attributes:
        accuracy: share of right answers.
        answers: in the order of the questions.
    """

    accuracy: float
    answers: Sequence[str]


@dataclass(kw_only=True, eq=False)
class Answers:
    """Questions about pictures with one right answer each; nothing is drawn.

    Attributes:
        name: of its scores.
        file: JSON lines; see `read_questions`.
        batch_size: questions that are asked together.

    Raises:
        BenchmarkFileError: for a file of the wrong form.
    """

    name: str
    file: str
    batch_size: int = 50

    def __post_init__(self) -> None:
        self.questions = read_questions(self.file)
        self.folder = expand_path(self.file, "benchmark.file").parent

    def score(self, model: Any) -> AnswerScores:
        """Ask a `UniImage` every question."""
        answers: list[str] = []
        for start in range(0, len(self.questions), self.batch_size):
            rows = self.questions[start : start + self.batch_size]
            pictures = [[open_picture(self.folder / row["image"])] for row in rows]
            answers += model.answer([row["question"] for row in rows], pictures, max_new_tokens=MAX_NEW_TOKENS)
        pairs = zip(answers, self.questions, strict=True)
        right = [is_same_answer(answer, row["answer"]) for answer, row in pairs]
        return AnswerScores(sum(right) / len(right), answers)


def read_questions(path: str | Path) -> list[dict]:
    """Read rows with `image` (a file beside the list), `question` and `answer`."""
    rows = read_rows(path, {"image": str, "question": str, "answer": str})
    folder = expand_path(path, "benchmark.file").parent
    for number, row in enumerate(rows):
        locate_picture(folder, row["image"], f"{path}: question {number}")
    return rows
