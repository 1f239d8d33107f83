"""Edits of a closed world: the edit happened, and the rest stayed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from tbac.evaluation.benchmarks.base import SamplingOptions, chunks, read_rows, seeded
from tbac.evaluation.detectors.base import Detection, Detector, Scan
from tbac.evaluation.rules import aggregate_by_tag, judge_edit


def scan_from_json(value: Mapping[str, Any]) -> Scan:
    """A `Scan` from `{background, objects: [{name, color, box}]}`."""
    items = (Detection(o["name"], o["color"], tuple(o["box"]), 1.0) for o in value["objects"])
    return Scan(value["background"], tuple(items))


def read_edits(path: str | Path) -> list[dict]:
    """Rows with `image` (file beside the list), `instruction`, `kind`, and `source` and `target` scans."""
    return read_rows(path, {"image": str, "instruction": str, "kind": str, "source": dict, "target": dict})


def run_edits(pipeline: Any, path: str | Path, detector: Detector, options: SamplingOptions) -> dict[str, Any]:
    """Edit the source pictures of a list and judge the results.

    Returns:
        `score`, `happened`, `kept` (means over rows), `by_kind`, and the pictures as `sources` and `images`.
    """
    rows = read_edits(path)
    sources = [Image.open(Path(path).parent / row["image"]).convert("RGB") for row in rows]
    images: list[Image.Image] = []
    for start, part in chunks(rows, options.batch_size):
        images += pipeline(
            [row["instruction"] for row in part],
            image=sources[start : start + len(part)],
            num_inference_steps=options.num_inference_steps,
            guidance_scale=options.guidance_scale,
            image_guidance_scale=options.image_guidance_scale,
            generator=seeded(options, [row["instruction"] for row in part]),
        ).images
    verdicts = [
        judge_edit(
            scan_from_json(row["source"]), scan_from_json(row["target"]), detector(image), row.get("anywhere", False)
        )
        for row, image in zip(rows, images, strict=True)
    ]
    by_kind = aggregate_by_tag([(row["kind"], v.happened) for row, v in zip(rows, verdicts, strict=True)])
    count = len(rows)
    return {
        "score": sum(v.score for v in verdicts) / count,
        "happened": sum(v.happened for v in verdicts) / count,
        "kept": sum(v.kept for v in verdicts) / count,
        "by_kind": by_kind,
        "sources": sources,
        "images": images,
        "rows": rows,
    }
