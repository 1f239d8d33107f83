"""What counts as right: GenEval's rules, the edit rules and answer matching, as pure functions over detections."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tbac.evaluation.detectors.base import Detection, Scan

POSITION_MARGIN = 0.1  # of the summed box sides, as GenEval
POSITION_SINE = 0.5  # least share of the offset along an axis, as GenEval
RELATIONS = ("left of", "right of", "above", "below")


@dataclass(frozen=True)
class Thresholds:
    """Which detections count.

    Attributes:
        score: the score that a detection must exceed,
        counting: and the one for prompts with the tag `counting`.
        most: detections of one class, the best ones.
    """

    score: float = 0.0
    counting: float = 0.0
    most: int = 10**6

    def apply(self, detections: Sequence[Detection], tag: str) -> list[Detection]:
        """Those that count for a prompt with this tag, the best first."""
        least = self.counting if tag == "counting" else self.score
        by_name: dict[str, list[Detection]] = {}
        for detection in sorted(detections, key=lambda d: -d.score):
            of_name = by_name.setdefault(detection.name, [])
            if detection.score > least and len(of_name) < self.most:
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
    """Where `first` stands relative to `second`: any of `RELATIONS`; empty when too close to tell (GenEval)."""
    offset = [a - b for a, b in zip(first.center, second.center, strict=True)]
    sides = [first.box[i + 2] - first.box[i] + second.box[i + 2] - second.box[i] for i in (0, 1)]
    clear = [math.copysign(max(abs(o) - POSITION_MARGIN * side, 0.0), o) for o, side in zip(offset, sides, strict=True)]
    if all(abs(c) < 1e-3 for c in clear):
        return set()
    length = math.hypot(*offset)
    x, y = clear[0] / length, clear[1] / length
    named = ((x < -POSITION_SINE, "left of"), (x > POSITION_SINE, "right of"), (y < -POSITION_SINE, "above"))
    return {name for holds, name in (*named, (y > POSITION_SINE, "below")) if holds}


def judge_geneval(
    detections: Sequence[Detection], metadata: Mapping[str, Any], thresholds: Thresholds = EVERY
) -> Verdict:
    """GenEval's rules for one picture.

    Every entry of `include` needs at least `count` objects of its class, of its colour where it has one, standing in
    its relation to the objects of the entry it points at where it has a position; no entry of `exclude` may reach its
    count.

    Args:
        detections: what a detector found.
        metadata: a row of GenEval's `evaluation_metadata.jsonl`.
        thresholds: which detections count; GenEval's own are `GENEVAL_THRESHOLDS`.
    """
    # What counts, by class, the most certain first.
    by_class: dict[str, list[Detection]] = {}
    for detection in thresholds.apply(detections, metadata.get("tag", "")):
        by_class.setdefault(detection.name, []).append(detection)
    # Every wanted entry; a position points back at the objects of an earlier one.
    groups: list[list[Detection]] = []
    for wanted in metadata.get("include", ()):
        name, count = wanted["class"], wanted["count"]
        found = by_class.get(name, [])[:count]
        if len(found) < count:
            return Verdict(False, f"expected {name} >= {count}, found {len(found)}")
        if "color" in wanted and sum(d.color == wanted["color"] for d in found) < count:
            return Verdict(False, f"expected {wanted['color']} {name} >= {count}, found {[d.color for d in found]}")
        if "position" in wanted:
            relation, target = wanted["position"]
            if not all(relation in find_relations(a, b) for a in found for b in groups[target]):
                return Verdict(False, f"expected {name} {relation} {metadata['include'][target]['class']}")
        groups.append(found)
    # Nothing more than that, where the prompt gives a number.
    for banned in metadata.get("exclude", ()):
        if len(by_class.get(banned["class"], [])) >= banned["count"]:
            return Verdict(False, f"expected {banned['class']} < {banned['count']}")
    return Verdict(True)


def aggregate_by_tag(rows: Sequence[tuple[str, bool]]) -> dict[str, float]:
    """Share of right pictures per tag, and `overall`, the mean over tags, as GenEval reports it.

    Raises:
        ValueError: without any row.
    """
    if not rows:
        raise ValueError("no picture to aggregate")
    tags = list(dict.fromkeys(tag for tag, _ in rows))
    shares = {}
    for tag in tags:
        correct = [ok for t, ok in rows if t == tag]
        shares[tag] = sum(correct) / len(correct)
    return {"overall": sum(shares.values()) / len(shares), **shares}


@dataclass(frozen=True)
class EditVerdict:
    """How an edit went.

    Attributes:
        happened: all that should appear is there, and all that should go is gone.
        kept: share of what should stay that stayed; additional objects count against it.
    """

    happened: bool
    kept: float

    @property
    def score(self) -> float:
        """`kept` where the edit happened, 0 elsewhere."""
        return self.kept if self.happened else 0.0


def judge_edit(source: Scan, target: Scan, found: Scan, anywhere: bool = False, tolerance: float = 4.0) -> EditVerdict:
    """Compare an edited picture with what it should be.

    Args:
        source: objects before the edit.
        target: objects as they should be after it.
        found: what a detector reads from the edited picture.
        anywhere: an added object may stand at any place.
        tolerance: greatest distance in pixels, per axis, at which an object is still at its place.
    """
    # Each object that is found stands for at most one that is wanted; what is left in the end is too much.
    left = list(found.detections)

    def take(wanted: Detection, free: bool = False) -> bool:
        for candidate in left:
            near = all(abs(a - b) <= tolerance for a, b in zip(candidate.center, wanted.center, strict=True))
            if (candidate.name, candidate.color) == (wanted.name, wanted.color) and (near or free):
                left.remove(candidate)
                return True
        return False

    def is_in(item: Detection, scan: Scan) -> bool:
        return any((item.name, item.color, item.center) == (d.name, d.color, d.center) for d in scan.detections)

    # What should have stayed takes its objects first, then what should have appeared, then what should be gone.
    stayed = [take(d) for d in target.detections if is_in(d, source)]
    appeared = [take(d, anywhere) for d in target.detections if not is_in(d, source)]
    gone = [not take(d) for d in source.detections if not is_in(d, target)]
    happened = all(appeared) and all(gone)
    # The background is part of the edit, or part of what stays.
    if source.background != target.background:
        happened = happened and found.background == target.background
    else:
        stayed.append(found.background == target.background)
    total = len(stayed) + len(left)
    return EditVerdict(happened, sum(stayed) / total if total else 1.0)


def is_same_answer(given: str, expected: str) -> bool:
    """Equal apart from case, surrounding space and a final full stop."""
    return given.strip().rstrip(".").lower() == expected.strip().rstrip(".").lower()
