"""A judge that looks up the answers to questions of a few forms in what a detector finds."""

import re
from collections.abc import Sequence
from typing import Any

from PIL import Image

from tbac.evaluation.detectors.base import Detection, Detector, Scan
from tbac.evaluation.judges.base import JudgeError
from tbac.evaluation.rules import RELATIONS, find_relations

THIRDS = (("top", "middle", "bottom"), ("left", "center", "right"))

# The forms of questions, in the order in which they are tried.
EXISTS = re.compile(r"is there an? (.+?)(?: at the (\w+) (\w+))?\?")
RELATED = re.compile(rf"is an? (.+) ({'|'.join(RELATIONS)}) an? (.+)\?")
COUNT = re.compile(r"is the number of (.+) (\d+)\?")
BACKGROUND = re.compile(r"is the background (\w+)\?")
WORD = re.compile(r'does it say "(\w+)"(?: in (\w+))?\?')


class DetectorJudge:
    """Answers questions of a few forms with what a detector finds: the judge of closed worlds.

    The forms are `is there a <object>?`, `is there a <object> at the <place>?`, `is a <object> <relation> a <object>?`,
    `is the number of <objects> <n>?`, `is the background <name>?` and `does it say "<letters>"?`, the last one also
    with `in <color>`. An object is a name with or without a colour before it. Each line holds one question. Text after
    the question mark, and lines without one, are instructions and are ignored.

    Args:
        detector: reads a picture.
        names: of all objects that it can find.
        colors: of all colours that it can tell.
    """

    slow = False
    steady = True  # it says the same when it is asked again

    def __init__(self, detector: Detector, names: Sequence[str], colors: Sequence[str]) -> None:
        self.detector, self.names = detector, list(names)
        self.identity = f"questions of fixed forms, answered by {type(detector).__name__}"
        objects: dict[str, tuple[str | None, str]] = {name: (None, name) for name in names}
        objects |= {f"{color} {name}": (color, name) for color in colors for name in names}
        self._objects = dict(objects)
        for phrase, (color, name) in objects.items():
            self._objects[phrase.removesuffix(name) + make_plural(name)] = (color, name)

    def ask(self, question: str, images: Sequence[Image.Image]) -> str:
        """Answer each question with a line "yes" or "no".

        Raises:
            JudgeError: for a question of another form.
        """
        scan = self.detector(images[-1], self.names)
        size = images[-1].size
        questions = [line[: line.rindex("?") + 1] for line in question.splitlines() if "?" in line]
        answers = [self._is_true(line, scan, size) for line in questions]
        return "\n".join("yes" if answer else "no" for answer in answers)

    def _select_detections(self, phrase: str, scan: Scan) -> list[Detection]:
        """Select the objects that a phrase such as "red circles" means.

        Raises:
            JudgeError: for a phrase that means no object.
        """
        if phrase not in self._objects:
            raise JudgeError(f"no detector finds {phrase!r}")
        color, name = self._objects[phrase]
        return [d for d in scan.detections if d.name == name and color in (None, d.color)]

    def _is_true(self, question: str, scan: Scan, size: tuple[int, int]) -> bool:
        """Whether the answer to a question is yes; `size` is the picture's (width, height).

        Raises:
            JudgeError: for a question of another form.
        """
        match = EXISTS.fullmatch(question)
        if match:
            place = match.groups()[1:]
            objects = self._select_detections(match[1], scan)
            return any(place in ((None, None), find_third(d, size)) for d in objects)
        match = RELATED.fullmatch(question)
        if match:
            first, second = self._select_detections(match[1], scan), self._select_detections(match[3], scan)
            return any(match[2] in find_relations(a, b) for a in first for b in second if a is not b)
        match = COUNT.fullmatch(question)
        if match:
            return len(self._select_detections(match[1], scan)) == int(match[2])
        match = BACKGROUND.fullmatch(question)
        if match:
            return scan.background == match[1]
        match = WORD.fullmatch(question)
        if match:
            # The letters of a word stand in one row, so they are read from left to right.
            letters = sorted((d for d in scan.detections if d.name.startswith("letter ")), key=lambda d: d.center)
            word = "".join(d.name[-1] for d in letters)
            return word == match[1] and all(match[2] in (None, d.color) for d in letters)
        raise JudgeError(f"the detector can't answer {question!r}")


def make_plural(name: str) -> str:
    """Make the plural of an object's name, as the questions have it."""
    return f"letters {name.removeprefix('letter ')}" if name.startswith("letter ") else f"{name}s"


def answer_by_detection(judge: Any) -> Any:
    """Turn a detector that lists what it can find into a judge that answers questions; return any other judge as is."""
    if hasattr(judge, "ask") or not (hasattr(judge, "object_names") and hasattr(judge, "color_names")):
        return judge
    return DetectorJudge(judge, judge.object_names, judge.color_names)


def find_third(detection: Detection, size: tuple[int, int]) -> tuple[str, str]:
    """Find the third of the picture that a detection stands in; returns the names of its row and its column."""
    x, y = (min(2, int(3 * place / length)) for place, length in zip(detection.center, size, strict=True))
    return THIRDS[0][y], THIRDS[1][x]
