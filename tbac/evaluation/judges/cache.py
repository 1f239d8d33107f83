"""Keeps what slow judges and detectors have said, so that scoring resumes where it stopped."""

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from PIL import Image

from tbac.evaluation.detectors.base import Detection, Scan
from tbac.evaluation.judges.base import Judge, JudgeError, JudgeFacts, Manner, read_facts, use_manner
from tbac.evaluation.protocol import UNKNOWN
from tbac.evaluation.rules import EVERY, Thresholds
from tbac.files import append_lines, read_json_lines

log = logging.getLogger(__name__)


class Cache:
    """Values that were computed from pictures, in a file of JSON lines.

    Args:
        file: made when it is absent. A line that was cut off, as a process that is killed leaves it, is ignored.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._known: dict[str, dict[str, Any]] = {}
        for row in read_json_lines(file) if file.is_file() else ():
            if isinstance(row, dict) and isinstance(row.get("key"), str) and "value" in row:
                self._known[row["key"]] = row

    def find(self, key: str) -> dict[str, Any] | None:
        """Find the newest row of a key: `value`, and whatever was kept with it."""
        return self._known.get(key)

    def keep(self, key: str, value: Any, **more: Any) -> None:
        """Write a value and what else shall be known of it; the file keeps the key's earlier values too."""
        row = {"key": key, "value": value, **more}
        self._known[key] = row
        # A reply that can't be kept has still been given.
        try:
            append_lines(self.file, [json.dumps(row)])
        except OSError as error:
            log.warning("%s can't be written (%s); what the judge says isn't kept", self.file, error)

    def get(self, key: str, find_out: Callable[[], Any], read: Callable[[Any], Any]) -> Any:
        """Return a value from the file, or compute it and write it there.

        Args:
            key: from `make_key`.
            find_out: computes the value; an error that it raises isn't kept.
            read: turns what is in the file into what is returned. A value that makes it raise KeyError, TypeError or
                ValueError was damaged, and is computed again.
        """
        row = self.find(key)
        if row is not None:
            with contextlib.suppress(KeyError, TypeError, ValueError):
                return read(row["value"])
        value = find_out()
        self.keep(key, value)
        return read(value)


def make_key(about: Sequence[Any], images: Sequence[Image.Image]) -> str:
    """Make the key of a value from the pictures that it depends on, and everything else that it depends on."""
    pixels = [hashlib.sha256(f"{i.mode}{i.size}".encode() + i.tobytes()).hexdigest() for i in images]
    return hashlib.sha256(json.dumps([about, pixels]).encode()).hexdigest()


class CachedJudge:
    """A judge whose replies are kept, the unusable ones too; a question that failed is asked again the next time.

    Args:
        judge: that is asked.
        cache: that keeps the replies.
    """

    slow = False

    def __init__(self, judge: Judge, cache: Cache) -> None:
        self.judge, self.cache, self.identity = judge, cache, judge.identity
        self.steady: bool = getattr(judge, "steady", False)
        self._names: set[str] = set()  # of those who gave the replies that were used

    def in_manner(self, manner: Manner) -> "CachedJudge":
        """Return a judge that is asked in a manner and keeps its replies in the same file."""
        return CachedJudge(use_manner(self.judge, manner), self.cache)

    def describe_facts(self) -> JudgeFacts:
        """Describe the judge, by the names under which it gave the replies that were used, kept ones included."""
        facts = read_facts(self.judge)
        return replace(facts, name=" and ".join(sorted(self._names)) or facts.name)

    def recall(self, question: str, images: Sequence[Image.Image]) -> str | None:
        """Return the reply that was kept, or None."""
        row = self.cache.find(make_key([self.identity, question], images))
        if row is None or not isinstance(row["value"], str):
            return None
        self._names.add(str(row.get("by", UNKNOWN)))
        reply: str = row["value"]
        return reply

    def ask_anew(self, question: str, images: Sequence[Image.Image]) -> str:
        """Ask now, whatever was kept, and keep the reply."""
        reply = self.judge.ask(question, images)
        name = read_facts(self.judge).name
        self._names.add(name)
        self.cache.keep(make_key([self.identity, question], images), reply, by=name, question=question)
        return reply

    def ask(self, question: str, images: Sequence[Image.Image]) -> str:
        """Return the reply that was kept, or ask for it now."""
        kept = self.recall(question, images)
        return self.ask_anew(question, images) if kept is None else kept

    def compute_probability(self, question: str, images: Sequence[Image.Image], answers: Sequence[str]) -> float:
        """Return the probability that was kept, or compute it now.

        Raises:
            JudgeError: when the judge tells no probabilities.
        """
        compute = getattr(self.judge, "compute_probability", None)
        if compute is None:
            raise JudgeError(f"{self.identity} tells no probabilities")
        key = make_key([self.identity, question, list(answers)], images)
        row = self.cache.find(key)
        if row is not None and isinstance(row["value"], float) and 0 <= row["value"] <= 1:
            self._names.add(str(row.get("by", UNKNOWN)))
            return row["value"]
        value = float(compute(question, images, answers))
        name = read_facts(self.judge).name
        self._names.add(name)
        self.cache.keep(key, value, by=name, question=question)
        return value


class CachedReader(CachedJudge):
    """A judge that reads text in pictures, and whose readings are kept."""

    def in_manner(self, manner: Manner) -> "CachedReader":
        """Return itself: what it reads doesn't depend on a manner of asking."""
        return self

    def read_text_lines(self, image: Image.Image) -> list[str]:
        """Return the lines that were kept, or read them now."""
        self._names.add(read_facts(self.judge).name)
        lines: list[str] = self.cache.get(
            make_key([self.identity, "text"], [image]),
            lambda: self.judge.read_text_lines(image),  # type: ignore[attr-defined]
            read_texts,
        )
        return lines


def keep_replies(judge: Any, cache: Cache) -> CachedJudge:
    """Return a judge whose replies are kept, and its readings, if it reads text."""
    return CachedReader(judge, cache) if hasattr(judge, "read_text_lines") else CachedJudge(judge, cache)


def read_texts(kept: Any) -> list[str]:
    """Read a list of texts that was kept; raises TypeError for anything else."""
    if not isinstance(kept, list) or not all(isinstance(text, str) for text in kept):
        raise TypeError("readings must be a list of texts")
    return kept


class CachedDetector:
    """A detector whose scans are kept.

    Args:
        detector: reads the pictures; its `identity` says what its scans depend on besides the picture.
        cache: that keeps the scans.
    """

    def __init__(self, detector: Any, cache: Cache) -> None:
        self.detector, self.cache, self.identity = detector, cache, detector.identity
        self.thresholds: Thresholds = getattr(detector, "thresholds", EVERY)
        self.object_names: Sequence[str] | None = getattr(detector, "object_names", None)

    def __call__(self, image: Image.Image, colored: Collection[str] = ()) -> Scan:
        """Return the scan that was kept, or make it now."""

        def scan_image() -> dict[str, Any]:
            scan = self.detector(image, colored)
            return {"background": scan.background, "detections": [asdict(d) for d in scan.detections]}

        scan: Scan = self.cache.get(make_key([self.identity, sorted(colored)], [image]), scan_image, read_scan)
        return scan

    def describe_facts(self) -> JudgeFacts:
        """Describe the detector."""
        return read_facts(self.detector)


def read_scan(kept: Any) -> Scan:
    """Read a scan that was kept; raises KeyError, TypeError or ValueError for what isn't one."""
    detections = []
    for item in kept["detections"]:
        # JSON has no tuples, so boxes come back as lists.
        left, top, right, bottom = map(float, item["box"])
        detections.append(Detection(**{**item, "box": (left, top, right, bottom), "score": float(item["score"])}))
    return Scan(kept["background"], tuple(detections))
