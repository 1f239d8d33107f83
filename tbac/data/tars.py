"""Reads single samples of WebDataset tars, with an index of where their members lie.

Why this is written here: no library that this repository uses has an indexed reader of tars. WebDataset's goes through
a tar from its beginning. To resume exactly where a run stopped, in a shuffled order that doesn't depend on the number
of processes, sample n of a tar has to be read without those before it. WebDataset itself (`base_plus_ext`) says which
members form one sample.
"""

import logging
import os
import tarfile
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

from webdataset.tariterators import base_plus_ext

log = logging.getLogger(__name__)
Members = dict[str, tuple[int, int]]  # field -> offset and size of its bytes
NOWHERE = (0, 0)  # place of a field that a sample has twice: nobody can say which one is meant, so it reads as empty


class TarIndex:
    """The samples of one tar: consecutive members whose names agree up to the first dot, as WebDataset groups them.

    Attributes:
        samples: key and members of each sample.
        broken: why the tar can't be read to its end, or None. The last sample before a break is left out, since
            nothing says that it is complete.
        refused: how many members of each kind were passed over: links, devices and sparse files, names that lead out of
            the archive, fields that a sample has twice.

    Raises:
        OSError: when the file can't be opened.
    """

    def __init__(self, path: Path) -> None:
        self.samples: list[tuple[str, Members]] = []
        self.broken: str | None = None
        self.refused: Counter[str] = Counter()
        with path.open("rb") as file:
            try:
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    for member in tar:
                        self._add(member)
            except (tarfile.TarError, EOFError) as error:
                self.broken = str(error)
        # tarfile doesn't mind a tar that was cut between two members.
        if self.broken is None and not has_end_mark(path):
            self.broken = "it has no end mark"
        if self.broken is not None:
            self.samples = self.samples[:-1]
        for kind, count in self.refused.items():
            log.warning("passed over %d members of %s: %s", count, path, kind)

    def _add(self, member: tarfile.TarInfo) -> None:
        key, field = base_plus_ext(member.name)
        # Folders and names without an extension belong to no sample.
        if member.isdir() or not key or not field:
            return
        # A link or a name that leads out of the archive is never followed, whatever it names.
        if not member.isfile() or member.issparse():
            self.refused["not a plain file"] += 1
            return
        if member.name.startswith("/") or ".." in member.name.split("/"):
            self.refused["a name that leads out of the archive"] += 1
            return
        # A sample ends where the next member has another key.
        if not self.samples or self.samples[-1][0] != key:
            self.samples.append((key, {}))
        members = self.samples[-1][1]
        if field.lower() in members:
            self.refused["a second field of the same name"] += 1
            members[field.lower()] = NOWHERE
            return
        members[field.lower()] = (member.offset_data, member.size)


def has_end_mark(tar: Path) -> bool:
    """Whether a tar ends with two blocks of zeros, as all do unless they were cut short."""
    with tar.open("rb") as file:
        file.seek(0, 2)
        file.seek(-min(file.tell(), 1024), 2)
        return file.read() == bytes(1024)


class TarReader:
    """Reads samples of many tars, and keeps the tars that were used last open.

    Args:
        keep: how many tars stay open, each with its index.
    """

    def __init__(self, keep: int = 64) -> None:
        self.keep = keep
        self._open: OrderedDict[Path, tuple[int, TarIndex]] = OrderedDict()

    def read_index(self, path: Path) -> TarIndex:
        """Return the index of a tar, read now or before."""
        return self._open_tar(path)[1]

    def read(self, path: Path, sample: int) -> dict[str, Any]:
        """Read the fields of one sample, and add `__key__` and `__url__`.

        Args:
            path: of the tar.
            sample: its number in the tar, from 0.

        Raises:
            OSError: when the tar can't be read.
            IndexError: when it has fewer samples.
        """
        descriptor, index = self._open_tar(path)
        key, members = index.samples[sample]
        fields: dict[str, Any] = {"__key__": key, "__url__": str(path)}
        for name, (offset, size) in members.items():
            fields[name] = os.pread(descriptor, size, offset)
        return fields

    def _open_tar(self, path: Path) -> tuple[int, TarIndex]:
        if path not in self._open:
            index = TarIndex(path)
            self._open[path] = (os.open(path, os.O_RDONLY), index)
            while len(self._open) > self.keep:
                _, (descriptor, _) = self._open.popitem(last=False)
                os.close(descriptor)
        self._open.move_to_end(path)
        return self._open[path]

    def close(self) -> None:
        """Close all tars."""
        for descriptor, _ in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def __del__(self) -> None:
        self.close()
