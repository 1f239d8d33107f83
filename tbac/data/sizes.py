"""Sizes of target pictures, from headers alone: nothing is decoded."""

import hashlib
import io
import json
import logging
import os
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tbac.data.decoding import IMAGE_EXTENSIONS, IMAGE_FORMATS, ORIENTATION, TURNED, UNREADABLE
from tbac.data.tars import Members, TarIndex
from tbac.files import write_whole

log = logging.getLogger(__name__)


def sizes_file(shard: Path) -> Path:
    """Where the sizes of a shard are kept, beside it."""
    return shard.with_suffix(".sizes.npz")


def target_sizes(shard: Path, use_latents: bool = True) -> np.ndarray:
    """Height and width of the target of each sample (sample, 2); 0 where they can't be read.

    Where the target's latents are cached, and used, the sizes are those of the latents: only ratios are alike then.
    Taken from the file beside the shard where that was written for these bytes, else from the headers in the shard.
    """
    file = sizes_file(shard)
    try:
        if file.is_file():
            with np.load(file, allow_pickle=False) as kept:
                if str(kept["shard"]) == _fingerprint(shard):
                    return kept["latents" if use_latents else "images"]
            log.warning("%s was written for another %s; sizes are read from the shard", file, shard.name)
        return read_sizes(shard, use_latents)
    except (OSError, KeyError, ValueError) as error:
        log.warning("sizes of the pictures in %s can't be read (%s)", shard, error)
        return np.zeros((0, 2), np.int32)


def write_sizes(shard: Path) -> int:
    """Write the file beside a shard that spares reading its headers; returns the number of samples."""
    found = dict(zip(("latents", "images"), _read(shard, (True, False)), strict=True))
    content = io.BytesIO()
    np.savez(content, shard=np.array(_fingerprint(shard)), **found)  # type: ignore[arg-type]
    write_whole(sizes_file(shard), content.getvalue())
    return len(found["images"])


def read_sizes(shard: Path, use_latents: bool = True) -> np.ndarray:
    """As `target_sizes`, from the headers of the shard's members.

    Raises:
        OSError: when the shard can't be read.
    """
    return _read(shard, (use_latents,))[0]


def _read(shard: Path, kinds: Sequence[bool]) -> list[np.ndarray]:
    """Sizes by each value of `use_latents`, with the tar's index made once."""
    samples = TarIndex(shard).samples
    descriptor = os.open(shard, os.O_RDONLY)
    try:
        found = [[_target_size(descriptor, members, use) for _, members in samples] for use in kinds]
    finally:
        os.close(descriptor)
    return [np.array(sizes, np.int32).reshape(-1, 2) for sizes in found]


def _fingerprint(shard: Path) -> str:
    """Tells a shard from another of its name, without reading all of it."""
    with shard.open("rb") as file:
        return f"{shard.stat().st_size}-{hashlib.sha256(file.read(2**16)).hexdigest()}"


def _target_size(descriptor: int, members: Members, use_latents: bool) -> tuple[int, int]:
    edit = any(name.startswith(("target.", "source")) for name in members)
    prefix = "target." if edit else ""
    latents = members.get("target.latent.safetensors", members.get("latent.safetensors"))
    try:
        if use_latents and latents:
            return _latents_size(descriptor, *latents)
        place = next(members[name] for e in IMAGE_EXTENSIONS if (name := f"{prefix}{e}") in members)
        return _image_size(descriptor, *place)
    except (StopIteration, *UNREADABLE):
        return 0, 0


def _latents_size(descriptor: int, offset: int, size: int) -> tuple[int, int]:
    (length,) = struct.unpack("<Q", os.pread(descriptor, 8, offset))
    header = json.loads(os.pread(descriptor, min(length, size), offset + 8))
    _, height, width = header["latents"]["shape"]
    return int(height), int(width)


def _image_size(descriptor: int, offset: int, size: int) -> tuple[int, int]:
    with Image.open(io.BufferedReader(_Member(descriptor, offset, size), 4096), formats=IMAGE_FORMATS) as image:
        width, height = image.size
        # A PNG may carry its EXIF behind the pixels, which reading it would decode: what isn't there yet is left.
        turned = "exif" in image.info and image.getexif().get(ORIENTATION) in TURNED
    return (width, height) if turned else (height, width)


class _Member(io.RawIOBase):
    """The bytes of one member of an open tar, read where they are asked for."""

    def __init__(self, descriptor: int, offset: int, size: int) -> None:
        self.descriptor, self.offset, self.size, self.at = descriptor, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = os.pread(self.descriptor, min(len(buffer), max(self.size - self.at, 0)), self.offset + self.at)
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)
