"""Benchmark files: reading them with clear errors, running a pipeline on them, and their scores."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tbac.evaluation.detectors import Detection, Scan
from tbac.evaluation.rules import RELATIONS, aggregate_by_tag, judge_edit, judge_geneval, same_answer
from tbac.evaluation.trees import sample_seed

Detector = Callable[[Image.Image], Scan]


class BenchmarkFileError(ValueError):
    """A benchmark file of the wrong form; the message names file, line and field."""


def read_rows(path: str | Path, required: Mapping[str, type], check: Callable[[dict], str] | None = None) -> list[dict]:
    """Rows of a JSON-lines file.

    Args:
        path: the file.
        required: field -> type of every row.
        check: returns what is wrong with a row, or "".

    Raises:
        BenchmarkFileError: when the file is absent, empty, or a row isn't of the form.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise BenchmarkFileError(f"benchmark file {path} doesn't exist")
    rows = []
    try:
        lines = path.read_text().splitlines()
    except UnicodeDecodeError:
        raise BenchmarkFileError(f"{path} is not UTF-8 text; JSON lines are expected") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise BenchmarkFileError(f"{path}:{number} is not JSON ({error})") from None
        if not isinstance(row, dict):
            raise BenchmarkFileError(f"{path}:{number} must be a JSON object, got {type(row).__name__}")
        for name, kind in required.items():
            if not isinstance(row.get(name), kind):
                raise BenchmarkFileError(f"{path}:{number} needs {name!r} as {kind.__name__}, got {row.get(name)!r}")
        if check and (problem := check(row)):
            raise BenchmarkFileError(f"{path}:{number}: {problem}")
        rows.append(row)
    if not rows:
        raise BenchmarkFileError(f"{path} holds no row")
    return rows


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


@dataclass(frozen=True)
class SamplingOptions:
    """How a benchmark's pictures are made."""

    num_inference_steps: int = 30
    guidance_scale: float = 3.0
    image_guidance_scale: float = 1.5
    batch_size: int = 32
    seed: int = 42


def _chunks(rows: Sequence[Any], size: int) -> Iterable[tuple[int, Sequence[Any]]]:
    return ((start, rows[start : start + size]) for start in range(0, len(rows), size))


def _seeded(options: SamplingOptions, prompts: Sequence[str]) -> list[torch.Generator]:
    """One generator per picture, so that a picture doesn't depend on its batch."""
    return [torch.Generator().manual_seed(sample_seed(options.seed, prompt, 0)) for prompt in prompts]


def run_geneval(pipeline: Any, rows: Sequence[dict], detector: Detector, options: SamplingOptions) -> dict[str, Any]:
    """Generate one picture per prompt and judge it.

    Returns:
        `scores` (`overall` and one per tag), `images`, and `correct` per row.
    """
    images: list[Image.Image] = []
    for _, part in _chunks(rows, options.batch_size):
        images += pipeline(
            [row["prompt"] for row in part],
            num_inference_steps=options.num_inference_steps,
            guidance_scale=options.guidance_scale,
            generator=_seeded(options, [row["prompt"] for row in part]),
        ).images
    verdicts = [judge_geneval(detector(image).detections, row) for image, row in zip(images, rows, strict=True)]
    scores = aggregate_by_tag([(row["tag"], v.correct) for row, v in zip(rows, verdicts, strict=True)])
    return {"scores": scores, "images": images, "correct": [v.correct for v in verdicts]}


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
    for start, part in _chunks(rows, options.batch_size):
        images += pipeline(
            [row["instruction"] for row in part],
            image=sources[start : start + len(part)],
            num_inference_steps=options.num_inference_steps,
            guidance_scale=options.guidance_scale,
            image_guidance_scale=options.image_guidance_scale,
            generator=_seeded(options, [row["instruction"] for row in part]),
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


def read_questions(path: str | Path) -> list[dict]:
    """Rows with `image` (file beside the list), `question` and `answer`."""
    return read_rows(path, {"image": str, "question": str, "answer": str})


def run_answers(model: Any, path: str | Path, batch_size: int = 50) -> dict[str, Any]:
    """Ask the questions of a list.

    Returns:
        `accuracy`, and the `answers` in order.
    """
    rows = read_questions(path)
    answers: list[str] = []
    for _, part in _chunks(rows, batch_size):
        images = [[Image.open(Path(path).parent / row["image"]).convert("RGB")] for row in part]
        answers += model.answer([row["question"] for row in part], images, max_new_tokens=8)
    right = [same_answer(a, row["answer"]) for a, row in zip(answers, rows, strict=True)]
    return {"accuracy": sum(right) / len(right), "answers": answers, "rows": rows}
