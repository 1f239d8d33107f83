"""One reader for all tables: the same rows from each kind of file, and what is wrong in one is named."""

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.datasets.rows import cut_into_units, read_rows, wrap_in_list
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
    assert [dict(row) for row in read_rows(write(name))] == ROWS


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1}\n{"a": \n', r"x\.json:2 is neither in a JSON list nor a line of JSON"),
        ("[{}, ", r"x\.json is neither a JSON list nor JSON lines"),
        ("[{}, 3]", r"x\.json: number 2 must be an object, got int"),
        ('{"a": 1}\n7\n', r"x\.json: number 2 must be an object, got int"),
    ],
)
def test_what_isnt_a_row_is_named(text: str, words: str) -> None:
    Path("x.json").write_text(text)
    with pytest.raises(DataError, match=words):
        list(read_rows(Path("x.json")))


def test_rows_are_read_as_they_come() -> None:
    Path("x.jsonl").write_text('{"a": 1}\nbroken\n')
    assert next(iter(read_rows(Path("x.jsonl")))) == {"a": 1}


def test_units_hold_every_row_once() -> None:
    assert cut_into_units(4001, "x:") == ["x:0:2000", "x:2000:4000", "x:4000:4001"]
    assert cut_into_units(0) == []


@pytest.mark.parametrize(("value", "expected"), [(None, []), ("", []), ("a", ["a"]), (["a", "b"], ["a", "b"])])
def test_one_value_is_a_list_of_it(value: object, expected: list) -> None:
    assert wrap_in_list(value) == expected
