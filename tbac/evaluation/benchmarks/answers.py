"""Questions about pictures, answered by the untouched MLLM."""

from pathlib import Path
from typing import Any

from PIL import Image

from tbac.evaluation.benchmarks.base import chunks, read_rows
from tbac.evaluation.rules import same_answer


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
    for _, part in chunks(rows, batch_size):
        images = [[Image.open(Path(path).parent / row["image"]).convert("RGB")] for row in part]
        answers += model.answer([row["question"] for row in part], images, max_new_tokens=8)
    right = [same_answer(a, row["answer"]) for a, row in zip(answers, rows, strict=True)]
    return {"accuracy": sum(right) / len(right), "answers": answers, "rows": rows}
