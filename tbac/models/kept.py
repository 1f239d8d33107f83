"""Where a prompt cache keeps its entries: the memory of this process, or files that any number of processes share.

An entry is a mapping of names to tensors, known by a key that says all that its numbers depend on. A file is whole or
isn't there, names its key, and holds a digest of its tensors. What is torn, damaged, of another version or of somebody
else is named and counts as missing: whoever asked computes the entry again, and writes the file anew.
"""

import contextlib
import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from tbac.files import ForeignFileError, describe_error, parse_json, read_bytes, write_whole
from tbac.models.weights import compute_digest

log = logging.getLogger(__name__)
Entry = Mapping[str, Tensor]
VERSION = "1"  # of the files; another one counts as missing
MARK = "tbac_prompt_cache"  # name of the file's metadata; one alone, since the library writes several in any order
LARGEST_FILE = 2**32
RETRY_S = 60.0  # after a file couldn't be written


class Store(Protocol):
    """Keeps entries by their keys.

    Attributes:
        shared: whether loader processes see what this process keeps.
        bytes: how many it holds; its length is the number of entries.
    """

    shared: bool
    bytes: int

    def __len__(self) -> int: ...

    def read(self, key: str) -> Entry | None:
        """Return the entry of a key, or None where none is kept."""

    def write(self, key: str, entry: Entry) -> None:
        """Keep an entry, unless there is no room; that ends nothing."""


def count_bytes(entry: Entry) -> int:
    """Count the bytes of an entry's tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in entry.values())


class MemoryStore:
    """Keeps entries in this process.

    Args:
        max_bytes: what doesn't fit isn't kept.
    """

    shared = False

    def __init__(self, max_bytes: float) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self._entries: dict[str, Entry] = {}
        self._told = False

    def __len__(self) -> int:
        return len(self._entries)

    def read(self, key: str) -> Entry | None:
        return self._entries.get(key)

    def write(self, key: str, entry: Entry) -> None:
        size = count_bytes(entry) - count_bytes(self._entries.get(key, {}))
        if self.bytes + size > self.max_bytes:
            if not self._told:
                log.warning("the prompt cache is full with %d entries; what isn't kept runs each time", len(self))
            self._told = True
            return
        self.bytes += size
        # A view would keep the whole batch that it was cut out of.
        self._entries[key] = {name: tensor.detach().clone() for name, tensor in entry.items()}


class FileStore:
    """Keeps each entry in a safetensors file of its own: `<folder>/<two digits>/<key>.safetensors`.

    Args:
        folder: made when the first file is written.
        max_bytes: what the folder may hold; what other processes write after the start isn't counted.
    """

    shared = True

    def __init__(self, folder: Path, max_bytes: float) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self.count = self.bytes = 0
        for file in folder.glob("??/*.safetensors"):
            # One that another process has removed meanwhile, or a link that leads nowhere, holds nothing.
            with contextlib.suppress(OSError):
                self.bytes += file.stat().st_size
                self.count += 1
        self._full = False
        self._retry_at = 0.0

    def __len__(self) -> int:
        return self.count

    def describe(self, facts: Mapping[str, object]) -> None:
        """Write beside the entries what they are of, for people; nothing reads it."""
        file = self.folder / "about.json"
        try:
            if not file.exists():
                write_whole(file, (json.dumps(facts, indent=2) + "\n").encode())
        except OSError as error:
            log.warning("%s can't be written (%s)", file, error.strerror or error)

    def locate(self, key: str) -> Path:
        """Return the file of a key."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def read(self, key: str) -> Entry | None:
        file = self.locate(key)
        if not file.exists():
            return None
        try:
            return unpack(read_bytes(file, limit=LARGEST_FILE), key, str(file))
        except ForeignFileError as error:
            log.warning("%s; it counts as missing", error)
            return None

    def write(self, key: str, entry: Entry) -> None:
        # A full disk is tried again now and then, not for every prompt.
        if self._full or time.monotonic() < self._retry_at:
            return
        file, content = self.locate(key), pack(key, entry)
        replaced = file.stat().st_size if file.exists() else None
        size = len(content) - (replaced or 0)
        if self.bytes + size > self.max_bytes:
            log.warning("%s holds %d entries and is full; what isn't kept runs each time", self.folder, self.count)
            self._full = True
            return
        try:
            write_whole(file, content)
        except OSError as error:
            if not self._retry_at:
                log.warning("%s can't be written (%s); training goes on without it", file, error.strerror or error)
            self._retry_at = time.monotonic() + RETRY_S
            return
        self.count, self.bytes = self.count + (replaced is None), self.bytes + size


def pack(key: str, entry: Entry) -> bytes:
    """Write an entry as the bytes of a safetensors file."""
    tensors = {name: entry[name].detach().cpu().contiguous() for name in sorted(entry)}
    facts = {"version": VERSION, "key": key, "digest": compute_digest(tensors.items())}
    return save(tensors, metadata={MARK: json.dumps(facts)})


def unpack(content: bytes, key: str, place: str) -> Entry:
    """Read what `pack` wrote.

    Args:
        content: bytes of the file.
        key: of the entry that it must be.
        place: the file, for messages.

    Raises:
        ForeignFileError: for anything else, or when a bit isn't as it was written.
    """
    facts = read_metadata(content, place)
    if facts.get("version") != VERSION or facts.get("key") != key:
        found = f"of version {facts[MARK]}" if MARK in facts else "none"
        raise ForeignFileError(
            f"{place} isn't an entry of a prompt cache of version {VERSION} ({found}), or of this key"
        )
    try:
        tensors = load(content)
    except (SafetensorError, ValueError, RuntimeError, KeyError) as error:
        raise ForeignFileError(f"{place} can't be read ({describe_error(error)})") from None
    if compute_digest((name, tensors[name]) for name in sorted(tensors)) != facts.get("digest"):
        raise ForeignFileError(f"{place} is damaged: its tensors aren't those that were written")
    return tensors


def read_metadata(content: bytes, place: str) -> dict[str, Any]:
    """Read what `pack` wrote into the header of a safetensors file: a length of eight bytes, then JSON.

    Raises:
        ForeignFileError: when the file breaks off or has no such header.
    """
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > len(content) - 8:
        raise ForeignFileError(f"{place} breaks off")
    metadata = parse_json(content[8 : 8 + length], place, dict).get("__metadata__")
    text = metadata.get(MARK) if isinstance(metadata, dict) else None
    return parse_json(text, place, dict) if isinstance(text, str) else {}
