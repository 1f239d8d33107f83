"""Rules that decide what is right: GenEval's, those for edits, and for answers; pure functions of detections."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tbac.evaluation.detectors.base import Detection, Scan

POSITION_MARGIN = 0.1  # share of the summed box sides that an offset must exceed, as in GenEval
POSITION_SINE = 0.5  # least share of the offset that must lie along an axis, as in GenEval
RELATIONS = ("left of", "right of", "above", "below")


@dataclass(frozen=True)
class Thresholds:
    """Which detections count.

    Attributes:
        score: that a detection must exceed.
        counting: that it must exceed for prompts with the tag `counting`.
        most: how many detections of one class count, the best ones.
    """

    score: float = 0.0
    counting: float = 0.0
    most: int = 10**6

    def apply(self, detections: Sequence[Detection], tag: str) -> list[Detection]:
        """Select the detections that count for a prompt with this tag, the best of each class first.

        Scores are compared as float32 numbers, and of equal ones the last comes first, as in GenEval.
        """
        import numpy as np  # here, since commands that judge nothing must start at once

        least = np.float32(self.counting if tag == "counting" else self.score)
        by_name: dict[str, list[Detection]] = {}
        for detection in reversed(sorted(detections, key=lambda d: np.float32(d.score))):
            of_name = by_name.setdefault(detection.name, [])
            if np.float32(detection.score) > least and len(of_name) < self.most:
                of_name.append(detection)
        return [detection for of_name in by_name.values() for detection in of_name]


GENEVAL_THRESHOLDS = Thresholds(score=0.3, counting=0.9, most=16)
EVERY = Thresholds()


@dataclass(frozen=True)
class Verdict:
    """Whether a picture is right, and if not why."""

    correct: bool
    reason: str = ""


def find_relations(first: Detection, second: Detection) -> set[str]:
    """Find where `first` stands relative to `second`, as GenEval does, in float32 numbers.

    Returns:
        Any of `RELATIONS`; empty when the objects are too close to tell.
    """
    import numpy as np  # here, since commands that judge nothing must start at once

    corners = np.array([first.box, second.box], np.float32).reshape(2, 2, 2)  # (object, corner, axis)
    offset = np.subtract(*corners.mean(axis=1))
    sides = np.abs(np.diff(corners, axis=1))[:, 0].sum(axis=0, dtype=np.float32)
    # What counts of a distance is what exceeds the margin.
    clear = np.maximum(np.abs(offset) - np.float32(POSITION_MARGIN) * sides, 0) * np.sign(offset)
    if (np.abs(clear) < 1e-3).all():
        return set()
    x, y = clear / np.linalg.norm(offset)
    holds = {
        "left of": x < -POSITION_SINE,
        "right of": x > POSITION_SINE,
        "above": y < -POSITION_SINE,
        "below": y > POSITION_SINE,
    }
    return {relation for relation, is_true in holds.items() if is_true}


def judge_geneval(
    detections: Sequence[Detection], metadata: Mapping[str, Any], thresholds: Thresholds = EVERY
) -> Verdict:
    """Judge one picture by GenEval's rules.

    Every entry of `include` needs at least `count` objects of its class. Where it has a colour, they must have it;
    where it has a position, they must stand in this relation to the objects of the entry that it points at. No entry of
    `exclude` may reach its count.

    Args:
        detections: of a detector.
        metadata: a row of GenEval's `evaluation_metadata.jsonl`.
        thresholds: which detections count; GenEval uses `GENEVAL_THRESHOLDS`.
    """
    # Entries ask for objects of a class, and take the most certain ones first.
    by_class: dict[str, list[Detection]] = {}
    for detection in thresholds.apply(detections, metadata.get("tag", "")):
        by_class.setdefault(detection.name, []).append(detection)
    # The objects of each entry are kept, since a later entry may say where it stands relative to them.
    groups: list[list[Detection]] = []
    for wanted in metadata.get("include", ()):
        name, count = wanted["class"], wanted["count"]
        objects = by_class.get(name, [])[:count]
        if len(objects) < count:
            return Verdict(False, f"expected {name} >= {count}, found {len(objects)}")
        colors = [detection.color for detection in objects]
        if "color" in wanted and colors.count(wanted["color"]) < count:
            return Verdict(False, f"expected {wanted['color']} {name} >= {count}, found {colors}")
        if "position" in wanted:
            relation, target = wanted["position"]
            if not all(relation in find_relations(a, b) for a in objects for b in groups[target]):
                return Verdict(False, f"expected {name} {relation} {metadata['include'][target]['class']}")
        groups.append(objects)
    # A prompt that gives a number is also wrong when there are more.
    for banned in metadata.get("exclude", ()):
        if len(by_class.get(banned["class"], [])) >= banned["count"]:
            return Verdict(False, f"expected {banned['class']} < {banned['count']}")
    return Verdict(True)


@dataclass(frozen=True)
class EditVerdict:
    """How an edit went.

    Attributes:
        happened: whether everything that should appear is there, and everything that should go is gone.
        kept: share of the objects that should stay and stayed; objects that nobody asked for lower it.
    """

    happened: bool
    kept: float

    @property
    def score(self) -> float:
        """`kept` where the edit happened, 0 elsewhere."""
        return self.kept if self.happened else 0.0


def judge_edit(source: Scan, target: Scan, edited: Scan, anywhere: bool = False, tolerance: float = 4.0) -> EditVerdict:
    """Compare an edited picture with what it should be.

    Args:
        source: objects before the edit.
        target: objects as they should be after it.
        edited: what a detector reads from the edited picture.
        anywhere: an added object may stand at any place.
        tolerance: greatest distance in pixels, per axis, at which an object is still at its place.
    """
    # Each object of the picture can be only one of the objects that should be there; the rest are too many.
    left = list(edited.detections)

    def take(wanted: Detection, free: bool = False) -> bool:
        for candidate in left:
            near = all(abs(a - b) <= tolerance for a, b in zip(candidate.center, wanted.center, strict=True))
            if (candidate.name, candidate.color) == (wanted.name, wanted.color) and (near or free):
                left.remove(candidate)
                return True
        return False

    def is_in(item: Detection, scan: Scan) -> bool:
        return any((item.name, item.color, item.center) == (d.name, d.color, d.center) for d in scan.detections)

    # Objects that should stay are looked for first: an object like them must not pass for one that was added.
    stayed = [take(d) for d in target.detections if is_in(d, source)]
    appeared = [take(d, anywhere) for d in target.detections if not is_in(d, source)]
    gone = [not take(d) for d in source.detections if not is_in(d, target)]
    happened = all(appeared) and all(gone)
    # The background is either what the edit changes, or one of the things that should stay.
    if source.background != target.background:
        happened = happened and edited.background == target.background
    else:
        stayed.append(edited.background == target.background)
    total = len(stayed) + len(left)
    return EditVerdict(happened, sum(stayed) / total if total else 1.0)


def is_same_answer(given: str, expected: str) -> bool:
    """Whether two answers are equal apart from case, surrounding space and a final full stop."""
    return given.strip().rstrip(".").lower() == expected.strip().rstrip(".").lower()
