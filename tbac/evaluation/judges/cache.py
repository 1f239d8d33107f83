"""Keeps what slow judges and detectors have said, so that scoring resumes where it stopped."""

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from tbac.evaluation.detectors.base import Detection, Scan
from tbac.evaluation.judges.base import Judge
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
        self._known: dict[str, Any] = {}
        for row in read_json_lines(file) if file.is_file() else ():
            if isinstance(row, dict) and isinstance(row.get("key"), str) and "value" in row:
                self._known[row["key"]] = row["value"]

    def get(
        self,
        about: Sequence[Any],
        images: Sequence[Image.Image],
        find_out: Callable[[], Any],
        read: Callable[[Any], Any],
    ) -> Any:
        """Return a value from the file, or compute it and write it there.

        Args:
            about: everything besides the pictures that the value depends on.
            images: the pictures that it depends on.
            find_out: computes the value; an error that it raises isn't kept.
            read: turns what is in the file into what is returned. A value that makes it raise KeyError, TypeError or
                ValueError was damaged, and is computed again.
        """
        pixels = [hashlib.sha256(f"{i.mode}{i.size}".encode() + i.tobytes()).hexdigest() for i in images]
        key = hashlib.sha256(json.dumps([about, pixels]).encode()).hexdigest()
        if key in self._known:
            with contextlib.suppress(KeyError, TypeError, ValueError):
                return read(self._known[key])
        value = find_out()
        self._known[key] = value
        # A reply that can't be kept has still been given.
        try:
            append_lines(self.file, [json.dumps({"key": key, "value": value})])
        except OSError as error:
            log.warning("%s can't be written (%s); what the judge says isn't kept", self.file, error)
        return read(value)


class CachedJudge:
    """A judge whose replies are kept; a question that failed is asked again the next time.

    Args:
        judge: that is asked.
        cache: that keeps the replies.
    """

    slow = False

    def __init__(self, judge: Judge, cache: Cache) -> None:
        self.judge, self.cache, self.identity = judge, cache, judge.identity

    def ask(self, question: str, images: Sequence[Image.Image]) -> str:
        """Return the reply that was kept, or ask for it now."""
        return self.cache.get([self.identity, question], images, lambda: self.judge.ask(question, images), read_reply)


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

        scan: Scan = self.cache.get([self.identity, sorted(colored)], [image], scan_image, read_scan)
        return scan


def read_reply(kept: Any) -> str:
    """Read a reply that was kept; raises TypeError for what isn't a text."""
    if not isinstance(kept, str):
        raise TypeError("a reply must be a text")
    return kept


def read_scan(kept: Any) -> Scan:
    """Read a scan that was kept; raises KeyError, TypeError or ValueError for what isn't one."""
    detections = []
    for item in kept["detections"]:
        # JSON has no tuples, so boxes come back as lists.
        left, top, right, bottom = map(float, item["box"])
        detections.append(Detection(**{**item, "box": (left, top, right, bottom), "score": float(item["score"])}))
    return Scan(kept["background"], tuple(detections))
