"""One reader for all tables: the same rows from each kind of file, and what is wrong in one is named."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.datasets.rows import BrokenRow, cut_into_units, read_rows, wrap_in_list
from tbac.data.shards import DataError

ROWS = [{"text": f"caf\xe9 {i}", "image": f"{i}.png"} for i in range(3)]


def write(name: str) -> Path:
    file = Path(name)
    if file.suffix == ".csv":
        with file.open("w", newline="", encoding="utf-8") as opened:
            table = csv.DictWriter(opened, ["text", "image"])
            table.writeheader()
            table.writerows(ROWS)
    elif file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), file)
    elif name == "stream.arrow":
        with pa.OSFile(name, "wb") as opened, pa.ipc.new_stream(opened, pa.Table.from_pylist(ROWS).schema) as out:
            out.write_table(pa.Table.from_pylist(ROWS))
    elif name == "file.arrow":
        with pa.OSFile(name, "wb") as opened, pa.ipc.new_file(opened, pa.Table.from_pylist(ROWS).schema) as out:
            out.write_table(pa.Table.from_pylist(ROWS))
    elif name == "lines.json":
        file.write_text("\n\n".join(map(json.dumps, ROWS)))
    elif file.suffix == ".jsonl":
        file.write_text("\ufeff" + "".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    else:
        file.write_text("\n" + json.dumps(ROWS, indent=2))
    return file


@pytest.mark.parametrize(
    "name", ["x.csv", "x.parquet", "stream.arrow", "file.arrow", "x.jsonl", "lines.json", "list.json"]
)
def test_every_kind_of_file_gives_the_same_rows(name: str) -> None:
    assert list(read_rows(write(name))) == ROWS


BROKEN_ROWS = {
    '{"a": 1}\n{"a": \n{"a": 2}\n': (r"x\.json:2", "isn't JSON"),
    "[{}, 3, {}]": (r"x\.json: number 2", "it must be an object, got int"),
    '{"a": 1}\n7\n{"a": 2}': (r"x\.json:2", "it must be an object, got 7"),
    '{"a": 1}\n["a", "b"]\n{"a": 2}': (r"x\.json:2", r"it must be an object, got \['a', 'b'\]"),
    '["a"]\n{"a": 1}\n{"a": 2}\n': (r"x\.json:1", r"it must be an object, got \['a'\]"),
    '{"a": 1}\n{"a": "\\ud800"}\n{"a": 2}': (r"x\.json:2", "isn't valid Unicode"),
    '[{"a": 1}, {"a": "\\ud800"}, {}]': (r"x\.json: number 2", "isn't valid Unicode"),
    '{"a": 1}\n{"a": ' + "9" * 5000 + '}\n{"a": 2}': (r"x\.json:2", "a number of 5000 digits"),
    '{"a": 1}\n{"a": ' + "[" * 10_000 + '\n{"a": 2}': (r"x\.json:2", "nested more than"),
    '{"a": 1}\n{"a": "caf\udce9"}\n{"a": 2}': (r"x\.json:2", "isn't valid Unicode"),
}


@pytest.mark.parametrize("text", BROKEN_ROWS)
def test_a_broken_row_is_named_and_the_others_are_read(text: str) -> None:
    Path("x.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    rows = list(read_rows(Path("x.json")))
    (broken,) = [row for row in rows if isinstance(row, BrokenRow)]
    assert len(rows) == 3
    place, reason = BROKEN_ROWS[text]
    assert re.fullmatch(place, broken.place)
    assert re.search(reason, broken.reason)


@pytest.mark.parametrize("text", ["[{}, ", "[" * 100_000, "[1e5, x]"])
def test_a_list_that_breaks_off_is_named(text: str) -> None:
    Path("x.json").write_text(text)
    with pytest.raises(DataError, match=r"x\.json is neither a JSON list nor JSON lines"):
        list(read_rows(Path("x.json")))


@pytest.mark.parametrize("name", ["x.parquet", "stream.arrow", "file.arrow"])
@pytest.mark.parametrize("change", [
    lambda data: b"", lambda data: data[:-10], lambda data: data[:50], lambda data: b"garbage" * 100,
    lambda data: data[:100] + bytes(100) + data[200:], lambda data: data[: len(data) // 2] + data[len(data) // 2 + 8 :],
], ids=["empty", "torn", "head", "garbage", "hole", "shifted"])  # fmt: skip
def test_a_table_of_other_bytes_gives_its_rows_or_is_named(name: str, change: Callable[[bytes], bytes]) -> None:
    file = write(name)
    file.write_bytes(change(file.read_bytes()))
    try:
        rows = list(read_rows(file))
    except DataError as error:
        text = str(error)
        assert name in text, text
        return
    assert all(isinstance(row, BrokenRow) or set(row) == {"text", "image"} for row in rows)


def test_broken_rows_of_csv_are_named_and_the_others_are_read() -> None:
    Path("x.csv").write_bytes(b'text,image\na,1.png\nb\n"c"d,2.png\ncaf\xe9,3.png\ne,4.png\n"torn,5.p')
    rows = list(read_rows(Path("x.csv")))
    assert [dict(row) for row in rows if not isinstance(row, BrokenRow)] == [
        {"text": "a", "image": "1.png"}, {"text": "e", "image": "4.png"},
    ]  # fmt: skip
    assert len([row for row in rows if isinstance(row, BrokenRow)]) == 4


def test_rows_are_read_as_they_come() -> None:
    Path("x.jsonl").write_text('{"a": 1}\nbroken\n')
    assert next(iter(read_rows(Path("x.jsonl")))) == {"a": 1}


def test_units_hold_every_row_once() -> None:
    assert cut_into_units(4001, "x:") == ["x:0:2000", "x:2000:4000", "x:4000:4001"]
    assert cut_into_units(0) == []


@pytest.mark.parametrize(("value", "expected"), [(None, []), ("", []), ("a", ["a"]), (["a", "b"], ["a", "b"])])
def test_one_value_is_a_list_of_it(value: object, expected: list) -> None:
    assert wrap_in_list(value) == expected
