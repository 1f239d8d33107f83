"""GenEval: 553 prompts with the objects that must be seen."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from PIL import Image

from tbac.evaluation.benchmarks.base import (
    Row,
    SamplingOptions,
    Summary,
    chunks,
    count_difference,
    missing,
    opened,
    read_rows,
    seeded,
)
from tbac.evaluation.detectors.base import Detector
from tbac.evaluation.picture_tree import Target, geneval_targets, write_geneval_metadata
from tbac.evaluation.rules import EVERY, RELATIONS, aggregate_by_tag, judge_geneval


def _check_geneval(row: dict) -> str:
    for part in ("include", "exclude"):
        entries = row.get(part, [])
        if not isinstance(entries, list):
            return f"{part!r} must be a list, got {entries!r}"
        for index, entry in enumerate(entries):
            if not isinstance(entry, dict) or not isinstance(entry.get("class"), str):
                return f"{part}[{index}] needs a 'class', got {entry!r}"
            if not isinstance(entry.get("count"), int) or entry["count"] < 1:
                return f"{part}[{index}] needs a positive whole 'count', got {entry.get('count')!r}"
            if "position" in entry:
                position = entry["position"]
                if not (isinstance(position, list) and len(position) == 2 and position[0] in RELATIONS):
                    return f"{part}[{index}].position must be [one of {', '.join(RELATIONS)}, index], got {position!r}"
                if not (isinstance(position[1], int) and 0 <= position[1] < index):
                    return f"{part}[{index}].position must point at an earlier entry, got {position[1]!r}"
    return "" if row.get("include") else "'include' must hold at least one object"


def read_geneval(path: str | Path) -> list[dict]:
    """Rows of GenEval's `evaluation_metadata.jsonl`: `tag`, `prompt`, `include`, optional `exclude`."""
    return read_rows(path, {"tag": str, "prompt": str, "include": list}, _check_geneval)


def run_geneval(pipeline: Any, rows: Sequence[dict], detector: Detector, options: SamplingOptions) -> dict[str, Any]:
    """Generate one picture per prompt and judge it.

    Returns:
        `scores` (`overall` and one per tag), `images`, and `correct` per row.
    """
    images: list[Image.Image] = []
    for _, part in chunks(rows, options.batch_size):
        images += pipeline(
            [row["prompt"] for row in part],
            num_inference_steps=options.num_inference_steps,
            guidance_scale=options.guidance_scale,
            generator=seeded(options, [row["prompt"] for row in part]),
        ).images
    verdicts = [judge_geneval(detector(image).detections, row) for image, row in zip(images, rows, strict=True)]
    scores = aggregate_by_tag([(row["tag"], v.correct) for row, v in zip(rows, verdicts, strict=True)])
    return {"scores": scores, "images": images, "correct": [v.correct for v in verdicts]}


class GenEval:
    """553 prompts with the objects that must be seen; four samples each."""

    title, judged = "GenEval", True

    def __init__(self, cfg: DictConfig, samples: int) -> None:
        self.file, self.samples = str(cfg.file), samples
        self.prompts = read_geneval(self.file)

    def targets(self) -> list[Target]:
        """`{i:05d}/samples/{k:05d}.png`."""
        return geneval_targets(self.prompts, self.samples)

    def write_beside(self, root: Path) -> None:
        """`{i:05d}/metadata.jsonl`."""
        write_geneval_metadata(self.prompts, root)

    def check_judge(self, judge: Any) -> None:
        """Raise ValueError for a judge that doesn't detect."""
        if not callable(judge):
            raise ValueError(f"GenEval needs a detector, judge=template or judge=geneval; got {type(judge).__name__}")

    def rows(self, root: Path, judge: Any) -> Iterator[Row]:
        """GenEval's rules on every picture."""
        for number, target in enumerate(self.targets()):
            row = self.prompts[number // self.samples]
            if absent := missing(target, row["tag"], root):
                yield absent
                continue
            colored = {wanted["class"] for wanted in row["include"] if "color" in wanted}
            scan = judge(opened(root / target.path), colored)
            verdict = judge_geneval(scan.detections, row, getattr(judge, "thresholds", EVERY))
            yield Row(target.path, row["tag"], row["prompt"], "scored", float(verdict.correct), verdict.reason)

    def summary(self, rows: Sequence[Row], judge_name: str) -> Summary:
        """Share of right pictures per tag, and their mean; a missing picture is wrong."""
        scores = aggregate_by_tag([(row.group, bool(row.score)) for row in rows])
        differences = count_difference(len(self.prompts), 553, "prompts")
        differences += count_difference(self.samples, 4, "samples per prompt")
        if "Mask2Former" not in judge_name:
            differences.append(f"judged by {judge_name} instead of Mask2Former and CLIP")
        protocol = f"GenEval's rules; {len(self.prompts)} prompts of {self.file}, {self.samples} each"
        return Summary(scores, protocol, differences)
