"""Files of a dataset that lie in a folder, which someone else may have filled: none is read from outside of it."""

from collections.abc import Iterator
from pathlib import Path

from tbac.files import ForeignFileError, read_bytes
from tbac.pictures import MAX_BYTES


class LookupFailedError(LookupError):
    """A file isn't there, can't be read, or a path could mean several; the message says which."""


class DataFolder:
    """A folder, and which files belong to it.

    A file belongs to it that lies in it after all links have been followed. The cache of Hugging Face's hub is made of
    links from `snapshots/` into the folder `blobs` beside it, which therefore belongs to such a snapshot.

    Args:
        path: of the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._roots = [path.resolve()]
        if path.parent.name == "snapshots":
            self._roots.append((path.parent.parent / "blobs").resolve())

    def holds(self, file: Path) -> bool:
        """Whether a file is a regular one, and belongs to the folder."""
        try:
            resolved = file.resolve()
            return any(map(resolved.is_relative_to, self._roots)) and resolved.is_file()
        except (OSError, ValueError, RuntimeError):  # names that no file can have, links in a circle
            return False

    def list_files(self) -> Iterator[Path]:
        """List the files of the folder at any depth, in the order of their paths."""
        return filter(self.holds, sorted(self.path.rglob("*")))

    def read(self, file: Path) -> bytes:
        """Read a file of the folder, no larger than a picture may be.

        Raises:
            LookupFailedError: when it doesn't belong to the folder, or can't be read.
        """
        if not self.holds(file):
            raise LookupFailedError("the file isn't there, or not inside of the dataset's folder")
        try:
            return read_bytes(file, file.name, MAX_BYTES)
        except ForeignFileError:
            raise LookupFailedError(f"the file can't be read, or has more than {MAX_BYTES} bytes") from None
