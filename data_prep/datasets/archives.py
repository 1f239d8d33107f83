"""Files of a dataset wherever they lie: in folders, in tars, in tars cut into parts, compressed or not."""

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
    """A file that isn't there, or that several could be meant by; the message is the kind of failure."""


def find_archives(folder: Path) -> list[list[Path]]:
    """The archives under a folder, each as the list of its parts in order, sorted by path."""
    groups: dict[tuple[str, str], list[Path]] = defaultdict(list)
    for path in sorted(folder.rglob("*")):
        if path.is_file() and (match := ARCHIVE.match(path.name)):
            groups[str(path.parent), match["stem"]].append(path)
    return [groups[key] for key in sorted(groups)]


class JoinedParts:
    """Parts of a file, read as the whole.

    Args:
        parts: in order.
    """

    def __init__(self, parts: Sequence[Path]) -> None:
        self.parts = list(parts)
        self.sizes = [part.stat().st_size for part in parts]
        self._place = 0
        self._files: dict[int, BinaryIO] = {}

    def read(self, size: int = -1) -> bytes:
        """The next bytes."""
        size = sum(self.sizes) - self._place if size < 0 else size
        data = self.read_at(self._place, size)
        self._place += len(data)
        return data

    def read_at(self, offset: int, size: int) -> bytes:
        """Bytes at a place of the whole."""
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
        """Move, as files do."""
        self._place = offset + (0, self._place, sum(self.sizes))[whence]
        return self._place

    def tell(self) -> int:
        """Where the next read begins."""
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
    """The archive as tar: its parts as they are, or decompressed into one file of `scratch`.

    Raises:
        tarfile.ReadError: when it breaks off or can't be decompressed.
    """
    match = ARCHIVE.match(parts[0].name)
    assert match is not None
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
    """Finds files by the paths that a dataset's metadata gives them, in folders and in archives.

    Args:
        folders: whose files are taken as they lie.
        archives: each as the list of its parts, uncompressed.
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
        """All paths."""
        return iter(self._places)

    def find(self, path: str) -> str:
        """The one file whose path ends with this one, or with as much of its end as any does.

        Raises:
            LookupFailedError: when there is none, or several.
        """
        path = str(PurePosixPath(path.lstrip("./")))
        if path in self._places:
            return path
        wanted = PurePosixPath(path).parts
        found = self._by_name.get(wanted[-1], []) if wanted else []
        for length in range(len(wanted), 0, -1):
            end = wanted[-length:]
            fitting = [name for name in found if PurePosixPath(name).parts[-length:] == end]
            if len(fitting) == 1:
                return fitting[0]
            if fitting:
                raise LookupFailedError("several files could be meant")
        raise LookupFailedError("the file isn't there")

    def read(self, path: str) -> bytes:
        """The bytes of a file; `path` as in `find`."""
        place = self._places[self.find(path)]
        if isinstance(place, Path):
            return place.read_bytes()
        joined, offset, size = place
        return joined.read_at(offset, size)
