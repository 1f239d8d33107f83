"""Writing files that are whole or not there at all, and reading files that others have made, within limits.

A file from elsewhere may hold anything: another format, other types, 10 GB where a kilobyte was meant, lists within
lists without end. What reads one raises `ForeignFileError`, which names the file and says what is wrong with it.
"""

import csv
import errno
import io
import json
import math
import os
import re
import reprlib
import stat
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

MAX_BYTES = 64 * 2**20  # of a JSON or text file; the longest that we know of, a tokenizer, has 11 MiB
MAX_DEPTH = 64  # lists and mappings within each other
MAX_DIGITS = 200  # characters of one number
KINDS: dict[type, str] = {dict: "a mapping", list: "a list"}
SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = SHORT.maxlong = 100


class ForeignFileError(ValueError):
    """A file that others have made can't be read, or doesn't hold what it should; the message names it."""


@contextmanager
def reading(place: str, kind: str | None = None) -> Iterator[None]:
    """Turn whatever a library raises while it reads a file from elsewhere into a `ForeignFileError`.

    A library that is given the wrong bytes may raise almost anything: KeyError, TypeError, RecursionError, an error of
    its own. So everything is caught here, except for the end of the process. A `ForeignFileError` passes unchanged.

    Args:
        place: the file or folder, as it shall be named in the message.
        kind: what it is read as, such as "safetensors".
    """
    try:
        yield
    except ForeignFileError:
        raise
    except Exception as error:
        manner = f" as {kind}" if kind else ""
        raise ForeignFileError(f"{place} can't be read{manner} ({describe_error(error)})") from error


def describe_error(error: BaseException, limit: int = 200) -> str:
    """Describe an error in one line of at most `limit` characters: its kind and how its message begins."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return shorten(text, limit)


def shorten(value: Any, limit: int = 100) -> str:
    """Show a value for a message: a text as it is, and anything else as Python writes it, cut to `limit` characters."""
    if isinstance(value, str):
        text = value
    else:
        try:
            text = SHORT.repr(value)  # a plain `repr` of lists within lists could have no end
        except ValueError:
            text = f"a {type(value).__name__} that is too long to be written"  # Python writes at most 4300 digits
    text = " ".join(text.split()) if "\n" in text else text
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def spell_out(text: str) -> str:
    """Spell out what a terminal or a file can't show of a text from elsewhere: control characters and no Unicode."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def expand_path(value: Any, name: str) -> Path:
    """Make a path of what a user or a file has given: `~` becomes the home folder.

    Args:
        value: a text or a `Path`.
        name: of the option or the place in a file, for messages.

    Raises:
        ValueError: for what can't be a path on this system: another type, empty, too long, with a NUL character, or
            `~name` of a user that there isn't.
    """
    if not isinstance(value, str | os.PathLike) or not str(value):
        raise ValueError(f"{name} must be a path, got {shorten(value)!r}")
    try:
        path = Path(value).expanduser()
        os.lstat(path)  # the system itself says whether it can be a path
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno != errno.ENAMETOOLONG:
            return path
        raise ValueError(f"{name}={shorten(str(value))!r} can't be a path ({describe_error(error)})") from None
    return path


def read_bytes(path: Path, place: str | None = None, limit: int = MAX_BYTES) -> bytes:
    """Read a file from elsewhere, of at most `limit` bytes.

    Args:
        path: of a regular file or a link to one. A device or a pipe, which may never end, isn't opened for reading.
        place: what it is called in messages; None = its path.
        limit: most bytes that are accepted.

    Raises:
        ForeignFileError: when it isn't there, can't be opened, isn't a regular file or is larger.
    """
    place = place or str(path)
    try:
        # Without O_NONBLOCK opening a pipe would wait until someone writes into it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ForeignFileError(f"{place} can't be opened ({reason})") from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise ForeignFileError(f"{place} isn't a regular file")
    with os.fdopen(descriptor, "rb") as file:
        if status.st_size > limit:
            raise ForeignFileError(f"{place} has {status.st_size} bytes; at most {limit} are accepted")
        try:
            content = file.read(limit + 1)
        except OSError as error:
            raise ForeignFileError(f"{place} can't be read ({error.strerror})") from None
    if len(content) > limit:  # it has grown meanwhile, or its size was said to be 0 as in /proc
        raise ForeignFileError(f"{place} has more than {limit} bytes")
    return content


def read_text(path: Path, place: str | None = None, limit: int = MAX_BYTES) -> str:
    """Read a UTF-8 file from elsewhere, with or without a byte order mark; arguments and errors as in `read_bytes`."""
    content = read_bytes(path, place, limit)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ForeignFileError(f"{place or path} isn't UTF-8 (byte {error.start})") from None


def read_lines(path: Path, place: str | None = None, limit: int = MAX_BYTES) -> list[str]:
    """Read the lines of a UTF-8 file from elsewhere; arguments and errors as in `read_bytes`.

    Lines end as on any system. Unicode has further characters that break lines on a screen, such as U+2028, and people
    have them inside of their texts: they end no line here.
    """
    return re.split("\r\n|\n|\r", read_text(path, place, limit))


def read_csv(path: Path, place: str | None = None, limit: int = MAX_BYTES) -> list[dict[str, str]]:
    """Read the rows of a CSV file from elsewhere by the names of its columns; arguments as in `read_bytes`.

    Raises:
        ForeignFileError: as `read_text` does, and when it isn't CSV or a row doesn't have as many columns as the first.
    """
    place = place or str(path)
    rows: list[dict[str, str]] = []
    for number, row in iterate_csv(io.StringIO(read_text(path, place, limit), newline=""), place):
        if isinstance(row, str):
            raise ForeignFileError(f"{place}:{number}: {row}")
        rows.append(row)
    return rows


def iterate_csv(text: TextIO, place: str) -> Iterator[tuple[int, dict[str, str] | str]]:
    """Read the rows of CSV one after the other, as (line, row) or (line, what is wrong with it).

    Args:
        text: opened with `newline=""`, so that line breaks inside of fields stay as they are.
        place: of the file, for messages.

    Raises:
        ForeignFileError: when it isn't CSV.
    """
    # Python's limit for all readers is 128 KiB; a caption may be longer, and so may a picture that is written out.
    csv.field_size_limit(MAX_BYTES)
    reader = csv.reader(text, strict=True)
    try:
        columns = next((row for row in reader if row), [])
    except csv.Error as error:
        raise ForeignFileError(f"{place}:{reader.line_num} isn't CSV ({error})") from None
    if len(set(columns)) < len(columns):
        raise ForeignFileError(f"{place} has two columns of one name: {shorten(columns)}")
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:  # the next line is read as if this one hadn't been there
            yield reader.line_num, f"it isn't CSV ({error})"
            continue
        if len(row) == len(columns):
            yield reader.line_num, dict(zip(columns, row, strict=True))
        elif row:
            yield reader.line_num, f"a row of {len(row)} fields where the first line has {len(columns)}"


def read_json(
    path: Path, place: str | None = None, kind: type | None = None, limit: int = MAX_BYTES, finite: bool = True
) -> Any:
    """Read a JSON file from elsewhere.

    Args:
        path: of the file.
        place: what it is called in messages; None = its path.
        kind: `dict` or `list`, if only that is accepted.
        limit: most bytes that are accepted.
        finite: refuse NaN and infinite numbers.

    Raises:
        ForeignFileError: as `read_bytes` and `parse_json` do.
    """
    return parse_json(read_text(path, place, limit), place or str(path), kind, finite)


def parse_json(content: str | bytes, place: str, kind: type | None = None, finite: bool = True) -> Any:
    """Parse JSON that others have written.

    Args:
        content: UTF-8 where it is bytes, with or without a byte order mark. Its size is checked by whoever reads it.
        place: the file, and the line where there are several, for messages.
        kind: `dict` or `list`, if only that is accepted.
        finite: refuse NaN and infinite numbers.

    Raises:
        ForeignFileError: when it isn't JSON, is nested more than `MAX_DEPTH` deep, has a number of more than
            `MAX_DIGITS` characters or text that isn't valid Unicode, or isn't of the `kind` that is asked for.
    """

    def refuse(reason: str) -> Any:
        raise ForeignFileError(f"{place} isn't JSON that is accepted ({reason})")

    def read_whole_number(text: str) -> int:
        return int(text) if len(text) <= MAX_DIGITS else refuse(f"a number of {len(text)} digits")

    def read_number(text: str) -> float:
        value = float(text)
        if len(text) > MAX_DIGITS or (finite and not math.isfinite(value)):
            refuse(f"the number {shorten(text, 20)}")
        return value

    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content.removeprefix("\ufeff")
        value = json.loads(text, parse_int=read_whole_number, parse_float=read_number, parse_constant=read_number)
    except RecursionError:
        refuse(f"it is nested more than {MAX_DEPTH} deep")
    except UnicodeDecodeError as error:
        raise ForeignFileError(f"{place} isn't UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise ForeignFileError(f"{place} isn't JSON ({error})") from None
    problem = find_problem(value)
    if problem:
        refuse(problem)
    if kind is not None and not isinstance(value, kind):
        raise ForeignFileError(f"{place} must hold {KINDS.get(kind, kind.__name__)}, got {shorten(value)}")
    return value


def find_problem(value: Any) -> str | None:
    """Say what is wrong with plain values from elsewhere: too deep, or text that is no Unicode; None if nothing."""
    # A list of what is still to be seen, since a function that calls itself would itself go too deep.
    waiting = [(value, 0)]
    while waiting:
        part, depth = waiting.pop()
        if depth > MAX_DEPTH:
            return f"it is nested more than {MAX_DEPTH} deep"
        if isinstance(part, str) and not is_valid_text(part):
            return f"the text {shorten(ascii(part), 60)} isn't valid Unicode"
        if isinstance(part, dict):
            waiting += [(key, depth) for key in part]
            waiting += [(entry, depth + 1) for entry in part.values()]
        elif isinstance(part, list | tuple):
            waiting += [(entry, depth + 1) for entry in part]
    return None


def is_valid_text(text: str) -> bool:
    """Whether a text can be written as UTF-8; one with half of a surrogate pair, as JSON may hold, can't."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def write_whole(path: Path, content: bytes, scratch: Path | None = None) -> None:
    """Write a file under a temporary name and then rename it; where that fails, nothing is left of it.

    Args:
        path: the file.
        content: its bytes.
        scratch: folder on the same disk for the temporary file, so that none is left beside `path` when the process is
            killed; None = the folder of `path`.

    Raises:
        OSError: when it can't be written, as on a full disk.
    """
    folder = scratch or path.parent
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{path.name}.{uuid.uuid4().hex}"  # not the process's number, which repeats on other machines
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def append_lines(path: Path, lines: Sequence[str]) -> None:
    """Append lines to a file of lines; where they don't fit on the disk, the file is left as it was.

    Raises:
        OSError: when they can't be written.
    """
    if not lines:
        return
    # Without a buffer, which would be written once more when the file is closed.
    with path.open("ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        # A process that was killed may have left a line without its end.
        start = b"\n" if size and not _ends_with_newline(path) else b""
        content = memoryview(start + "".join(f"{line}\n" for line in lines).encode())
        try:
            while content:  # a disk that is nearly full takes a part
                content = content[file.write(content) :]
        except OSError:
            os.truncate(path, size)
            raise


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def read_json_lines(path: Path) -> Iterator[Any]:
    """Read the values of a file of JSON lines that we write ourselves; a line that is torn is left out."""
    for line in path.read_bytes().split(b"\n"):
        try:
            yield json.loads(line)
        except (ValueError, RecursionError):
            continue


def read_prompts(path: str, option: str) -> list[str]:
    """Read the prompts of a file: one a line, or JSON lines with `prompt`.

    Args:
        path: the file.
        option: name of the user's option that gives it, for messages.

    Raises:
        ValueError: naming file and line, when it isn't of that form.
    """
    place = f"{option}={path}"
    file = expand_path(path, option)
    if not file.exists():
        raise ValueError(f"{place} doesn't exist")
    lines = read_lines(file, place)
    # Each line is a prompt, unless the file's name says that it holds JSON lines.
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if file.suffix != ".jsonl":
            prompts.append(line.strip())
            continue
        row = parse_json(line, f"{place}, line {number}")
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            given = shorten(line.strip())
            raise ValueError(f"{place}, line {number} needs a 'prompt' that is a string, got {given}")
        prompts.append(row["prompt"])
    if not prompts:
        raise ValueError(f"{place} holds no prompt")
    return prompts
