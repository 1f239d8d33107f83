"""Pictures of your own: a folder with a caption beside each."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep.datasets.fields import build_text_to_image
from data_prep.datasets.folders import DataFolder, LookupFailedError
from data_prep.datasets.rows import cut_into_units
from data_prep.shards.conversion import Record, Rejected
from tbac.data.shards import DataError
from tbac.pictures import IMAGE_EXTENSIONS


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
        images = (
            p for p in self.root.rglob("*") if p.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS and not p.is_dir()
        )
        self.files = sorted(p.relative_to(self.root).as_posix() for p in images)
        if not self.files:
            raise DataError(f"dataset.path={path} holds no image ({', '.join(IMAGE_EXTENSIONS)})")

    def list_units(self) -> Sequence[str]:
        """List slices of the sorted files."""
        return cut_into_units(len(self.files))

    def read(self, unit: str, scratch: Path) -> Iterator[Record | Rejected]:
        """Read the samples of a unit in the order of the paths."""
        start, stop = map(int, unit.split(":"))
        folder = DataFolder(self.root)
        for name in self.files[start:stop]:
            path = self.root / name
            text = path.with_suffix(".txt")
            if not text.exists():
                yield Rejected(name, "no caption")
                continue
            try:
                picture, caption = folder.read(path), folder.read(text)
            except LookupFailedError as error:
                yield Rejected(f"{name}: {error}", "a file that can't be read, or lies outside of the folder")
                continue
            record = build_text_to_image(name.rsplit(".", 1)[0], "", picture, name)
            yield Record(record.key, {**record.fields, "txt": caption})
