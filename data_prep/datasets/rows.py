"""Reads the rows of tables: CSV, JSON lines or a JSON list, Parquet, Arrow."""

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from tbac.data.shards import DataError

PER_UNIT = 2000  # how many rows or files are converted together


def cut_into_units(count: int, prefix: str = "") -> list[str]:
    """Cut rows into units of at most `PER_UNIT`; returns their names, `<prefix><first>:<end>`."""
    return [f"{prefix}{first}:{min(first + PER_UNIT, count)}" for first in range(0, count, PER_UNIT)]


def wrap_in_list(value: Any) -> list:
    """Return a list as it is, a single value in a list, and nothing as an empty list."""
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, list) else [value]


def read_rows(file: Path) -> Iterator[Mapping[str, Any]]:
    """Read the rows of a table one after the other.

    Raises:
        DataError: for JSON that is neither a list of objects nor one object in each line.
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
    """Read the objects of a JSON list, or of JSON lines.

    Args:
        text: an open file at its beginning.
        name: of the file, for messages.

    Raises:
        DataError: when it is neither.
    """
    # Lines are read one after the other, since there may be very many; a list can only be read as a whole.
    first_line = next((line for line in text if line.strip()), "")
    text.seek(0)
    rows: Iterator[tuple[int, Any]]
    if first_line.lstrip().startswith("["):
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
    """Read the batches of an Arrow stream or an Arrow file."""
    try:
        yield from pa.ipc.open_stream(opened)
    except pa.ArrowInvalid:
        opened.seek(0)
        reader = pa.ipc.open_file(opened)
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number)
