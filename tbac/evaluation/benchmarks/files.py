"""Reading a benchmark's files, which come from elsewhere: what is wrong with one is said by file, line and field."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tbac.files import ForeignFileError, describe_error, expand_path, parse_json, read_lines, shorten
from tbac.pictures import PictureError, check_header


class BenchmarkFileError(ForeignFileError):
    """A benchmark file has the wrong form; the message names file, line and field."""


def read_rows(path: str | Path, required: Mapping[str, type], check: Callable[[dict], str] | None = None) -> list[dict]:
    """Read the rows of a JSON-lines file.

    Args:
        path: the file.
        required: field that every row must have -> its type.
        check: returns what is wrong with a row, or "".

    Raises:
        BenchmarkFileError: when the file is absent or empty, or a row has the wrong form.
        ForeignFileError: when it can't be read, or a line isn't JSON.
    """
    # A path that someone typed may be wrong, and so may be the kind of file.
    path = expand_path(path, "benchmark.file")
    if not path.exists():
        raise BenchmarkFileError(f"benchmark file {path} doesn't exist")
    rows = []
    # Each row is checked now, since a fault that only shows up after hours of drawing is expensive. Lines end with a
    # newline alone: a text within JSON may hold other signs that Python takes for the end of a line.
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        row = parse_json(line, place, dict)
        # The required fields are checked first, so that `check` may rely on them.
        check_fields(row, required, place)
        problem = check(row) if check else ""
        if problem:
            raise BenchmarkFileError(f"{place}: {problem}")
        rows.append(row)
    if not rows:
        raise BenchmarkFileError(f"{path} holds no row")
    return rows


def check_fields(row: Any, required: Mapping[str, type], place: str) -> None:
    """Check that a row is a mapping with fields of the right types.

    Raises:
        BenchmarkFileError: naming the place, the field, its type and its value.
    """
    if not isinstance(row, dict):
        raise BenchmarkFileError(f"{place} must be a mapping, got {shorten(row)}")
    for name, kind in required.items():
        value = row.get(name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):  # in Python True is an int
            raise BenchmarkFileError(f"{place} needs {name!r} as {kind.__name__}, got {quote(value)}")


def quote(value: Any) -> str:
    """Show a value for a message so that the text '1' and the number 1 can be told apart."""
    return repr(shorten(value)) if isinstance(value, str) else shorten(value)


def locate_picture(folder: Path, name: str, place: str) -> Path:
    """Find a picture that a benchmark file names, in the folder that it must lie in.

    What the file names is shown to a model or sent to a judge, so nothing outside of the folder may be named, by `..`
    or by a link. Links into the blobs of a download of the Hugging Face hub stay inside of that download.

    Args:
        folder: of the pictures.
        name: of the file, relative to it.
        place: file and row that name it, for messages.

    Raises:
        BenchmarkFileError: for a name that leads out of the folder, and for what isn't a picture.
    """
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name or not name:
        raise BenchmarkFileError(f"{place}: a picture's path must stay inside of {folder}, got {shorten(name)!r}")
    try:
        real, root = (folder / path).resolve(), folder.resolve()
    except (OSError, RuntimeError) as error:
        raise BenchmarkFileError(f"{place}: {shorten(name)!r} can't be a path ({describe_error(error)})") from None
    allowed = [root, *(parent.parent / "blobs" for parent in root.parents if parent.name == "snapshots")]
    if not any(real.is_relative_to(parent) for parent in allowed):
        raise BenchmarkFileError(f"{place}: a picture's path must stay inside of {folder}, got a link to {real}")
    try:
        check_header(real, str(folder / path))
    except PictureError as error:
        raise BenchmarkFileError(f"{place}: {error}") from None
    return folder / path
