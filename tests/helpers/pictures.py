"""Makes pictures, and prompts of every kind."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import torch
from PIL import Image

from tbac.pictures import ORIENTATION


def make_noise_image(seed: int, size: tuple[int, int] = (32, 32)) -> Image.Image:
    """Make a picture of coloured noise, of size (width, height)."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def make_prompt_cases() -> dict[str, tuple[list[str], list[list[Image.Image] | None] | None]]:
    """Make prompts of every kind: texts of unequal length, one image each, several images, and mixtures."""
    texts = ["a red circle", "", "three green squares and a letter L at the top left on a black background"]
    one, two = [make_noise_image(1)], [make_noise_image(2), make_noise_image(3, (48, 20))]
    return {
        "text": (texts, None),
        "one_image": (texts, [one, [make_noise_image(4)], [make_noise_image(5, (20, 60))]]),
        "several_images": (texts[:2], [two, [*one, *two]]),
        "mixed": (texts, [None, two, one]),
    }


def encode_image(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _make_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _make_png(header: bytes, pixels: bytes, chunks: dict[str, bytes]) -> bytes:
    middle = b"".join(_make_chunk(kind.encode(), data) for kind, data in chunks.items())
    ends = _make_chunk(b"IDAT", zlib.compress(pixels)) + _make_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + _make_chunk(b"IHDR", header) + middle + ends


def make_png_of_size(width: int, height: int) -> bytes:
    """Make a PNG whose header promises a size and whose data is only a few bytes."""
    return _make_png(struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"\0", {})


def make_png(depth: int, color_type: int, pixels: np.ndarray, **chunks: bytes) -> bytes:
    """Make a PNG of a kind that Pillow doesn't write: rows of pixels in network order, and further chunks."""
    height, width = pixels.shape[:2]
    pixels = pixels.astype(pixels.dtype.newbyteorder(">"))
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    return _make_png(struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0), rows, chunks)


FRAMES = [make_noise_image(i, (16, 16)) for i in range(3)]


def make_orientation_exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif.tobytes()
