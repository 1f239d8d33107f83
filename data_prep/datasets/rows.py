"""Reads the rows of tables: CSV, JSON lines or a JSON list, Parquet, Arrow."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from tbac.data.shards import DataError
from tbac.files import MAX_DIGITS, ForeignFileError, find_problem, iterate_csv, parse_json, reading, shorten

PER_UNIT = 2000  # how many rows or files are converted together
MAX_LINE = 2**26  # characters of one line


@dataclass(frozen=True)
class BrokenRow:
    """A row that can't be read: where it stands, and what is wrong with it. The rows after it are read as usual."""

    place: str
    reason: str


Row = Mapping[str, Any]


def cut_into_units(count: int, prefix: str = "") -> list[str]:
    """Cut rows into units of at most `PER_UNIT`; returns their names, `<prefix><first>:<end>`."""
    return [f"{prefix}{first}:{min(first + PER_UNIT, count)}" for first in range(0, count, PER_UNIT)]


def wrap_in_list(value: Any) -> list:
    """Return a list as it is, a single value in a list, and nothing as an empty list."""
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, list) else [value]


def read_rows(file: Path) -> Iterator[Row | BrokenRow]:
    """Read the rows of a table one after the other.

    Raises:
        DataError: for what is no such table as a whole, or breaks off so that what follows can't be found.
    """
    try:
        with reading(str(file)):
            for number, row in enumerate(_iterate_rows(file)):
                problem = None if isinstance(row, BrokenRow) else find_problem(row)
                yield row if problem is None else BrokenRow(f"{file}: row {number}", problem)
    except ForeignFileError as error:
        raise DataError(str(error)) from None


def _iterate_rows(file: Path) -> Iterator[Row | BrokenRow]:
    """Read the rows of a table, whatever a library raises for it."""
    if not file.is_file():
        raise ForeignFileError(f"{file} isn't a regular file")
    if file.suffix == ".csv":
        # Bytes that are no Unicode become halves of surrogate pairs, which are found in the row that they are in.
        with file.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as opened:
            for number, row in iterate_csv(opened, str(file)):
                yield BrokenRow(f"{file}:{number}", row) if isinstance(row, str) else row
    elif file.suffix in (".json", ".jsonl"):
        with file.open(encoding="utf-8-sig", errors="surrogateescape") as opened:
            yield from parse_json_rows(opened, str(file))
    elif file.suffix == ".parquet":
        for batch in pq.ParquetFile(file).iter_batches(256):
            yield from _list_rows(batch)
    else:
        with pa.memory_map(str(file)) as opened:
            for batch in _read_arrow_batches(opened):
                yield from _list_rows(batch)


def _list_rows(batch: pa.RecordBatch) -> list[Row]:
    # What a file says of its own columns is checked before anything follows it.
    batch.validate(full=True)
    return batch.to_pylist()


def parse_json_rows(text: TextIO, name: str) -> Iterator[Row | BrokenRow]:
    """Read the objects of a JSON list, or of JSON lines.

    Args:
        text: an open file at its beginning.
        name: of the file, for messages.

    Raises:
        DataError: when it is neither.
    """
    # Lines are read one after the other, since there may be very many; a list can only be read as a whole.
    first_line = next((line for _, line in _iterate_lines(text) if line is None or line.strip()), "") or ""
    text.seek(0)
    rows = _parse_list(text, name) if first_line.lstrip("\ufeff \t").startswith("[") else None
    if rows is None:
        text.seek(0)
        yield from _parse_lines(text, name)
        return
    for number, row in enumerate(rows, start=1):
        problem = None if isinstance(row, dict) else f"it must be an object, got {type(row).__name__}"
        problem = problem or find_problem(row)
        yield row if problem is None else BrokenRow(f"{name}: number {number}", problem)


def _parse_list(text: TextIO, name: str) -> list[Any] | None:
    """Parse a JSON list; None for lines that hold a list each."""

    def read_whole_number(digits: str) -> Any:
        return int(digits) if len(digits) <= MAX_DIGITS else digits

    content = text.read()
    try:
        return json.loads(content, parse_int=read_whole_number)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            return None
        raise DataError(f"{name} is neither a JSON list nor JSON lines ({error})") from None


def _parse_lines(text: TextIO, name: str) -> Iterator[Row | BrokenRow]:
    for number, line in _iterate_lines(text):
        place = f"{name}:{number}"
        if line is None:
            yield BrokenRow(place, f"a line of more than {MAX_LINE} characters")
        elif line.strip():
            try:
                row = parse_json(line, place, finite=False)
            except ForeignFileError as error:
                yield BrokenRow(place, str(error).removeprefix(place).strip())
                continue
            yield row if isinstance(row, dict) else BrokenRow(place, f"it must be an object, got {shorten(row, 40)}")


def _iterate_lines(text: TextIO) -> Iterator[tuple[int, str | None]]:
    """List (number, line); None for a line that is too long, which is passed over to its end."""
    number = 0
    while line := text.readline(MAX_LINE):
        number += 1
        too_long = len(line) == MAX_LINE
        while len(line) == MAX_LINE:
            line = text.readline(MAX_LINE)
        yield number, None if too_long else line


def _read_arrow_batches(opened: Any) -> Iterator[pa.RecordBatch]:
    """Read the batches of an Arrow stream or an Arrow file."""
    try:
        yield from pa.ipc.open_stream(opened)
    except pa.ArrowInvalid:
        opened.seek(0)
        reader = pa.ipc.open_file(opened)
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number)
