"""Judges: what they say, what they do when they can't, and what is kept of it."""

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from PIL import Image

from data_prep.shapes.benchmarks import PAIR_TYPES, dense_questions, pair, pair_scene
from data_prep.shapes.scene import COLORS, GLYPHS, Item, Scene, crowded_scene, render
from tbac.evaluation.detectors.base import Detection, Scan
from tbac.evaluation.detectors.template import TemplateDetector
from tbac.evaluation.judges.base import JudgeError, yes_or_no, yes_or_no_lines
from tbac.evaluation.judges.cache import Kept, KeptDetector, KeptJudge
from tbac.evaluation.judges.detector import DetectorJudge
from tbac.evaluation.judges.endpoint import EndpointJudge
from tbac.evaluation.judges.qwen import LocalJudge
from tbac.evaluation.rules import Thresholds
from tests.helpers.endpoint import Server, completion, serving
from tests.helpers.pictures import noise_image


@pytest.mark.parametrize(
    ("reply", "expected"),
    [("yes", True), ("No.", False), ("**Yes**, it is", True), ("yesterday", None), ("", None), ("It is, yes", None)],
)
def test_yes_or_no(reply: str, expected: bool | None) -> None:
    assert yes_or_no(reply) is expected


def test_lines_that_dont_answer_are_passed_over_and_their_number_must_fit() -> None:
    assert yes_or_no_lines("Here:\nyes, a cat\n\nno, no dog", 2) == [True, False]
    assert yes_or_no_lines("yes", 2) is None
    assert yes_or_no_lines("yes\nno\nno", 2) is None


@pytest.fixture
def judge(in_world: Path) -> DetectorJudge:
    detector = TemplateDetector.from_world(in_world / "benchmarks" / "world.json")
    return DetectorJudge(detector, list(GLYPHS), list(COLORS))


def test_the_detector_says_yes_to_all_that_is_asked_of_true_pictures(judge: DetectorJudge) -> None:
    rng = Random(1)
    for _ in range(20):
        scene = crowded_scene(rng)
        questions = [question for _, question, _ in dense_questions(scene)]
        assert set(judge.ask("\n".join(questions), [render(scene)]).split()) == {"yes"}
    for kind in PAIR_TYPES:
        for _ in range(10):
            scene = pair_scene(rng, kind)
            _, questions = pair(rng, kind, scene)
            assert set(judge.ask("\n".join(questions), [render(scene)]).split()) == {"yes"}, questions


WORD = Scene("gray", tuple(Item(f"letter {c}", "red", 0, i) for i, c in enumerate("LT")))
PLAIN = Scene("black", (Item("circle", "red", 1, 0), Item("square", "blue", 1, 2)))


@pytest.mark.parametrize(
    ("scene", "question", "answer"),
    [
        (PLAIN, "is there a circle?", "yes"),
        (PLAIN, "is there a blue circle?", "no"),
        (PLAIN, "is there a red circle at the middle left?", "yes"),
        (PLAIN, "is there a red circle at the top left?", "no"),
        (PLAIN, "is a circle left of a square?", "yes"),
        (PLAIN, "is a circle right of a square?", "no"),
        (PLAIN, "is a circle left of a circle?", "no"),
        (PLAIN, "is the number of squares 1?", "yes"),
        (PLAIN, "is the number of blue squares 2?", "no"),
        (PLAIN, "is the number of letters L 0?", "yes"),
        (PLAIN, "is the background black?", "yes"),
        (PLAIN, 'does it say "LT"?', "no"),
        (WORD, 'does it say "LT"?', "yes"),
        (WORD, 'does it say "TL"?', "no"),
        (WORD, 'does it say "LT" in red?', "yes"),
        (WORD, 'does it say "LT" in blue?', "no"),
        (PLAIN, "Look at it.\nis there a circle? Answer with yes or no.\nis there a letter L?", "yes\nno"),
    ],
)
def test_what_the_detector_answers(judge: DetectorJudge, scene: Scene, question: str, answer: str) -> None:
    assert judge.ask(question, [render(scene)]) == answer


@pytest.mark.parametrize("question", ["is it beautiful?", "is there a dog?", "is there a purple circle?"])
def test_what_the_detector_cant_answer(judge: DetectorJudge, question: str) -> None:
    with pytest.raises(JudgeError):
        judge.ask(question, [render(PLAIN)])


def test_a_local_model_answers(in_world: Path) -> None:
    mllm = str(in_world / "backbones" / "mllm")
    local = LocalJudge(mllm, device="cpu", dtype="float32", image_pixels=576, max_new_tokens=4)
    said = local.ask("is there a circle?", [noise_image(1), noise_image(2)])
    assert said == local.ask("is there a circle?", [noise_image(1), noise_image(2)])
    assert said != local.ask("is there a circle?", [noise_image(3)])
    assert mllm in local.identity
    with pytest.raises(ValueError, match=r"judge\.mllm=absent: no such folder"):
        LocalJudge("absent")
    with pytest.raises(ValueError, match="dtype must be one of"):
        LocalJudge(mllm, dtype="int4")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serving(monkeypatch) as running:
        yield running


def test_the_endpoint_is_asked_at_temperature_zero_with_the_pictures(server: Server) -> None:
    server.answers = [completion(" yes ")]
    judge = EndpointJudge("m", max_retries=1, timeout=2)
    assert judge.ask("a cat?", [noise_image(1), noise_image(2)]) == "yes"
    (request,) = server.requests
    assert request["temperature"] == 0
    assert request["key"] == "Bearer secret"
    content = request["messages"][0]["content"]
    assert [part["type"] for part in content] == ["text", "image_url", "image_url"]
    assert content[1]["image_url"]["url"].startswith("data:image/png;base64,")
    assert "secret" not in judge.identity


@pytest.mark.parametrize(
    "answer",
    [(429, {"error": "slow down"}), (500, "broken"), (503, ""), "garbage", {}, completion(None), completion("")],
)
def test_what_fails_for_the_moment_is_tried_again(server: Server, answer: Any) -> None:
    server.answers = [answer, completion("no")]
    assert EndpointJudge("m", max_retries=1, timeout=2).ask("a cat?", [noise_image(1)]) == "no"
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    "answer", [(429, {"error": "slow down"}), (500, "broken"), "garbage", {}, completion(None), completion(3)]
)
def test_what_keeps_failing_ends_after_so_many_tries(server: Server, answer: Any) -> None:
    server.answers = [answer]
    with pytest.raises(JudgeError):
        EndpointJudge("m", max_retries=2, timeout=2).ask("a cat?", [noise_image(1)])
    assert len(server.requests) == 3


def test_a_wrong_key_is_not_tried_again(server: Server) -> None:
    server.answers = [(401, {"error": {"message": "who are you"}})]
    with pytest.raises(JudgeError, match="who are you"):
        EndpointJudge("m", max_retries=2, timeout=2).ask("a cat?", [noise_image(1)])
    assert len(server.requests) == 1


def test_an_endpoint_that_says_nothing_or_isnt_there(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answers = ["nothing"]
    with pytest.raises(JudgeError, match="timed out"):
        EndpointJudge("m", max_retries=1, timeout=0.2).ask("a cat?", [noise_image(1)])
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    with pytest.raises(JudgeError, match="Connection error"):
        EndpointJudge("m", max_retries=1, timeout=1).ask("a cat?", [noise_image(1)])


def test_address_and_key_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ValueError, match="judge=endpoint needs OPENAI_BASE_URL and OPENAI_API_KEY"):
        EndpointJudge("m")


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
    first = KeptJudge(judge, Kept(file))
    assert [first.ask("a?", [noise_image(1)]), first.ask("a?", [noise_image(1)])] == ["1", "1"]
    assert first.ask("b?", [noise_image(1)]) == "2"
    assert first.ask("a?", [noise_image(2)]) == "3"
    with pytest.raises(JudgeError):
        first.ask("fail", [noise_image(1)])
    with file.open("a") as torn:
        torn.write('{"key": "abc", "val')
    again = KeptJudge(judge, Kept(file))
    assert [again.ask("a?", [noise_image(1)]), again.ask("a?", [noise_image(2)])] == ["1", "3"]
    assert judge.asked == 4
    assert again.ask("c?", [noise_image(1)]) == "5"
    assert KeptJudge(judge, Kept(file)).ask("c?", [noise_image(1)]) == "5"
    judge.identity = "another"  # type: ignore[misc]
    assert KeptJudge(judge, Kept(file)).ask("c?", [noise_image(1)]) == "6"


def test_scans_are_kept_with_what_was_to_be_colored(tmp_path: Path) -> None:
    detector = Counting()
    kept = KeptDetector(detector, Kept(tmp_path / "judged.jsonl"))
    assert kept.thresholds == detector.thresholds
    plain, colored = kept(noise_image(1)), kept(noise_image(1), {"cat"})
    assert plain.detections[0].color == ""
    assert colored.detections[0].color == "red"
    assert KeptDetector(detector, Kept(tmp_path / "judged.jsonl"))(noise_image(1)) == plain
    assert detector.asked == 2
