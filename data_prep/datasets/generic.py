"""Pictures of one's own: a folder with captions beside them, a table, or a Hugging Face `datasets` folder."""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.datasets.fields import edit, text_to_image
from data_prep.shards.conversion import Record, Rejected
from tbac.data.decoding import IMAGE_EXTENSIONS
from tbac.data.shards import DataError

SLICE = 2000  # samples of a unit


def slices(count: int, prefix: str = "") -> list[str]:
    """Names of runs of `SLICE` samples."""
    return [f"{prefix}{i}:{min(i + SLICE, count)}" for i in range(0, count, SLICE)]


class ImageFolder:
    """A folder, at any depth, of images with a `.txt` of the same name beside each.

    Args:
        path: the folder.
        name: of the dataset.

    Raises:
        DataError: when there is no image.
    """

    expected = None

    def __init__(self, path: str, name: str = "folder") -> None:
        self.root, self.name = Path(path).expanduser(), name
        found = (p for p in self.root.rglob("*") if p.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS and p.is_file())
        self.files = sorted(p.relative_to(self.root).as_posix() for p in found)
        if not self.files:
            raise DataError(f"dataset.path={path} holds no image ({', '.join(IMAGE_EXTENSIONS)})")

    def units(self) -> Sequence[str]:
        """Slices of the sorted files."""
        return slices(len(self.files))

    def read(self, unit: str, scratch: Path) -> Iterator[Record | Rejected]:
        """Samples in the order of the paths."""
        start, stop = map(int, unit.split(":"))
        for name in self.files[start:stop]:
            path = self.root / name
            text = path.with_suffix(".txt")
            if not text.is_file():
                yield Rejected(name, "no caption")
                continue
            record = text_to_image(name.rsplit(".", 1)[0], "", path.read_bytes(), name)
            yield Record(record.key, {**record.fields, "txt": text.read_bytes()})


class Table:
    """Rows of CSV, JSON lines, Parquet, or Arrow files (what `datasets.Dataset.save_to_disk` writes).

    A picture is a path, bytes, or a mapping with `bytes` or `path`, as Hugging Face stores images.

    Args:
        path: a file, or a folder of files of one kind.
        name: of the dataset.
        text: column of the caption or instruction.
        image: column of the picture to be made.
        sources: columns of input pictures, for edits; a column may hold a list.
        key: column of the key; None numbers the rows.
        images: folder that paths are relative to; None = that of the file.

    Raises:
        DataError: when there is no such file, or a column isn't there.
    """

    expected = None
    kinds = (".csv", ".jsonl", ".parquet", ".arrow")

    def __init__(
        self,
        path: str,
        name: str = "table",
        text: str = "text",
        image: str = "image",
        sources: Sequence[str] = (),
        key: str | None = None,
        images: str | None = None,
    ) -> None:
        self.path, self.name = Path(path).expanduser(), name
        self.text, self.image, self.sources, self.key = text, image, list(sources), key
        found = sorted(self.path.rglob("*")) if self.path.is_dir() else [self.path]
        self.files = [file for file in found if file.suffix in self.kinds and file.is_file()]
        if not self.files:
            raise DataError(f"dataset.path={path} holds no table ({', '.join(self.kinds)})")
        self.images = Path(images).expanduser() if images else None
        for file in self.files:
            first = next(iter(read_rows(file)), None)
            needed = [text, image, *self.sources, *([key] if key else [])]
            if first is not None and (absent := [column for column in needed if column not in first]):
                raise DataError(f"{file} has no column {absent[0]!r}; it has {', '.join(map(str, first))}")

    def units(self) -> Sequence[str]:
        """One for each file."""
        return [str(i) for i in range(len(self.files))]

    def read(self, unit: str, scratch: Path) -> Iterator[Record | Rejected]:
        """Samples in the order of the rows."""
        file = self.files[int(unit)]
        folder = self.images or file.parent
        for number, row in enumerate(read_rows(file)):
            key = str(row[self.key]) if self.key else f"{file.stem}_{number:07d}"
            text = row.get(self.text)
            if not isinstance(text, str) or not text.strip():
                yield Rejected(key, "no caption")
                continue
            try:
                target = picture_bytes(row.get(self.image), folder)
                inputs = [picture_bytes(value, folder) for column in self.sources for value in as_list(row.get(column))]
            except OSError as error:
                yield Rejected(f"{key}: {error}", "a picture that isn't found")
                continue
            if target is None or None in inputs or (self.sources and not inputs):
                yield Rejected(key, "no target image" if target is None else "no source image")
                continue
            sources = [data for data in inputs if data is not None]
            yield edit(key, text, sources, target) if self.sources else text_to_image(key, text, target)


def read_rows(file: Path) -> Iterator[Mapping[str, Any]]:
    """Rows of a table, as they come."""
    if file.suffix == ".csv":
        with file.open(newline="", encoding="utf-8-sig") as opened:
            yield from csv.DictReader(opened)
    elif file.suffix == ".jsonl":
        with file.open(encoding="utf-8-sig") as opened:
            for number, line in enumerate(opened, start=1):
                if line.strip():
                    try:
                        yield json.loads(line)
                    except json.JSONDecodeError as error:
                        raise DataError(f"{file}:{number} isn't JSON ({error})") from None
    elif file.suffix == ".parquet":
        for batch in pq.ParquetFile(file).iter_batches(256):
            yield from batch.to_pylist()
    else:
        with pa.memory_map(str(file)) as opened:
            for batch in _arrow_batches(opened):
                yield from batch.to_pylist()


def _arrow_batches(opened: Any) -> Iterator[pa.RecordBatch]:
    """Batches of an Arrow stream, or of an Arrow file."""
    try:
        yield from pa.ipc.open_stream(opened)
    except pa.ArrowInvalid:
        opened.seek(0)
        reader = pa.ipc.open_file(opened)
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number)


def as_list(value: Any) -> list:
    """A list as it is; one value as a list of it; nothing as an empty one."""
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, list) else [value]


def picture_bytes(value: Any, folder: Path) -> bytes | None:
    """Bytes of a picture: given as such, or read from its path; None where there is none.

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
