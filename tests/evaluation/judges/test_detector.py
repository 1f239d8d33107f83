"""The judge that answers by what a detector finds."""

from random import Random

import pytest

from data_prep.shapes.benchmarks import PAIR_TYPES, draw_pair_scene, list_dense_questions, write_pair
from data_prep.shapes.scene import COLORS, GLYPHS, Item, Scene, draw_crowded_scene, render
from tbac.evaluation.detectors.template import TemplateDetector
from tbac.evaluation.judges.base import JudgeError
from tbac.evaluation.judges.detector import DetectorJudge


@pytest.fixture
def judge(detector: TemplateDetector) -> DetectorJudge:
    return DetectorJudge(detector, list(GLYPHS), list(COLORS))


def test_the_detector_says_yes_to_all_that_is_asked_of_true_pictures(judge: DetectorJudge) -> None:
    rng = Random(1)
    for _ in range(20):
        scene = draw_crowded_scene(rng)
        questions = [question for _, question, _ in list_dense_questions(scene)]
        assert set(judge.ask("\n".join(questions), [render(scene)]).split()) == {"yes"}
    for kind in PAIR_TYPES:
        for _ in range(10):
            scene = draw_pair_scene(rng, kind)
            _, questions = write_pair(rng, kind, scene)
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
