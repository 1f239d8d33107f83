"""What slow judges and detectors found out before, so that scoring goes on where it stopped."""

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
    """What was found out about pictures, in a file of JSON lines, so that scoring goes on where it stopped.

    Args:
        file: made where there is none; a line that was torn when writing was cut off is passed over.
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
        """The value, from the file if it was found out before.

        Args:
            about: what else than the pixels it depends on.
            images: pictures.
            find_out: gives the value; what it raises isn't kept.
        """
        pixels = [hashlib.sha256(f"{i.mode}{i.size}".encode() + i.tobytes()).hexdigest() for i in images]
        key = hashlib.sha256(json.dumps([about, pixels]).encode()).hexdigest()
        if key not in self._known:
            self._known[key] = find_out()
            with self.file.open("a") as file:
                file.write(f"\n{json.dumps({'key': key, 'value': self._known[key]})}\n")
        return self._known[key]


class CachedJudge:
    """A judge whose replies are kept; what failed is asked again.

    Args:
        judge: who is asked.
        cache: where replies are kept.
    """

    slow = False

    def __init__(self, judge: Judge, cache: Cache) -> None:
        self.judge, self.cache, self.identity = judge, cache, judge.identity

    def ask(self, question: str, images: Sequence[Image.Image]) -> str:
        """The reply, as it was given before or now."""
        return self.cache.get([self.identity, question], images, lambda: self.judge.ask(question, images))


class CachedDetector:
    """A detector whose scans are kept.

    Args:
        detector: who looks; its `identity` says what its scans depend on besides the picture.
        cache: where scans are kept.
    """

    def __init__(self, detector: Any, cache: Cache) -> None:
        self.detector, self.cache, self.identity = detector, cache, detector.identity
        self.thresholds: Thresholds = getattr(detector, "thresholds", EVERY)

    def __call__(self, image: Image.Image, colored: Collection[str] = ()) -> Scan:
        """The scan, as it was made before or now."""

        def look() -> dict[str, Any]:
            scan = self.detector(image, colored)
            return {"background": scan.background, "detections": [asdict(d) for d in scan.detections]}

        found = self.cache.get([self.identity, sorted(colored)], [image], look)
        detections = (Detection(**{**d, "box": tuple(d["box"])}) for d in found["detections"])
        return Scan(found["background"], tuple(detections))
