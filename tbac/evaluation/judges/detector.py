"""A judge that answers questions of a few forms by what a detector finds."""

import re
from collections.abc import Sequence
from typing import Any

from PIL import Image

from tbac.evaluation.detectors.base import Detection, Detector, Scan
from tbac.evaluation.judges.base import JudgeError
from tbac.evaluation.rules import RELATIONS, find_relations

THIRDS = (("top", "middle", "bottom"), ("left", "center", "right"))


class DetectorJudge:
    """Answers questions of a few forms by what a detector finds: the judge of closed worlds.

    The forms: `is there a <object>?`, `is there a <object> at the <place>?`, `is a <object> <relation> a <object>?`,
    `is the number of <objects> <n>?`, `is the background <name>?`, `does it say "<letters>"?`, the last one also with
    `in <color>`. An object is a name with or without a colour before it. Several lines are several questions; what
    follows the question mark, and lines without any, are instructions and are passed over.

    Args:
        detector: reads a picture.
        names: of all objects that it can find.
        colors: of all colours.
    """

    slow = False

    def __init__(self, detector: Detector, names: Sequence[str], colors: Sequence[str]) -> None:
        self.detector, self.names = detector, list(names)
        self.identity = f"questions of fixed forms, answered by {type(detector).__name__}"
        objects: dict[str, tuple[str | None, str]] = {name: (None, name) for name in names}
        objects |= {f"{color} {name}": (color, name) for color in colors for name in names}
        self._objects = dict(objects)
        for phrase, (color, name) in objects.items():
            self._objects[phrase.removesuffix(name) + make_plural(name)] = (color, name)

    def ask(self, question: str, images: Sequence[Image.Image]) -> str:
        """ "yes" or "no", in a line for each question.

        Raises:
            JudgeError: for a question of another form.
        """
        scan = self.detector(images[-1], self.names)
        size = images[-1].size
        asked = [line[: line.rindex("?") + 1] for line in question.splitlines() if "?" in line]
        return "\n".join("yes" if self._is_true(one, scan, size) else "no" for one in asked)

    def _select_detections(self, phrase: str, scan: Scan) -> list[Detection]:
        if phrase not in self._objects:
            raise JudgeError(f"no detector finds {phrase!r}")
        color, name = self._objects[phrase]
        return [d for d in scan.detections if d.name == name and color in (None, d.color)]

    def _is_true(self, question: str, scan: Scan, size: tuple[int, int]) -> bool:
        if match := re.fullmatch(r"is there an? (.+?)(?: at the (\w+) (\w+))?\?", question):
            place = match.groups()[1:]
            return any(place in ((None, None), find_third(d, size)) for d in self._select_detections(match[1], scan))
        if match := re.fullmatch(rf"is an? (.+) ({'|'.join(RELATIONS)}) an? (.+)\?", question):
            first, second = self._select_detections(match[1], scan), self._select_detections(match[3], scan)
            return any(match[2] in find_relations(a, b) for a in first for b in second if a is not b)
        if match := re.fullmatch(r"is the number of (.+) (\d+)\?", question):
            return len(self._select_detections(match[1], scan)) == int(match[2])
        if match := re.fullmatch(r"is the background (\w+)\?", question):
            return scan.background == match[1]
        if match := re.fullmatch(r'does it say "(\w+)"(?: in (\w+))?\?', question):
            letters = sorted((d for d in scan.detections if d.name.startswith("letter ")), key=lambda d: d.center)
            said = "".join(d.name[-1] for d in letters)
            return said == match[1] and all(match[2] in (None, d.color) for d in letters)
        raise JudgeError(f"the detector can't answer {question!r}")


def make_plural(name: str) -> str:
    """Several objects of a name, as the questions say it."""
    return f"letters {name.removeprefix('letter ')}" if name.startswith("letter ") else f"{name}s"


def answer_by_detection(judge: Any) -> Any:
    """A judge that answers questions, made of a detector that says what it can find; any other judge as it is."""
    if hasattr(judge, "ask") or not (hasattr(judge, "object_names") and hasattr(judge, "color_names")):
        return judge
    return DetectorJudge(judge, judge.object_names, judge.color_names)


def find_third(detection: Detection, size: tuple[int, int]) -> tuple[str, str]:
    """Row and column of the third of the picture where a detection stands."""
    x, y = (min(2, int(3 * place / length)) for place, length in zip(detection.center, size, strict=True))
    return THIRDS[0][y], THIRDS[1][x]
