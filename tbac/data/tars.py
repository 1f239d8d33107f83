"""Reading single samples of WebDataset tars, by an index of where their members lie."""

import logging
import os
import tarfile
from collections import Counter, OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from webdataset.tariterators import base_plus_ext

from tbac.data.shards import Source, ends_properly, read_manifest

log = logging.getLogger(__name__)
Members = dict[str, tuple[int, int]]  # field -> offset and size of its bytes
NOWHERE = (0, 0)  # a field of which nobody can say which of two is meant; it reads as empty


class TarIndex:
    """The samples of one tar: consecutive members whose names agree up to the first dot, as WebDataset groups them.

    Attributes:
        samples: key and members of each.
        broken: why the tar can't be read to its end, or None. The last sample before a break is left out, since
            nothing says that it is complete.
        refused: what kind of members were passed over, and how many: links and devices, sparse files, names that lead
            out of the archive, fields that a sample has twice.

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
                    while (member := tar.next()) is not None:
                        key, field = base_plus_ext(member.name)
                        if member.isdir() or not key or not field:
                            continue
                        if not member.isfile() or member.issparse():
                            self.refused["not a plain file"] += 1
                            continue
                        if member.name.startswith("/") or ".." in member.name.split("/"):
                            self.refused["a name that leads out of the archive"] += 1
                            continue
                        if not self.samples or self.samples[-1][0] != key:
                            self.samples.append((key, {}))
                        own = self.samples[-1][1]
                        if field.lower() in own:
                            self.refused["a second field of the same name"] += 1
                            own[field.lower()] = NOWHERE
                            continue
                        own[field.lower()] = (member.offset_data, member.size)
            except (tarfile.TarError, EOFError) as error:
                self.broken = str(error)
        if self.broken is None and not ends_properly(path):
            self.broken = "it has no end mark"
        if self.broken is not None:
            self.samples = self.samples[:-1]
        for kind, count in self.refused.items():
            log.warning("passed over %d members of %s: %s", count, path, kind)


class TarReader:
    """Reads samples of many tars; keeps the latest of them open.

    Args:
        keep: tars kept open, with their indices.
    """

    def __init__(self, keep: int = 64) -> None:
        self.keep = keep
        self._open: OrderedDict[Path, tuple[int, TarIndex]] = OrderedDict()

    def index(self, path: Path) -> TarIndex:
        """The index of a tar."""
        return self._opened(path)[1]

    def read(self, path: Path, sample: int) -> dict[str, Any]:
        """The fields of one sample, with `__key__` and `__url__`.

        Raises:
            OSError: when the tar can't be read.
            IndexError: when it has fewer samples.
        """
        descriptor, index = self._opened(path)
        key, members = index.samples[sample]
        fields: dict[str, Any] = {"__key__": key, "__url__": str(path)}
        for name, (offset, size) in members.items():
            fields[name] = os.pread(descriptor, size, offset)
        return fields

    def _opened(self, path: Path) -> tuple[int, TarIndex]:
        if path not in self._open:
            index = TarIndex(path)
            self._open[path] = (os.open(path, os.O_RDONLY), index)
            while len(self._open) > self.keep:
                os.close(self._open.popitem(last=False)[1][0])
        self._open.move_to_end(path)
        return self._open[path]

    def close(self) -> None:
        """Close all tars."""
        while self._open:
            os.close(self._open.popitem()[1][0])

    def __del__(self) -> None:
        self.close()


def shard_sizes(source: Source, shards: Sequence[Path], use_manifest: bool = True) -> list[int]:
    """Samples of each shard: by the manifest, or counted by reading the headers of tars that it doesn't list.

    Args:
        source: whose manifest is read.
        shards: its tars.
        use_manifest: False counts all of them.
    """
    manifest = read_manifest(Path(source.path).expanduser()) if use_manifest else None
    listed = manifest["shards"] if manifest else {}
    sizes = []
    for shard in shards:
        if shard.name in listed:
            sizes.append(int(listed[shard.name]["samples"]))
            continue
        index = TarIndex(shard)
        if index.broken is not None:
            log.warning("skipped the end of %s: the tar breaks off: %s", shard, index.broken)
        sizes.append(len(index.samples))
    return sizes
