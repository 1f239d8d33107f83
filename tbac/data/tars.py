"""Reads single samples of WebDataset tars, with an index of where their members lie.

Why this is written here: no library that this repository uses has an indexed reader of tars. WebDataset's goes through
a tar from its beginning. To resume exactly where a run stopped, in a shuffled order that doesn't depend on the number
of processes, sample n of a tar has to be read without those before it. WebDataset itself (`base_plus_ext`) says which
members form one sample.

tarfile parses each header (`TarInfo.frombuf`), but goes from one to the next in a way that doesn't suit files from
elsewhere: it ends without a word at a header that is damaged, goes round in a circle where a size is negative, and
reads as much as an extended header promises. `iterate_members` does that part.
"""

import errno
import logging
import os
import stat
import tarfile
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from webdataset.tariterators import base_plus_ext

from tbac.data.decoding import CorruptSampleError

log = logging.getLogger(__name__)
Members = dict[str, tuple[int, int]]  # field -> offset and size of its bytes
NOWHERE = (0, 0)  # place of a field that a sample has twice: nobody can say which one is meant, so it reads as empty
TOO_LARGE = (-1, 0)  # place of a field that is larger than any field may be; it reads as empty, too
BLOCK = 512
MAX_FIELD_BYTES = 2**28
MAX_NAME = 4096  # bytes of a member's name, as long as paths may be on Linux
MAX_EXTENDED_BYTES = 2**20  # of one extended header, which holds names, times and little else
MAX_EXTENDED = 8  # extended headers before one member; tar writes three at most
SCAN = 2**20  # bytes that are searched at a time for the next header after a damaged one
ATTEMPTS = 3  # to read a sample of a tar that is being written to
MAGIC, MAGIC_PLACE = b"ustar", 257
PLAIN_TYPES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
HEADER_TYPES = (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK)


class Readable(Protocol):
    """What is needed of an open file."""

    def seek(self, offset: int, /) -> int: ...

    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True)
class Member:
    """One member of a tar.

    Attributes:
        name: with the folders that it lies in.
        offset: of its bytes in the tar.
        size: how many bytes it has.
        is_file: whether it is a plain file; folders, links, devices and sparse files aren't.
        is_folder: whether it is a folder.
    """

    name: str
    offset: int
    size: int
    is_file: bool
    is_folder: bool = False


@dataclass(frozen=True)
class Damage:
    """A place in a tar where a header should be and none can be read; what lay there is lost.

    Attributes:
        offset: of the place.
        reason: what is wrong there.
        cut: whether the tar breaks off there; else it can be read on from the next header.
    """

    offset: int
    reason: str
    cut: bool = False

    def __str__(self) -> str:
        return f"{self.reason} at byte {self.offset}"


@dataclass
class _Extension:
    """What extended headers say of the member that follows them.

    Attributes:
        name: of the member, where the header has no room for it.
        size: of the member, where the header has no room for it.
        sparse: whether the member is stored with its holes left out.
        count: number of extended headers.
    """

    name: str | None = None
    size: int | None = None
    sparse: bool = False
    count: int = 0


def iterate_members(file: Readable, size: int) -> Iterator[Member | Damage]:
    """List the members of a tar in order, and the places where something is wrong with it.

    Each member that is listed lies in the file as a whole. After a damaged header the list goes on at the next one.

    Args:
        file: the open tar.
        size: of the file in bytes.
    """
    offset, extension = 0, _Extension()
    while offset < size:
        file.seek(offset)
        block = file.read(BLOCK)
        # Zeros end a tar. What comes after them nevertheless was separated from the rest by something else.
        if block.count(0) == len(block):
            following = _find_header(file, offset, size)
            if following < size:
                yield Damage(offset, "a hole of zeros")
            offset, extension = following, _Extension()
            continue
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            if info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME):
                offset = _extend(extension, file, info, offset, size)
                continue
            member, following = _read_member(extension, file, info, offset, size)
        except (tarfile.HeaderError, ValueError) as error:
            yield Damage(offset, f"a damaged header ({error})")
            offset, extension = _find_header(file, offset + BLOCK, size), _Extension()
            continue
        if member.offset + member.size > size:
            yield Damage(offset, "it breaks off inside of a member", cut=True)
            return
        # A header for all members holds nothing that is needed here.
        if info.type not in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
            yield member
            extension = _Extension()
        offset = following


def _extend(extension: _Extension, file: Readable, info: tarfile.TarInfo, offset: int, size: int) -> int:
    """Read an extended header into `extension`; returns the offset of the header after it.

    Raises:
        ValueError: when it isn't one, or promises more than any has.
    """
    extension.count += 1
    if not 0 <= info.size <= MAX_EXTENDED_BYTES or extension.count > MAX_EXTENDED:
        raise ValueError(f"an extended header of {info.size} bytes, number {extension.count}")
    if offset + BLOCK + info.size > size:
        raise ValueError("an extended header that breaks off")
    file.seek(offset + BLOCK)
    content = file.read(info.size)
    if info.type == tarfile.GNUTYPE_LONGNAME:
        extension.name = content.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
    else:
        for key, value in _parse_records(content):
            if key == b"path":
                extension.name = value.decode("utf-8", "surrogateescape")
            elif key == b"size":
                extension.size = int(value)
            elif key.startswith(b"GNU.sparse."):
                extension.sparse = True
    return offset + BLOCK + _round_up(info.size)


def _parse_records(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Parse the records of an extended header, each `<length> <key>=<value>` and a line break.

    Raises:
        ValueError: when it isn't of this form.
    """
    while content.strip(b"\0"):
        length, _, _ = content[:16].partition(b" ")
        end = int(length)
        record = content[len(length) + 1 : end]
        if not len(length) + 1 < end <= len(content) or not record.endswith(b"\n") or b"=" not in record:
            raise ValueError("an extended header of another form")
        key, _, value = record[:-1].partition(b"=")
        yield key, value
        content = content[end:]


def _read_member(
    extension: _Extension, file: Readable, info: tarfile.TarInfo, offset: int, size: int
) -> tuple[Member, int]:
    """Make a member of its header; returns it, and the offset of the header after it.

    Raises:
        ValueError: for a size that no member has.
    """
    length = info.size if extension.size is None else extension.size
    if length < 0:
        raise ValueError(f"a member of {length} bytes")
    place = offset + BLOCK
    # The map of a sparse file goes on in blocks of its own, as long as their last byte but seven says so.
    if info.type == tarfile.GNUTYPE_SPARSE:
        more = _read_block(file, offset)[482]
        while more and place + BLOCK <= size:
            more = _read_block(file, place)[504]
            place += BLOCK
    # Links, folders and devices have no bytes, whatever their header says; kinds that tarfile doesn't know have.
    if info.type in tarfile.SUPPORTED_TYPES and info.type not in (*tarfile.REGULAR_TYPES, *HEADER_TYPES):
        length = 0
    name = info.name if extension.name is None else extension.name
    is_folder = info.type == tarfile.DIRTYPE or (info.type == tarfile.AREGTYPE and name.endswith("/"))
    is_file = info.type in PLAIN_TYPES and not extension.sparse and not is_folder
    member = Member(name, place, length, is_file, is_folder)
    return member, place + _round_up(length)


def _read_block(file: Readable, offset: int) -> bytes:
    file.seek(offset)
    return file.read(BLOCK)


def _round_up(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _find_header(file: Readable, offset: int, size: int) -> int:
    """Find the next place from `offset` on that holds a header whose checksum is right; `size` when there is none."""
    while offset < size:
        file.seek(offset)
        chunk = file.read(SCAN)
        place = chunk.find(MAGIC)
        while place >= 0:
            start = place - MAGIC_PLACE
            if start >= 0 and start % BLOCK == 0 and _is_header(chunk[start : start + BLOCK]):
                return offset + start
            place = chunk.find(MAGIC, place + 1)
        offset += SCAN
    return size


def _is_header(block: bytes) -> bool:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape").size >= 0
    except (tarfile.HeaderError, ValueError):
        return False


def leads_out(name: str) -> bool:
    """Whether a name in an archive leads out of the folder that the archive stands for."""
    return name.startswith("/") or ".." in name.split("/")


def open_regular(path: Path) -> int:
    """Open a file for reading; returns its descriptor.

    Raises:
        OSError: when it can't be opened, or is a pipe, a device or a folder, which may never end.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it isn't a regular file", str(path))
    return descriptor


class TarIndex:
    """The samples of one tar: consecutive members whose names agree up to the first dot, as WebDataset groups them.

    Args:
        path: of the tar.
        descriptor: of the tar, if it is open already.

    Attributes:
        samples: key and members of each sample.
        broken: why the tar can't be read to its end, or None. The last sample before a break is left out, since
            nothing says that it is complete.
        damage: places where a header can't be read, and the rest of the tar can.
        doubtful: numbers of the samples beside such places, which may have lost a member.
        refused: how many members of each kind were passed over: links, devices and sparse files, names that lead out of
            the archive or that no field may have, fields that a sample has twice or that are too large.

    Raises:
        OSError: when the file can't be opened.
    """

    def __init__(self, path: Path, descriptor: int | None = None) -> None:
        self.samples: list[tuple[str, Members]] = []
        self.broken: str | None = None
        self.damage: list[Damage] = []
        self.doubtful: set[int] = set()
        self.refused: Counter[str] = Counter()
        self._after_damage = False
        with os.fdopen(open_regular(path) if descriptor is None else os.dup(descriptor), "rb") as file:
            for member in iterate_members(file, os.fstat(file.fileno()).st_size):
                if isinstance(member, Member):
                    self._add(member)
                elif member.cut:
                    self.broken = str(member)
                else:
                    self._note_damage(member)
        # A tar that was cut between two members has nothing wrong in it.
        if self.broken is None and not has_end_mark(path):
            self.broken = "it has no end mark"
        if self.broken is not None:
            self.samples = self.samples[:-1]
        for damage in self.damage:
            log.warning("%s has %s; the samples beside it are refused", path, damage)
        for kind, count in self.refused.items():
            log.warning("passed over %d members of %s: %s", count, path, kind)

    def _note_damage(self, damage: Damage) -> None:
        self.damage.append(damage)
        # The header that is lost may have been of the sample before it or of the one after it.
        self.doubtful.add(len(self.samples) - 1)
        self._after_damage = True

    def _add(self, member: Member) -> None:
        if member.is_folder:
            return
        if len(member.name) > MAX_NAME:
            self.refused["a name that is too long"] += 1
            return
        key, field = base_plus_ext(member.name)
        # Names without an extension belong to no sample.
        if not key or not field:
            return
        # A link or a name that leads out of the archive is never followed, whatever it names.
        if not member.is_file:
            self.refused["not a plain file"] += 1
            return
        if leads_out(member.name):
            self.refused["a name that leads out of the archive"] += 1
            return
        # Such names are ours, for what a sample says of itself.
        if field.startswith("_"):
            self.refused["a field that begins with an underscore"] += 1
            return
        # Bytes that are no Unicode are spelled out, so that a key can be written wherever it is named.
        key = key.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        # A sample ends where the next member has another key.
        if not self.samples or self.samples[-1][0] != key:
            self.samples.append((key, {}))
        if self._after_damage:
            self.doubtful.add(len(self.samples) - 1)
            self._after_damage = False
        self._place(self.samples[-1][1], field.lower(), member)

    def _place(self, members: Members, field: str, member: Member) -> None:
        """Note the place of a field."""
        if field in members:
            self.refused["a second field of the same name"] += 1
            members[field] = NOWHERE
        elif member.size > MAX_FIELD_BYTES:
            self.refused["a field that is too large"] += 1
            members[field] = TOO_LARGE
        else:
            members[field] = (member.offset, member.size)


def has_end_mark(tar: Path) -> bool:
    """Whether a tar ends with two blocks of zeros, as all do unless they were cut short."""
    with os.fdopen(open_regular(tar), "rb") as file:
        file.seek(0, 2)
        file.seek(-min(file.tell(), 1024), 2)
        return file.read() == bytes(1024)


class ShardChangedError(OSError):
    """A shard holds other samples than when it was first read."""


@dataclass
class _OpenTar:
    """An open tar.

    Attributes:
        descriptor: of the file.
        index: of its samples.
        state: size and time of the file when it was indexed.
    """

    descriptor: int
    index: TarIndex
    state: tuple[int, int]


class TarReader:
    """Reads samples of many tars, and keeps the tars that were used last open.

    Args:
        keep: how many tars stay open, each with its index.
    """

    def __init__(self, keep: int = 64) -> None:
        self.keep = keep
        self._open: OrderedDict[Path, _OpenTar] = OrderedDict()
        self._contents: dict[Path, int] = {}  # what each tar was seen to hold

    def read_index(self, path: Path) -> TarIndex:
        """Return the index of a tar, read now or before."""
        return self._open_tar(path).index

    def read(self, path: Path, sample: int) -> dict[str, Any]:
        """Read the fields of one sample, and add `__key__` and `__url__`.

        Args:
            path: of the tar.
            sample: its number in the tar, from 0.

        Raises:
            OSError: when the tar can't be read; `ShardChangedError` when it was written over since it was first read.
            IndexError: when it has fewer samples.
            CorruptSampleError: for a sample beside a damaged header.
        """
        for _ in range(ATTEMPTS):
            tar, problem, fields = self._open_tar(path), None, {}
            try:
                fields = self._read_fields(tar, path, sample)
            except CorruptSampleError as error:
                problem = error
            # Someone may have written over the file, and its old places now hold bytes of other samples.
            if _get_state(tar.descriptor) != tar.state:
                self._close_tar(self._open.pop(path))
                continue
            if problem is not None:
                raise problem
            return fields
        raise ShardChangedError(errno.ESTALE, "it is being written to", str(path))

    def _read_fields(self, tar: _OpenTar, path: Path, sample: int) -> dict[str, Any]:
        key, members = tar.index.samples[sample]
        if sample in tar.index.doubtful:
            raise CorruptSampleError(f"{key}: it may have lost a field to a damaged header", "a damaged header")
        fields: dict[str, Any] = {"__key__": key, "__url__": str(path)}
        for name, (offset, size) in members.items():
            fields[name] = os.pread(tar.descriptor, size, offset) if size else b""
            if len(fields[name]) < size:
                raise CorruptSampleError(f"{key}: {name} breaks off", "unreadable shard")
        return fields

    def _open_tar(self, path: Path) -> _OpenTar:
        if path not in self._open:
            descriptor = open_regular(path)
            state = _get_state(descriptor)  # before the index is read, so that what is written meanwhile is noticed
            tar = _OpenTar(descriptor, TarIndex(path, descriptor), state)
            content = hash(tuple((key, *members.items()) for key, members in tar.index.samples))
            if self._contents.setdefault(path, content) != content:
                self._close_tar(tar)
                raise ShardChangedError(errno.ESTALE, "it was written over since it was first read", str(path))
            self._open[path] = tar
            while len(self._open) > self.keep:
                self._close_tar(self._open.popitem(last=False)[1])
        self._open.move_to_end(path)
        return self._open[path]

    def _close_tar(self, tar: _OpenTar) -> None:
        os.close(tar.descriptor)

    def close(self) -> None:
        """Close all tars."""
        for tar in self._open.values():
            self._close_tar(tar)
        self._open.clear()

    def __del__(self) -> None:
        self.close()


def _get_state(descriptor: int) -> tuple[int, int]:
    """Get what changes when a file is written to: its size, and when that was."""
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns
