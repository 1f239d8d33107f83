"""Aspect-ratio buckets: the sizes that targets are cropped to, one for each batch, and which target goes to which."""

import hashlib
import io
import logging
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tbac.data.order import Draw
from tbac.data.tars import Members, TarIndex, open_regular
from tbac.files import describe_error, parse_json, read_bytes, write_whole
from tbac.pictures import IMAGE_EXTENSIONS, IMAGE_FORMATS, ORIENTATION, TURNED, UNREADABLE

log = logging.getLogger(__name__)
MAX_SIZES_BYTES = 2**26  # of the sizes of a shard, which are 16 bytes for each sample
MAX_HEADER_BYTES = 2**16  # of cached latents, which have one tensor


# SANA's table in sixteenths of the nominal side, (height, width): 40 shapes of about the same area, from 1:4 to 4:1.
# Source: ASPECT_RATIO_512 and ASPECT_RATIO_1024 of SANA's trainer.
SANA = (
    (8, 32), (8, 31), (8, 30), (8, 29), (9, 28), (9, 27), (9, 26), (10, 25), (10, 24), (11, 23), (11, 22), (11, 21),
    (12, 21), (12, 20), (13, 19), (13, 18), (14, 18), (14, 17), (15, 17), (15, 16), (16, 16), (16, 15), (17, 15),
    (17, 14), (18, 14), (18, 13), (19, 13), (20, 12), (21, 12), (22, 11), (23, 11), (24, 10), (25, 10), (26, 9),
    (27, 9), (28, 9), (29, 8), (30, 8), (31, 8), (32, 8),
)  # fmt: skip


@dataclass(frozen=True)
class Buckets:
    """Sizes to crop to. A picture goes to the bucket with the nearest aspect ratio.

    Args:
        sizes: (height, width) of each in pixels.

    Raises:
        ValueError: when there is none, a side isn't positive, or two have one aspect ratio.
    """

    sizes: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        if not self.sizes or any(min(size) < 1 for size in self.sizes):
            raise ValueError(f"data.buckets must list sizes of at least one pixel a side, got {list(self.sizes)}")
        if len(set(self.ratios.tolist())) < len(self.sizes):
            raise ValueError(f"data.buckets lists two sizes of one aspect ratio: {list(self.sizes)}")

    @cached_property
    def ratios(self) -> np.ndarray:
        """Height divided by width of each size, rounded to two decimals as in SANA's table."""
        return np.array([round(height / width, 2) for height, width in self.sizes])

    def to_lists(self) -> list[list[int]]:
        """Convert the sizes to lists, as JSON has them."""
        return [list(size) for size in self.sizes]

    def find_nearest(self, sizes: np.ndarray) -> np.ndarray:
        """Find the bucket of each picture; returns their indices.

        Args:
            sizes: (picture, 2), height and width in any unit. Where they are unknown (0), the squarest bucket is taken.
        """
        heights, widths = sizes[:, 0], sizes[:, 1]
        known = (heights > 0) & (widths > 0)
        ratios = np.where(known, heights / np.where(known, widths, 1), 1.0)
        return np.abs(self.ratios[None] - ratios[:, None]).argmin(axis=1)


def parse_buckets(value: str | Sequence[Sequence[int]] | None, image_size: int) -> Buckets | None:
    """Read the option `data.buckets`; returns None where all targets are squares.

    Args:
        value: None for squares of `image_size`, `sana` for SANA's table scaled to that side, or (height, width) pairs.
        image_size: side of the square, in pixels.

    Raises:
        ValueError: for anything else.
    """
    if value is None:
        return None
    if value == "sana":
        if image_size % 16:
            raise ValueError(f"data.buckets=sana needs a stage.image_size that 16 divides, got {image_size}")
        unit = image_size // 16
        return Buckets(tuple((height * unit, width * unit) for height, width in SANA))
    if isinstance(value, str) or not isinstance(value, Sequence) or not value or not all(map(_is_size, value)):
        raise ValueError(f"data.buckets must be null, sana, or a list of [height, width] in pixels; got {value!r}")
    sizes: Sequence[Any] = value
    return Buckets(tuple((height, width) for height, width in sizes))


def _is_size(value: Any) -> bool:
    """Whether a value is a pair of whole numbers."""
    return isinstance(value, Sequence) and len(value) == 2 and all(type(side) is int for side in value)


class BucketIndex:
    """Tells the bucket of each draw, from the size that its shard gives for the target.

    Args:
        buckets: the sizes to choose from.
        shards: for each source, its tars.
        use_latents: take the size of cached latents where there are any.
    """

    def __init__(self, buckets: Buckets, shards: Sequence[Sequence[Path]], use_latents: bool = True) -> None:
        self.sizes = buckets.sizes
        self._squarest = int(buckets.find_nearest(np.zeros((1, 2)))[0])

        @lru_cache(maxsize=4096)
        def of_shard(source: int, shard: int) -> np.ndarray:
            return buckets.find_nearest(load_target_sizes(shards[source][shard], use_latents)).astype(np.int16)

        self._of_shard: Callable[[int, int], np.ndarray] = of_shard

    def __call__(self, draw: Draw) -> int:
        """Return the index of the bucket of a draw; a sample that isn't there, as reading will report, is a square."""
        buckets = self._of_shard(draw.source, draw.shard)
        return int(buckets[draw.sample]) if draw.sample < len(buckets) else self._squarest


def name_sizes_file(shard: Path) -> Path:
    """Name the file beside a shard that holds the sizes of its targets."""
    return shard.with_suffix(".sizes.npz")


def load_target_sizes(shard: Path, use_latents: bool = True) -> np.ndarray:
    """Load height and width of the target of each sample (sample, 2); 0 where they can't be read.

    They come from the file beside the shard if that is whole and was written for this very shard, else from the headers
    in the shard. Where latents are cached and used, the sizes are those of the latents, which have the same aspect
    ratios.
    """
    sizes = _load_sizes_file(shard, use_latents)
    if sizes is not None:
        return sizes
    try:
        return read_sizes(shard, use_latents)
    except (OSError, ValueError) as error:
        log.warning("sizes of the pictures in %s can't be read (%s)", shard, error)
        return np.zeros((0, 2), np.int32)


def _load_sizes_file(shard: Path, use_latents: bool) -> np.ndarray | None:
    """Load what the file beside a shard says of it; None where there is none that can be used."""
    file = name_sizes_file(shard)
    if not file.is_file():
        return None
    try:
        content = io.BytesIO(read_bytes(file, limit=MAX_SIZES_BYTES))
        # A file that someone has packed may hold much more than its own size.
        if sum(part.file_size for part in zipfile.ZipFile(content).infolist()) > MAX_SIZES_BYTES:
            raise ValueError(f"it holds more than {MAX_SIZES_BYTES} bytes")
        with np.load(content, allow_pickle=False) as kept:
            fingerprint, sizes = str(kept["shard"]), kept["latents" if use_latents else "images"]
        if sizes.ndim != 2 or sizes.shape[1] != 2 or sizes.dtype != np.int32 or (sizes < 0).any():
            raise ValueError(f"it holds an array {sizes.shape} of {sizes.dtype}")
        if fingerprint == _compute_fingerprint(shard):
            return sizes
        log.warning("%s was written for another %s, so sizes are read from the shard", file, shard.name)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, *UNREADABLE) as error:
        log.warning("%s can't be read, so sizes are read from the shard (%s)", file, describe_error(error))
    return None


def write_sizes(shard: Path) -> int:
    """Write the sizes of all targets beside a shard, so that nobody has to read its headers; returns how many."""
    index = TarIndex(shard)
    latents, images = (read_sizes(shard, use_latents, index) for use_latents in (True, False))
    content = io.BytesIO()
    np.savez(content, shard=np.array(_compute_fingerprint(shard)), latents=latents, images=images)
    write_whole(name_sizes_file(shard), content.getvalue())
    return len(images)


def read_sizes(shard: Path, use_latents: bool = True, index: TarIndex | None = None) -> np.ndarray:
    """Read height and width of the target of each sample (sample, 2) from the headers in a shard; 0 where none says.

    Args:
        shard: the tar.
        use_latents: take the size of cached latents where there are any.
        index: of the shard, if it has been read already.

    Raises:
        OSError: when the shard can't be read.
    """
    samples = (index or TarIndex(shard)).samples
    descriptor = open_regular(shard)
    try:
        sizes = [_read_target_size(descriptor, members, use_latents) for _, members in samples]
    finally:
        os.close(descriptor)
    return np.array(sizes, np.int32).reshape(-1, 2)


def _compute_fingerprint(shard: Path) -> str:
    """Compute what tells a shard from another one of the same name, without reading all of it."""
    with shard.open("rb") as file:
        return f"{shard.stat().st_size}-{hashlib.sha256(file.read(2**16)).hexdigest()}"


def _read_target_size(descriptor: int, members: Members, use_latents: bool) -> tuple[int, int]:
    """Read (height, width) of one sample's target; (0, 0) where nothing says it."""
    edit = any(name.startswith(("target.", "source")) for name in members)
    prefix = "target." if edit else ""
    latents = members.get("target.latent.safetensors", members.get("latent.safetensors"))
    names = [f"{prefix}{extension}" for extension in IMAGE_EXTENSIONS]
    try:
        if use_latents and latents:
            return _read_latents_size(descriptor, *latents)
        place = next(members[name] for name in names if name in members)
        return _read_image_size(descriptor, *place)
    except (StopIteration, *UNREADABLE):
        return 0, 0


def _read_latents_size(descriptor: int, offset: int, size: int) -> tuple[int, int]:
    (length,) = struct.unpack("<Q", os.pread(descriptor, 8, offset))
    if length > min(size, MAX_HEADER_BYTES):
        raise ValueError(f"a header of {length} bytes")
    header = parse_json(os.pread(descriptor, length, offset + 8), "the header of cached latents", dict)
    _, height, width = header["latents"]["shape"]
    if not all(type(side) is int and 0 <= side < 2**31 for side in (height, width)):
        raise ValueError(f"latents of {height} x {width}")
    return height, width


def _read_image_size(descriptor: int, offset: int, size: int) -> tuple[int, int]:
    with Image.open(io.BufferedReader(_Member(descriptor, offset, size), 4096), formats=IMAGE_FORMATS) as image:
        width, height = image.size
        # A PNG may carry its EXIF behind the pixels. Asking for that would decode them all, so it is left unread.
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
