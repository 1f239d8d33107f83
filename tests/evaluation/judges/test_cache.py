"""What was found out is kept, and what failed isn't."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tbac.evaluation.detectors.base import Detection, Scan
from tbac.evaluation.judges.base import JudgeError, JudgeFacts, Manner
from tbac.evaluation.judges.cache import Cache, CachedDetector, CachedJudge, keep_replies
from tbac.evaluation.rules import Thresholds
from tests.helpers.pictures import make_noise_image


class Counting:
    """Replies with the number of the question, or fails."""

    identity, slow = "counting", True
    thresholds = Thresholds(score=0.5)

    def __init__(self) -> None:
        self.asked = 0

    def ask(self, question: str, images: Any) -> str:
        self.asked += 1
        if question == "fail":
            raise JudgeError("no")
        return str(self.asked)

    def __call__(self, image: Image.Image, colored: Any = ()) -> Scan:
        self.asked += 1
        return Scan("", (Detection("cat", "red" if colored else "", (1, 2, 3, 4), 0.5),))


def test_replies_are_kept_by_question_pixels_and_judge(tmp_path: Path) -> None:
    judge, file = Counting(), tmp_path / "judged.jsonl"
    first = CachedJudge(judge, Cache(file))
    assert [first.ask("a?", [make_noise_image(1)]), first.ask("a?", [make_noise_image(1)])] == ["1", "1"]
    assert first.ask("b?", [make_noise_image(1)]) == "2"
    assert first.ask("a?", [make_noise_image(2)]) == "3"
    with pytest.raises(JudgeError):
        first.ask("fail", [make_noise_image(1)])
    with file.open("a") as torn:
        torn.write('{"key": "abc", "val')
    again = CachedJudge(judge, Cache(file))
    assert [again.ask("a?", [make_noise_image(1)]), again.ask("a?", [make_noise_image(2)])] == ["1", "3"]
    assert judge.asked == 4
    assert again.ask("c?", [make_noise_image(1)]) == "5"
    assert CachedJudge(judge, Cache(file)).ask("c?", [make_noise_image(1)]) == "5"
    judge.identity = "another"  # type: ignore[misc]
    assert CachedJudge(judge, Cache(file)).ask("c?", [make_noise_image(1)]) == "6"


def test_scans_are_kept_with_what_was_to_be_colored(tmp_path: Path) -> None:
    detector = Counting()
    kept = CachedDetector(detector, Cache(tmp_path / "judged.jsonl"))
    assert kept.thresholds == detector.thresholds
    plain, colored = kept(make_noise_image(1)), kept(make_noise_image(1), {"cat"})
    assert plain.detections[0].color == ""
    assert colored.detections[0].color == "red"
    assert CachedDetector(detector, Cache(tmp_path / "judged.jsonl"))(make_noise_image(1)) == plain
    assert detector.asked == 2


class Reader(Counting):
    """Reads the number of pictures that it has seen, and tells the same as a probability."""

    def read_text_lines(self, image: Image.Image) -> list[str]:
        self.asked += 1
        return ["line", str(self.asked)]

    def compute_probability(self, question: str, images: Any, answers: Any) -> float:
        self.asked += 1
        return self.asked / 10

    def describe_facts(self) -> JudgeFacts:
        return JudgeFacts(f"reader {self.asked}", "w", "s")


def test_readings_and_probabilities_are_kept_and_a_manner_doesn_t_matter_to_a_reader(tmp_path: Path) -> None:
    reader, file = Reader(), tmp_path / "judged.jsonl"
    kept = keep_replies(reader, Cache(file))
    assert kept.in_manner(Manner(system="be strict")) is kept
    for _ in range(3):
        assert kept.read_text_lines(make_noise_image(1)) == ["line", "1"]  # type: ignore[attr-defined]
        kept = keep_replies(reader, Cache(file))
    assert [kept.compute_probability("a?", [make_noise_image(1)], ["yes"]) for _ in range(2)] == [0.2, 0.2]
    assert kept.compute_probability("a?", [make_noise_image(1)], ["no"]) == 0.3
    # Who gave what was kept is known in the next run too, whoever judges then.
    again = CachedJudge(reader, Cache(file))
    assert again.compute_probability("a?", [make_noise_image(1)], ["yes"]) == 0.2
    assert again.describe_facts() == JudgeFacts("reader 2", "w", "s")
    assert type(keep_replies(Counting(), Cache(file))) is CachedJudge
    with pytest.raises(JudgeError, match="tells no probabilities"):
        keep_replies(Counting(), Cache(file)).compute_probability("a?", [], [])
