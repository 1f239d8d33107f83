"""Finds and reads the files of a dataset, whether in folders, in tars or in tars cut into parts, compressed or not."""

import gzip
import logging
import lzma
import re
import shutil
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

log = logging.getLogger(__name__)
ARCHIVE = re.compile(
    r"^(?P<stem>.+?)\.(?:tar(?P<zip>\.gz|\.xz)?|(?P<tgz>tgz))(?:\.?(?:part[-_.]?)?(?P<part>[a-z]{2,3}|\d{1,4}))?$"
)


class LookupFailedError(LookupError):
    """A file isn't there, or a path could mean several; the message says which of the two."""


def find_archives(folder: Path) -> list[list[Path]]:
    """Find the archives under a folder, each as the list of its parts in order, sorted by path."""
    groups: dict[tuple[str, str], list[Path]] = defaultdict(list)
    for path in sorted(folder.rglob("*")):
        match = ARCHIVE.match(path.name)
        if match and path.is_file():
            groups[str(path.parent), match["stem"]].append(path)
    return [groups[key] for key in sorted(groups)]


class JoinedParts:
    """A file that lies in parts, read as one.

    Args:
        parts: in order.
    """

    def __init__(self, parts: Sequence[Path]) -> None:
        self.parts = list(parts)
        self.sizes = [part.stat().st_size for part in parts]
        self._place = 0
        self._files: dict[int, BinaryIO] = {}

    def read(self, size: int = -1) -> bytes:
        """Read the next bytes."""
        size = sum(self.sizes) - self._place if size < 0 else size
        data = self.read_at(self._place, size)
        self._place += len(data)
        return data

    def read_at(self, offset: int, size: int) -> bytes:
        """Read bytes at an offset from the beginning of the first part."""
        pieces = []
        for number, length in enumerate(self.sizes):
            if size <= 0:
                break
            if offset >= length:
                offset -= length
                continue
            if number not in self._files:
                self._files[number] = self.parts[number].open("rb")
            self._files[number].seek(offset)
            piece = self._files[number].read(min(size, length - offset))
            pieces.append(piece)
            size, offset = size - len(piece), 0
        return b"".join(pieces)

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move to another place, with the arguments that files have."""
        self._place = offset + (0, self._place, sum(self.sizes))[whence]
        return self._place

    def tell(self) -> int:
        """Return where the next read begins."""
        return self._place

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        """Close all parts."""
        for file in self._files.values():
            file.close()
        self._files.clear()


def unpack_archive(parts: Sequence[Path], scratch: Path) -> list[Path]:
    """Make an archive readable as a tar.

    Args:
        parts: of the archive, in order.
        scratch: folder that a compressed archive is decompressed into.

    Returns:
        The parts as they are, or the one decompressed file.

    Raises:
        tarfile.ReadError: when it breaks off or can't be decompressed.
    """
    match = ARCHIVE.match(parts[0].name)
    assert match is not None
    # Members of an uncompressed tar can be read at their places; in a compressed one there are none.
    if not match["zip"] and not match["tgz"]:
        return list(parts)
    target = scratch / f"{match['stem']}.tar"
    log.info("decompressing %s into %s", parts[0], target)
    joined = JoinedParts(parts)
    try:
        with _open_decompressed(joined, match["zip"]) as source, target.open("wb") as file:
            shutil.copyfileobj(source, file, 2**24)
    except (EOFError, OSError, lzma.LZMAError) as error:
        raise tarfile.ReadError(f"{parts[0].name} can't be decompressed ({error})") from None
    finally:
        joined.close()
    return [target]


def _open_decompressed(joined: JoinedParts, suffix: str | None) -> Any:
    return lzma.LZMAFile(joined) if suffix == ".xz" else gzip.GzipFile(fileobj=joined)  # type: ignore[arg-type]


class FileStore:
    """Finds files by the paths in a dataset's metadata, in folders and in archives.

    Args:
        folders: that hold files.
        archives: each as the list of its parts, uncompressed.

    Attributes:
        broken: what is wrong with archives that can't be read to their end; what was read of them is used.
    """

    def __init__(self, folders: Sequence[Path] = (), archives: Sequence[Sequence[Path]] = ()) -> None:
        self.broken: list[str] = []
        self._places: dict[str, Path | tuple[JoinedParts, int, int]] = {}
        for folder in folders:
            for path in sorted(folder.rglob("*")):
                if path.is_file():
                    self._places[path.relative_to(folder).as_posix()] = path
        for parts in archives:
            joined = JoinedParts(parts)
            try:
                with tarfile.TarFile(fileobj=joined) as tar:  # type: ignore[arg-type]
                    for member in tar:
                        name = str(PurePosixPath(member.name))
                        if member.isreg() and not member.issparse() and ".." not in name and not name.startswith("/"):
                            self._places[name] = (joined, member.offset_data, member.size)
            except (tarfile.TarError, EOFError) as error:
                self.broken.append(f"{parts[0].name}: {error}")
        self._by_name: dict[str, list[str]] = defaultdict(list)
        for name in self._places:
            self._by_name[PurePosixPath(name).name].append(name)

    def list_names(self) -> Iterator[str]:
        """List all paths."""
        return iter(self._places)

    def find(self, path: str) -> str:
        """Find the file that a path of the metadata means, which often begins with folders that aren't there.

        It is the file whose path agrees with most of the end of this one.

        Raises:
            LookupFailedError: when there is none, or several.
        """
        path = str(PurePosixPath(path.lstrip("./")))
        if path in self._places:
            return path
        wanted = PurePosixPath(path).parts
        candidates = self._by_name.get(wanted[-1], []) if wanted else []
        for length in range(len(wanted), 0, -1):
            end = wanted[-length:]
            matching = [name for name in candidates if PurePosixPath(name).parts[-length:] == end]
            if len(matching) == 1:
                return matching[0]
            if matching:
                raise LookupFailedError("several files could be meant")
        raise LookupFailedError("the file isn't there")

    def read(self, path: str) -> bytes:
        """Read the file that a path of the metadata means.

        Raises:
            LookupFailedError: when there is none, or several.
        """
        place = self._places[self.find(path)]
        if isinstance(place, Path):
            return place.read_bytes()
        joined, offset, size = place
        return joined.read_at(offset, size)
