"""Pictures of your own, or of any dataset, listed in a table or in a Hugging Face `datasets` folder."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

from data_prep.datasets.fields import build_edit, build_text_to_image
from data_prep.datasets.folders import DataFolder, LookupFailedError
from data_prep.datasets.rows import BrokenRow, read_rows, wrap_in_list
from data_prep.shards.conversion import Record, Rejected
from tbac.data.shards import DataError


@dataclass
class Table:
    """Rows of CSV, JSON lines, Parquet, or Arrow files (what `datasets.Dataset.save_to_disk` writes).

    A picture is given as a path, as bytes, or as a mapping with `bytes` or `path`, as Hugging Face stores images.

    Args:
        path: a file, or a folder of files of one kind.
        name: of the dataset.
        text: column of the caption or instruction.
        image: column of the target.
        sources: columns of input pictures, for edits; a column may hold a list.
        key: column of the key; None numbers the rows.
        images: folder that paths are relative to, and that no picture lies outside of; None takes the folder of the
            table.

    Raises:
        DataError: when there is no such file, or a column isn't there.
    """

    kinds: ClassVar = (".csv", ".jsonl", ".parquet", ".arrow")
    expected: ClassVar[int | None] = None

    path: str
    name: str = "table"
    text: str = "text"
    image: str = "image"
    sources: Sequence[str] = ()
    key: str | None = None
    images: str | None = None

    def __post_init__(self) -> None:
        path = Path(self.path).expanduser()
        candidates = sorted(path.rglob("*")) if path.is_dir() else [path]
        folder = DataFolder(path if path.is_dir() else path.parent)
        # A file that was named is read wherever it is a link to; one that is found in a folder has to belong to it.
        self.files = [file for file in candidates if file.suffix in self.kinds and (file == path or folder.holds(file))]
        if not self.files:
            raise DataError(f"dataset.path={self.path} holds no table ({', '.join(self.kinds)})")
        needed = [self.text, self.image, *self.sources]
        if self.key:
            needed.append(self.key)
        for file in self.files:
            first = next((row for row in read_rows(file) if not isinstance(row, BrokenRow)), None)
            absent = [column for column in needed if first is not None and column not in first]
            if first is not None and absent:
                raise DataError(f"{file} has no column {absent[0]!r}; it has {', '.join(map(str, first))}")

    def list_units(self) -> Sequence[str]:
        """List the numbers of the files."""
        return [str(i) for i in range(len(self.files))]

    def read(self, unit: str, scratch: Path) -> Iterator[Record | Rejected]:
        """Read the samples of a file in the order of its rows."""
        file = self.files[int(unit)]
        folder = DataFolder(Path(self.images).expanduser() if self.images else file.parent)
        rows = read_rows(file)
        for number in count():
            try:
                row = next(rows)
            except StopIteration:
                return
            except DataError as error:
                yield Rejected(str(error), "a table that breaks off")
                return
            if isinstance(row, BrokenRow):
                yield Rejected(f"{row.place}: {row.reason}", "a row that can't be read")
                continue
            key = f"{file.stem}_{number:07d}"
            if self.key:
                key = "" if row.get(self.key) is None else str(row[self.key])
            yield self._read_sample(key, row, folder)

    def _read_sample(self, key: str, row: Mapping[str, Any], folder: DataFolder) -> Record | Rejected:
        text = row.get(self.text)
        if not isinstance(text, str) or not text.strip():
            return Rejected(key, "no caption")
        values = [value for column in self.sources for value in wrap_in_list(row.get(column))]
        try:
            target = read_picture(row.get(self.image), folder)
            sources = [read_picture(value, folder) for value in values]
        except LookupFailedError as error:
            return Rejected(f"{key}: {error}", "a picture that isn't found")
        if target is None:
            return Rejected(key, "no target image")
        if not self.sources:
            return build_text_to_image(key, text, target)
        given = [source for source in sources if source is not None]
        if not given or len(given) < len(sources):
            return Rejected(key, "no source image")
        return build_edit(key, text, given, target)


def read_picture(value: Any, folder: DataFolder) -> bytes | None:
    """Return the bytes of a picture, given as such or read from its path; None where there is none.

    Raises:
        LookupFailedError: when the file can't be read, or isn't inside of the folder.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    if isinstance(value, str) and value:
        return folder.read(folder.path / value)
    return None
