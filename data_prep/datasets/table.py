"""Pictures of your own, or of any dataset, listed in a table or in a Hugging Face `datasets` folder."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from data_prep.datasets.fields import build_edit, build_text_to_image
from data_prep.datasets.rows import read_rows, wrap_in_list
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
        images: folder that paths are relative to; None takes the folder of the table.

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
        self.files = [file for file in candidates if file.suffix in self.kinds and file.is_file()]
        if not self.files:
            raise DataError(f"dataset.path={self.path} holds no table ({', '.join(self.kinds)})")
        needed = [self.text, self.image, *self.sources]
        if self.key:
            needed.append(self.key)
        for file in self.files:
            first = next(iter(read_rows(file)), None)
            absent = [column for column in needed if first is not None and column not in first]
            if first is not None and absent:
                raise DataError(f"{file} has no column {absent[0]!r}; it has {', '.join(map(str, first))}")

    def list_units(self) -> Sequence[str]:
        """List the numbers of the files."""
        return [str(i) for i in range(len(self.files))]

    def read(self, unit: str, scratch: Path) -> Iterator[Record | Rejected]:
        """Read the samples of a file in the order of its rows."""
        file = self.files[int(unit)]
        folder = Path(self.images).expanduser() if self.images else file.parent
        for number, row in enumerate(read_rows(file)):
            key = str(row[self.key]) if self.key else f"{file.stem}_{number:07d}"
            yield self._read_sample(key, row, folder)

    def _read_sample(self, key: str, row: Mapping[str, Any], folder: Path) -> Record | Rejected:
        text = row.get(self.text)
        if not isinstance(text, str) or not text.strip():
            return Rejected(key, "no caption")
        values = [value for column in self.sources for value in wrap_in_list(row.get(column))]
        try:
            target = read_picture(row.get(self.image), folder)
            sources = [read_picture(value, folder) for value in values]
        except OSError as error:
            return Rejected(f"{key}: {error}", "a picture that isn't found")
        if target is None:
            return Rejected(key, "no target image")
        if not self.sources:
            return build_text_to_image(key, text, target)
        given = [source for source in sources if source is not None]
        if not given or len(given) < len(sources):
            return Rejected(key, "no source image")
        return build_edit(key, text, given, target)


def read_picture(value: Any, folder: Path) -> bytes | None:
    """Return the bytes of a picture, given as such or read from its path; None where there is none.

    Raises:
        OSError: when the file can't be read.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    if isinstance(value, str) and value:
        return (folder / value).read_bytes()
    return None
