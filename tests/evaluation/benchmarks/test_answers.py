"""Questions about pictures."""

from pathlib import Path

import pytest

from tbac.evaluation.benchmarks.answers import Answers, read_questions


def test_questions_have_true_answers(in_world: Path) -> None:
    for row in read_questions(in_world / "benchmarks" / "questions.jsonl"):
        names = [o["name"] for o in row["scene"]["objects"]]
        if row["question"].startswith("is there"):
            asked = row["question"].removeprefix("is there a ").removesuffix("?")
            assert (row["answer"] == "yes") == (asked in names)
        if row["question"].startswith("what color is the background"):
            assert row["answer"] == row["scene"]["background"]


class Parrot:
    """A model that gives one answer to everything."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def answer(self, questions: list[str], images: list, max_new_tokens: int) -> list[str]:
        assert len(questions) == len(images)
        self.batches.append(len(questions))
        return [" Yes. "] * len(questions)


def test_accuracy_is_the_share_of_right_answers_whatever_the_batches(in_world: Path) -> None:
    file = str(in_world / "benchmarks" / "questions.jsonl")
    right = [row["answer"] == "yes" for row in read_questions(file)]
    for size in (1, 5, 100):
        model = Parrot()
        found = Answers(name="answers", file=file, batch_size=size).score(model)
        assert found.accuracy == sum(right) / len(right)
        assert len(found.answers) == len(right) == sum(model.batches)


def test_files_are_checked(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"image": "a.png"}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl:1 needs"):
        read_questions(tmp_path / "x.jsonl")
