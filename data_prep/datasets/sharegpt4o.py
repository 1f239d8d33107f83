"""ShareGPT-4o-Image: two JSON files, and pictures in tars or folders."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep.datasets.archives import FileStore, archive_groups
from data_prep.datasets.fields import from_paths
from data_prep.shards.conversion import Record, Rejected
from tbac.data.shards import DataError

FILES = {"t2i": ("text_to_image.json", 45717), "edit": ("text_and_image_to_image.json", 46539)}
SLICE = 2000  # samples of a unit


def read_list(path: Path) -> list[dict]:
    """A JSON list, or JSON lines, of objects.

    Raises:
        DataError: when it is neither.
    """
    text = path.read_text(encoding="utf-8-sig")
    try:
        try:
            rows = json.loads(text)
        except json.JSONDecodeError:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is neither a JSON list nor JSON lines ({error})") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path} must hold a list of objects")
    return rows


class ShareGPT4oImage:
    """One of its two halves.

    Args:
        path: folder of the dataset, with its JSON files and its tars (or what they hold).
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
        if not self.file.is_file():
            raise DataError(f"dataset.path={path} has no {file}")
        self._rows: list[dict] | None = None
        self._store: FileStore | None = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_rows": None, "_store": None}  # each process opens the files itself

    @property
    def rows(self) -> list[dict]:
        """The entries of the JSON file."""
        if self._rows is None:
            self._rows = read_list(self.file)
        return self._rows

    def units(self) -> Sequence[str]:
        """Slices of the JSON file."""
        return [f"{i}:{min(i + SLICE, len(self.rows))}" for i in range(0, len(self.rows), SLICE)]

    def read(self, unit: str, scratch: Path) -> Iterator[Record | Rejected]:
        """Samples in the order of the JSON file."""
        if self._store is None:
            self._store = FileStore([self.root], archive_groups(self.root))
        start, stop = map(int, unit.split(":"))
        for number in range(start, stop):
            row, key = self.rows[number], f"{self.half}_{number:06d}"
            inputs = row.get("input_image") or ()
            inputs = [inputs] if isinstance(inputs, str) else list(inputs)
            inputs = inputs if self.half == "edit" else None
            yield from_paths(self._store, key, row.get("input_prompt"), row.get("output_image"), inputs)
