"""Pictures of your own: a folder with a caption beside each."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep.datasets.fields import build_text_to_image
from data_prep.datasets.folders import DataFolder, LookupFailedError
from data_prep.datasets.rows import cut_into_units
from data_prep.shards.conversion import Record, Rejected
from tbac.data.shards import DataError
from tbac.pictures import IMAGE_EXTENSIONS

NOT_READ = ("gif", "bmp", "tif", "tiff", "heic", "heif", "avif", "jxl")  # pictures of other formats, which are told


class ImageFolder:
    """A folder, at any depth, of images with a caption beside each: `a.txt` or `a.png.txt` beside `a.png`.

    Pictures of other formats are refused by name.

    Args:
        path: the folder.
        name: of the dataset.

    Raises:
        DataError: when there is no such folder, or no image in it.
    """

    expected = None

    def __init__(self, path: str, name: str = "folder") -> None:
        self.root, self.name = Path(path).expanduser(), name
        if not self.root.is_dir():
            found = "is a file" if self.root.exists() else "doesn't exist"
            raise DataError(f"dataset.path={path} must be a folder of pictures, and {found}")
        pictures = [p for p in self.root.rglob("*") if read_format(p) in IMAGE_EXTENSIONS + NOT_READ and not p.is_dir()]
        self.files = sorted(p.relative_to(self.root).as_posix() for p in pictures)
        if not any(read_format(p) in IMAGE_EXTENSIONS for p in pictures):
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
            if read_format(path) in NOT_READ:
                yield Rejected(name, f"a format that isn't one of {', '.join(IMAGE_EXTENSIONS)}")
                continue
            text = find_caption(path)
            if text is None:
                yield Rejected(name, "no caption")
                continue
            try:
                picture, caption = folder.read(path), folder.read(text)
            except LookupFailedError as error:
                yield Rejected(f"{name}: {error}", "a file that can't be read, or lies outside of the folder")
                continue
            record = build_text_to_image(name.rsplit(".", 1)[0], "", picture, name)
            yield Record(record.key, {**record.fields, "txt": caption})


def read_format(file: Path) -> str:
    """Read the format of a file from its name: `jpg` for `a.JPG`."""
    return file.suffix.lower().removeprefix(".")


def find_caption(picture: Path) -> Path | None:
    """Find the file with a picture's caption; None where there is none."""
    for ending in (".txt", ".TXT"):
        for text in (picture.with_suffix(ending), picture.with_name(picture.name + ending)):
            if text.exists():
                return text
    return None
