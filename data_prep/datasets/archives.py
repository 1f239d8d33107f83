"""Finds and reads the files of a dataset, whether in folders, in tars or in tars cut into parts, compressed or not."""

import gzip
import logging
import lzma
import posixpath
import re
import tarfile
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from data_prep.datasets.folders import DataFolder, LookupFailedError
from tbac.data.shards import DataError
from tbac.data.tars import Damage, iterate_members, leads_out

log = logging.getLogger(__name__)
MAX_MEMBER = 2**30  # bytes; metadata of a whole dataset may be larger than any picture
MAX_RATIO, MIN_UNPACKED = 100, 2**26  # an archive of pictures hardly becomes smaller; text does, by ten at most
ARCHIVE = re.compile(
    r"^(?P<stem>.+?)\.(?:tar(?P<zip>\.gz|\.xz)?|(?P<tgz>tgz))(?:\.?(?:part[-_.]?)?(?P<part>[a-z]{2,3}|\d{1,4}))?$"
)


def find_archives(folder: Path) -> list[list[Path]]:
    """Find the archives under a folder, each as the list of its parts in order, sorted by path.

    Raises:
        DataError: when a part between two others is absent, without which nothing after it can be read.
    """
    groups: dict[tuple[str, ...], dict[int, Path]] = defaultdict(dict)
    for path in DataFolder(folder).list_files():
        match = ARCHIVE.match(path.name)
        if match:
            # An archive that is whole is another one than the parts beside it.
            form = path.name[len(match["stem"]) : match.start("part")] if match["part"] else path.suffix
            groups[str(path.parent), match["stem"], form][_count_part(match["part"])] = path
    for parts in groups.values():
        _check_complete(parts)
    return [[parts[number] for number in sorted(parts)] for _, parts in sorted(groups.items())]


def _count_part(name: str | None) -> int:
    """Return the number that a part's name stands for: of digits, or of letters as `split` counts them."""
    if name is None or name.isdigit():
        return int(name or 0)
    number = 0
    for letter in name:
        number = 26 * number + ord(letter) - ord("a")
    return number


def _check_complete(parts: Mapping[int, Path]) -> None:
    """Raise DataError for an archive of which a part between others, or the first one, is absent."""
    numbers = sorted(parts)
    first = numbers[0]
    if first > 1 or numbers != list(range(first, first + len(numbers))):
        absent = next(number for number in range(min(first, 1), numbers[-1]) if number not in parts)
        raise DataError(f"the archive of {parts[first]} lacks a part: there is none of number {absent}")


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
            _copy_within(source, file, MAX_RATIO * sum(joined.sizes) + MIN_UNPACKED)
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise tarfile.ReadError(f"{parts[0].name} can't be decompressed ({error})") from None
    # A full disk or a file that can't be read now says nothing about the archive.
    except OSError as error:
        raise DataError(f"{parts[0]} can't be decompressed into {target} ({error}); start again to go on") from None
    finally:
        joined.close()
    return [target]


def _copy_within(source: BinaryIO, target: BinaryIO, limit: int) -> None:
    """Copy a stream of at most so many bytes.

    Raises:
        tarfile.ReadError: when there are more.
    """
    copied = 0
    while chunk := source.read(2**24):
        copied += len(chunk)
        if copied > limit:
            raise tarfile.ReadError(f"it unpacks to more than {limit} bytes")
        target.write(chunk)


def _open_decompressed(joined: JoinedParts, suffix: str | None) -> Any:
    return lzma.LZMAFile(joined) if suffix == ".xz" else gzip.GzipFile(fileobj=joined)  # type: ignore[arg-type]


Place = Path | tuple[JoinedParts, int, int]  # a file, or offset and size in an archive


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
        self._folders = [DataFolder(folder) for folder in folders]
        self._places: dict[str, list[Place]] = defaultdict(list)
        for folder in self._folders:
            for path in folder.list_files():
                self._places[path.relative_to(folder.path).as_posix()].append(path)
        for parts in archives:
            self._list_archive(parts)
        self._by_name: dict[str, list[str]] = defaultdict(list)
        for name in self._places:
            self._by_name[PurePosixPath(name).name].append(name)

    def _list_archive(self, parts: Sequence[Path]) -> None:
        """List the members of an archive."""
        joined = JoinedParts(parts)
        for member in iterate_members(joined, sum(joined.sizes)):
            if isinstance(member, Damage):
                self.broken.append(f"{parts[0].name}: {member}")
            elif member.is_file and not leads_out(member.name) and member.size <= MAX_MEMBER:
                self._places[str(PurePosixPath(member.name))].append((joined, member.offset, member.size))

    def list_names(self) -> Iterator[str]:
        """List all paths."""
        return iter(self._places)

    def find(self, path: str, origin: str = "") -> str:
        """Find the file that a path of the metadata means.

        Metadata often begins its paths with other folders than there are. A file is only ever found by a whole path,
        never by its name alone:

        1. below the folder that the metadata lies in, or a folder above that;
        2. for metadata at the top, as the end of one path, if that has a folder in it;
        3. without the first folders of the path, if what is left has a folder in it and is a whole path.

        Args:
            path: of the metadata.
            origin: path of the metadata itself.

        Raises:
            LookupFailedError: when there is none, or several.
        """
        wanted = PurePosixPath(posixpath.normpath(path)) if path else PurePosixPath()
        parts = wanted.parts[1:] if wanted.is_absolute() else wanted.parts
        if not parts or ".." in parts:
            raise LookupFailedError("the file isn't there")
        for folder in PurePosixPath(origin).parents if origin else (PurePosixPath(),):
            if (name := str(folder.joinpath(*parts))) in self._places:
                return name
        if len(PurePosixPath(origin).parts) < 2 and len(parts) > 1:
            ends = [name for name in self._by_name.get(parts[-1], []) if name.endswith("/" + "/".join(parts))]
            if len(ends) > 1:
                raise LookupFailedError("several files could be meant")
            if ends:
                return ends[0]
        for start in range(1, len(parts) - 1):
            if (name := "/".join(parts[start:])) in self._places:
                return name
        raise LookupFailedError("the file isn't there")

    def read(self, path: str, origin: str = "") -> bytes:
        """Read the file that a path of the metadata means; arguments as in `find`.

        Raises:
            LookupFailedError: when there is none, or several, or it can't be read.
        """
        contents = {self._read_place(place) for place in self._places[self.find(path, origin)]}
        # The same file may lie in a folder and in the archive beside it; two files of one name are another matter.
        if len(contents) > 1:
            raise LookupFailedError("several files could be meant")
        return contents.pop()

    def _read_place(self, place: Place) -> bytes:
        if isinstance(place, Path):
            return next(folder for folder in self._folders if place.is_relative_to(folder.path)).read(place)
        joined, offset, size = place
        data = joined.read_at(offset, size)
        if len(data) < size:
            raise LookupFailedError("the file breaks off")
        return data
