"""GEdit-Bench's data set, small, as it is downloaded."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.helpers.pictures import make_noise_image

EDITS = ({"key": "k1", "task_type": "color_alter"}, {"key": "k2", "task_type": "style_change"})


def write_gedit(
    folder: Path,
    suffix: str,
    edits: Sequence[Mapping[str, Any]] = EDITS,
    languages: Sequence[str] = ("en", "cn"),
    **changes: Any,
) -> None:
    """Write a file of edits, each in every language.

    Args:
        folder: made when it is absent.
        suffix: `parquet` or `arrow`.
        edits: fields in which edits differ from each other.
        languages: of the instructions.
        changes: fields that all edits have.
    """
    content = io.BytesIO()
    make_noise_image(1, (12, 8)).save(content, format="PNG")
    rows = []
    for edit in edits:
        for language in languages:
            row = {"instruction": f"{language} {edit['key']}", "instruction_language": language}
            row |= {"input_image": {"bytes": content.getvalue(), "path": None}, "Intersection_exist": True}
            rows.append(row | dict(edit) | changes)
    table = pa.Table.from_pylist(rows)
    folder.mkdir(exist_ok=True)
    if suffix == "parquet":
        pq.write_table(table, folder / "train-00000-of-00001.parquet")
        return
    with (
        pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as file,
        pa.ipc.new_stream(file, table.schema) as out,
    ):
        out.write_table(table)
