"""ShareGPT-4o-Image: two JSON files, and pictures in tars or folders."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep.datasets.archives import FileStore, find_archives
from data_prep.datasets.fields import build_from_paths
from data_prep.datasets.folders import DataFolder
from data_prep.datasets.rows import BrokenRow, Row, cut_into_units, read_rows, wrap_in_list
from data_prep.shards.conversion import Record, Rejected
from tbac.data.shards import DataError

FILES = {"t2i": ("text_to_image.json", 45717), "edit": ("text_and_image_to_image.json", 46539)}


class ShareGPT4oImage:
    """One half of the dataset: the text-to-image samples, or the edits.

    Args:
        path: folder of the dataset, with its JSON files and its tars, packed or unpacked.
        half: `t2i` or `edit`.

    Raises:
        DataError: for another half, or when its JSON file isn't there.
    """

    def __init__(self, path: str, half: str = "t2i") -> None:
        if half not in FILES:
            raise DataError(f"dataset.half must be one of {', '.join(FILES)}; got {half!r}")
        self.root, self.half, self.name = Path(path).expanduser(), half, f"ShareGPT-4o-Image ({half})"
        file, self.expected = FILES[half]
        self.file = self.root / file
        if not DataFolder(self.root).holds(self.file):
            raise DataError(f"dataset.path={path} has no {file}")
        self._rows: list[Row | BrokenRow] | None = None
        self._store: FileStore | None = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_rows": None, "_store": None}  # each process opens the files itself

    @property
    def rows(self) -> list[Row | BrokenRow]:
        """The entries of the JSON file."""
        if self._rows is None:
            self._rows = list(read_rows(self.file))
        return self._rows

    def list_units(self) -> Sequence[str]:
        """List slices of the JSON file."""
        return cut_into_units(len(self.rows))

    def read(self, unit: str, scratch: Path) -> Iterator[Record | Rejected]:
        """Read the samples of a unit in the order of the JSON file."""
        if self._store is None:
            self._store = FileStore([self.root], find_archives(self.root))
        start, stop = map(int, unit.split(":"))
        for number in range(start, stop):
            row, key = self.rows[number], f"{self.half}_{number:06d}"
            if isinstance(row, BrokenRow):
                yield Rejected(f"{row.place}: {row.reason}", "a row that can't be read")
                continue
            inputs = wrap_in_list(row.get("input_image")) if self.half == "edit" else None
            yield build_from_paths(
                self._store, self.file.name, key, row.get("input_prompt"), row.get("output_image"), inputs
            )
