"""Files from elsewhere are read within limits, and what is wrong with one is said in one line that names it."""

import json
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tbac.files import (
    MAX_DEPTH,
    MAX_DIGITS,
    ForeignFileError,
    append_lines,
    expand_path,
    find_problem,
    parse_json,
    read_bytes,
    read_json,
    read_json_lines,
    reading,
)

BAD_JSON: dict[str, bytes] = {
    "empty": b"",
    "a space": b" ",
    "torn": b'{"a": [1, 2',
    "garbage": b"\x89PNG\r\n\x1a\n",
    "not UTF-8": b'{"a": "\xff"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "two values": b"{} {}",
    "deep lists": b"[" * 100_000,
    "deep mappings": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "just too deep": b"[" * (MAX_DEPTH + 2) + b"]" * (MAX_DEPTH + 2),
    "a long number": b"[" + b"9" * 5000 + b"]",
    "a number just too long": b"[" + b"9" * (MAX_DIGITS + 1) + b"]",
    "a long fraction": b"[0." + b"1" * 5000 + b"]",
    "NaN": b"[NaN]",
    "Infinity": b"[-Infinity]",
    "too large for a float": b"[1e999]",
    "half a surrogate pair": b'["\\ud800"]',
    "half a surrogate pair as a key": b'{"\\udfff": 1}',
}


@pytest.mark.parametrize("content", BAD_JSON.values(), ids=BAD_JSON)
def test_json_that_can_t_be_used_is_named_in_one_line(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_bytes(content)
    with pytest.raises(ForeignFileError, match=r"x\.json isn't") as error:
        read_json(file)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < len(str(tmp_path)) + 300


@pytest.mark.parametrize("value", [{}, [], 0, "é", None, 1e300, {"a": [{"b": [1, "猫", None, True]}]}])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_other_json_comes_back_as_it_was(value: Any, mark: bytes, tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    for ascii_only in (True, False):
        file.write_bytes(mark + json.dumps(value, ensure_ascii=ascii_only).encode())
        assert read_json(file) == value


def test_what_is_as_deep_and_as_long_as_is_accepted_comes_back() -> None:
    deep = parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH, "x")
    assert find_problem(deep) is None
    assert parse_json("9" * MAX_DIGITS, "x") == 10**MAX_DIGITS - 1


def test_numbers_that_aren_t_finite_are_read_only_when_they_are_asked_for() -> None:
    values = parse_json("[NaN, Infinity, 1e999]", "x", finite=False)
    assert [str(value) for value in values] == ["nan", "inf", "inf"]


@pytest.mark.parametrize(("kind", "content"), [(dict, "[]"), (list, "{}"), (dict, "5"), (list, "null")])
def test_another_kind_of_value_is_refused_by_name(kind: type, content: str) -> None:
    with pytest.raises(ForeignFileError, match=r"x must hold a (mapping|list), got"):
        parse_json(content, "x", kind)


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_folder(path: Path) -> None:
    path.mkdir()


def make_link_to_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def make_loop(path: Path) -> None:
    path.symlink_to(path)


def make_nothing(path: Path) -> None:
    pass


def make_sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


@pytest.mark.parametrize("make", [make_pipe, make_folder, make_link_to_device, make_loop, make_nothing, make_sparse])
def test_what_isn_t_a_file_of_reasonable_size_is_never_read(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "x.json")
    with pytest.raises(ForeignFileError, match=r"x\.json"):
        read_bytes(tmp_path / "x.json")


@pytest.mark.parametrize("value", ["~nobody-has-this-name/x", "a" * 10_000, "a\x00b", "", 5, None, ["x"], b"x"])
def test_what_can_t_be_a_path_is_named(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^out"):
        expand_path(value, "out")


def test_a_path_gets_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert expand_path("~/a=b,c", "out") == Path("/somewhere/a=b,c")
    assert expand_path(Path("a"), "out") == Path("a")


@pytest.mark.parametrize("error", [KeyError("x"), RecursionError(), MemoryError(), TypeError("a\nb"), AssertionError()])
def test_whatever_a_library_raises_names_the_file(error: Exception) -> None:
    with pytest.raises(ForeignFileError, match=r"^x\.bin can't be read") as raised, reading("x.bin"):
        raise error
    assert "\n" not in str(raised.value)
    assert raised.value.__cause__ is error


def test_an_interruption_passes() -> None:
    with pytest.raises(KeyboardInterrupt), reading("x.bin"):
        raise KeyboardInterrupt


@pytest.mark.parametrize("room", [0, 1, 5, 4096, 70_000])
def test_lines_that_find_no_room_leave_the_file_as_it_was(room: int, tmp_path: Path) -> None:
    """The process may write only so much further, which is what a disk that is nearly full is like."""
    file = tmp_path / "x.jsonl"
    append_lines(file, ['{"a": 1}'])
    before = file.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + room, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            append_lines(file, ['{"b": "%s"}' % ("x" * 50_000), '{"c": "%s"}' % ("x" * 50_000)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert file.read_bytes() == before
    file.write_bytes(before + b'{"torn": ')
    append_lines(file, ['{"d": 2}'])
    assert list(read_json_lines(file)) == [{"a": 1}, {"d": 2}]
