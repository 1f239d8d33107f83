"""GPT-Image-Edit-1.5M: archives in parts that hold their metadata, or pictures with JSON files for training."""

import io
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.datasets.archives import FileStore, find_archives, unpack_archive
from data_prep.datasets.fields import build_from_paths
from data_prep.datasets.folders import DataFolder, LookupFailedError
from data_prep.datasets.rows import BrokenRow, Row, cut_into_units, parse_json_rows, read_rows, wrap_in_list
from data_prep.shards.conversion import Record, Rejected
from tbac.data.shards import DataError

EXPECTED = 1_553_575
IMAGE_MARK = "<image>"  # marks the place of a picture in training conversations


def parse_row(row: Mapping[str, Any]) -> tuple[object, object, list, str]:
    """Read a row of either form of metadata; returns instruction, target, sources and kind."""
    if "conversations" not in row:
        kind = str(row.get("instruction_type") or "")
        return row.get("instruction"), row.get("output"), wrap_in_list(row.get("input")), kind
    # In training files the instruction is the first turn that holds more than the marks of pictures.
    turns = [turn.get("value") for turn in wrap_in_list(row["conversations"]) if isinstance(turn, dict)]
    texts = [turn.replace(IMAGE_MARK, "").strip() for turn in turns if isinstance(turn, str)]
    instruction = next(filter(None, texts), "")
    *sources, target = wrap_in_list(row.get("image")) or [None]
    return instruction, target, sources, ""


class GPTImageEdit:
    """Archives that hold metadata, or a folder of pictures with JSON files.

    Args:
        path: folder of the archives, or of what was unpacked from them.
        metadata: training JSON files (`{image: [input, output], conversations}`) relative to `path`; None takes the
            metadata in the archives (`<task>/metadata/*.json`).

    Raises:
        DataError: when there are neither archives nor metadata, or a file of `metadata` is absent.
    """

    name, expected = "GPT-Image-Edit-1.5M", EXPECTED

    def __init__(self, path: str, metadata: Sequence[str] | None = None) -> None:
        self.root = Path(path).expanduser()
        self.metadata = list(metadata or ())
        self.groups = find_archives(self.root)
        absent = [name for name in self.metadata if not (self.root / name).is_file()]
        if absent:
            raise DataError(f"dataset.metadata: {self.root / absent[0]} doesn't exist")
        folder = DataFolder(self.root)
        found = (file for file in self.root.glob("**/metadata/*.json") if folder.holds(file))
        loose = sorted(file.relative_to(self.root).as_posix() for file in found)
        self.loose = [] if self.metadata else loose
        compressed = [group for group in self.groups if not _is_uncompressed(group)]
        if self.metadata and compressed:
            raise DataError(
                f"{compressed[0][0]} is compressed; unpack it, or leave dataset.metadata out to use the metadata in it"
            )
        if not (self.groups or self.metadata or self.loose):
            raise DataError(f"dataset.path={path} holds neither archives nor */metadata/*.json; see dataset.metadata")
        self._store: FileStore | None = None
        self._rows: tuple[str, list[Row | BrokenRow]] | None = None  # name of a JSON file, and what it holds

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_store": None, "_rows": None}  # each process opens the files itself

    def _read_json(self, name: str) -> list[Row | BrokenRow]:
        """Read the rows of a JSON file. The last file is kept, since the units of a file follow each other."""
        if self._rows is None or self._rows[0] != name:
            self._rows = name, list(read_rows(self.root / name))
        return self._rows[1]

    def list_units(self) -> Sequence[str]:
        """List the archives that hold metadata, or else slices of the JSON files."""
        if self.groups and not self.metadata:
            return [group[0].relative_to(self.root).as_posix() for group in self.groups]
        units = []
        for name in self.metadata or self.loose:
            units += cut_into_units(len(self._read_json(name)), f"{name}:")
        return units

    def read(self, unit: str, scratch: Path) -> Iterator[Record | Rejected]:
        """Read the samples of a unit in the order of the metadata."""
        if self.groups and not self.metadata:
            yield from self._read_archive(unit, scratch)
            return
        if self._store is None:
            self._store = FileStore([self.root], self.groups)
        name, start, stop = unit.rsplit(":", 2)
        rows = self._read_json(name)
        for number in range(int(start), int(stop)):
            yield self._build_sample(self._store, name, number, rows[number])

    def _read_archive(self, unit: str, scratch: Path) -> Iterator[Record | Rejected]:
        group = next(g for g in self.groups if g[0].relative_to(self.root).as_posix() == unit)
        try:
            store = FileStore(archives=[unpack_archive(group, scratch)])
        except tarfile.TarError as error:
            yield Rejected(f"{unit}: {error}", "an archive that breaks off")
            return
        for name in store.broken:
            yield Rejected(name, "an archive that breaks off")
        metadata = [name for name in store.list_names() if "/metadata/" in f"/{name}" and name.endswith(".json")]
        if not metadata:
            yield Rejected(unit, "an archive without metadata")
        for name in sorted(metadata):
            try:
                text = io.StringIO(store.read(name).decode("utf-8-sig", "surrogateescape"))
                for number, row in enumerate(parse_json_rows(text, f"{unit}: {name}")):
                    yield self._build_sample(store, name, number, row)
            except (LookupFailedError, DataError) as error:
                yield Rejected(f"{unit}: {error}", "metadata that can't be read")

    def _build_sample(self, store: FileStore, origin: str, number: int, row: Row | BrokenRow) -> Record | Rejected:
        """Build the sample of a row; `origin` is the path of its metadata."""
        if isinstance(row, BrokenRow):
            return Rejected(f"{row.place}: {row.reason}", "a row that can't be read")
        instruction, target, sources, kind = parse_row(row)
        key = f"{origin.removesuffix('.json')}_{number:07d}"
        return build_from_paths(store, origin, key, instruction, target, sources, kind)


def _is_uncompressed(group: Sequence[Path]) -> bool:
    return not any(part in group[0].name for part in (".gz", ".xz", ".tgz"))
