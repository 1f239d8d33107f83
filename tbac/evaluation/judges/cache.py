"""Keeps what slow judges and detectors have said, so that scoring resumes where it stopped."""

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from tbac.evaluation.detectors.base import Detection, Scan
from tbac.evaluation.judges.base import Judge
from tbac.evaluation.rules import EVERY, Thresholds


class Cache:
    """Values that were computed from pictures, in a file of JSON lines.

    Args:
        file: made when it is absent. A line that was cut off, as a process that is killed leaves it, is ignored.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._known: dict[str, Any] = {}
        for line in file.read_text().splitlines() if file.is_file() else ():
            try:
                row = json.loads(line)
                self._known[row["key"]] = row["value"]
            except (ValueError, KeyError, TypeError):
                continue

    def get(self, about: Sequence[Any], images: Sequence[Image.Image], find_out: Callable[[], Any]) -> Any:
        """Return a value from the file, or compute it and write it there.

        Args:
            about: everything besides the pictures that the value depends on.
            images: the pictures that it depends on.
            find_out: computes the value; an error that it raises isn't kept.
        """
        pixels = [hashlib.sha256(f"{i.mode}{i.size}".encode() + i.tobytes()).hexdigest() for i in images]
        key = hashlib.sha256(json.dumps([about, pixels]).encode()).hexdigest()
        if key not in self._known:
            self._known[key] = find_out()
            # The newline before it ends a line that an earlier process left unfinished.
            with self.file.open("a") as file:
                file.write(f"\n{json.dumps({'key': key, 'value': self._known[key]})}\n")
        return self._known[key]


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
        return self.cache.get([self.identity, question], images, lambda: self.judge.ask(question, images))


class CachedDetector:
    """A detector whose scans are kept.

    Args:
        detector: reads the pictures; its `identity` says what its scans depend on besides the picture.
        cache: that keeps the scans.
    """

    def __init__(self, detector: Any, cache: Cache) -> None:
        self.detector, self.cache, self.identity = detector, cache, detector.identity
        self.thresholds: Thresholds = getattr(detector, "thresholds", EVERY)

    def __call__(self, image: Image.Image, colored: Collection[str] = ()) -> Scan:
        """Return the scan that was kept, or make it now."""

        def scan_image() -> dict[str, Any]:
            scan = self.detector(image, colored)
            return {"background": scan.background, "detections": [asdict(d) for d in scan.detections]}

        kept = self.cache.get([self.identity, sorted(colored)], [image], scan_image)
        # JSON has no tuples, so boxes come back as lists.
        detections = (Detection(**{**d, "box": tuple(d["box"])}) for d in kept["detections"])
        return Scan(kept["background"], tuple(detections))
