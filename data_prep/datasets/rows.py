"""Rows of the tables that datasets bring along: CSV, JSON lines or a JSON list, Parquet, Arrow."""

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from tbac.data.shards import DataError

PER_UNIT = 2000  # rows or files that are converted together


def cut_into_units(count: int, prefix: str = "") -> list[str]:
    """Names of runs of rows, `<prefix><first>:<end>`, of at most `PER_UNIT` each."""
    return [f"{prefix}{first}:{min(first + PER_UNIT, count)}" for first in range(0, count, PER_UNIT)]


def wrap_in_list(value: Any) -> list:
    """A list as it is; one value as a list of it; nothing as an empty one."""
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, list) else [value]


def read_rows(file: Path) -> Iterator[Mapping[str, Any]]:
    """Rows of a table, as they come.

    Raises:
        DataError: for JSON that isn't a list of objects, nor an object a line.
    """
    if file.suffix == ".csv":
        with file.open(newline="", encoding="utf-8-sig") as opened:
            yield from csv.DictReader(opened)
    elif file.suffix in (".json", ".jsonl"):
        with file.open(encoding="utf-8-sig") as opened:
            yield from parse_json_rows(opened, str(file))
    elif file.suffix == ".parquet":
        for batch in pq.ParquetFile(file).iter_batches(256):
            yield from batch.to_pylist()
    else:
        with pa.memory_map(str(file)) as opened:
            for batch in _read_arrow_batches(opened):
                yield from batch.to_pylist()


def parse_json_rows(text: TextIO, name: str) -> Iterator[dict[str, Any]]:
    """Objects of a JSON list, or of JSON lines.

    Args:
        text: at its beginning.
        name: of the file, for messages.

    Raises:
        DataError: when it is neither.
    """
    # A list is read as a whole; lines are read as they come, since there may be very many.
    is_list = next((line for line in text if line.strip()), "").lstrip().startswith("[")
    text.seek(0)
    if is_list:
        rows = enumerate(_parse_list(text, name), start=1)
    else:
        lines = ((number, line) for number, line in enumerate(text, start=1) if line.strip())
        rows = ((number, _parse_line(line, f"{name}:{number}")) for number, line in lines)
    for number, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{name}: number {number} must be an object, got {type(row).__name__}")
        yield row


def _parse_list(text: TextIO, name: str) -> list[Any]:
    try:
        return json.load(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{name} is neither a JSON list nor JSON lines ({error})") from None


def _parse_line(line: str, place: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{place} is neither in a JSON list nor a line of JSON ({error})") from None


def _read_arrow_batches(opened: Any) -> Iterator[pa.RecordBatch]:
    """Batches of an Arrow stream, or of an Arrow file."""
    try:
        yield from pa.ipc.open_stream(opened)
    except pa.ArrowInvalid:
        opened.seek(0)
        reader = pa.ipc.open_file(opened)
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number)
