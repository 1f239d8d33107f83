"""Decodes raw WebDataset samples into `Sample`s, and refuses whatever can't be decoded completely."""

import io
import json
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from tbac.types import Sample

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
UNREADABLE = (  # what Pillow and other parsers raise for damaged bytes
    UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError, EOFError, LookupError,
    TypeError, ArithmeticError, AttributeError, RuntimeError, MemoryError, struct.error,
)  # fmt: skip
MAX_PIXELS = 2**26  # 8192 x 8192; larger images are refused before they are decoded
MIN_SIDE = 8
ORIENTATION = 0x0112  # EXIF's tag that says how the camera was held
TURNED = (5, 6, 7, 8)  # its values for which width and height change places
MAX_ASPECT_RATIO = 200  # longer side divided by shorter side; Qwen's resizing accepts no more


class CorruptSampleError(ValueError):
    """A sample that is incomplete or can't be decoded.

    Args:
        message: names the field and what is wrong with it.
        kind: what is wrong in a few words, the same for all samples with this fault, so that they can be counted.
    """

    def __init__(self, message: str, kind: str = "incomplete") -> None:
        super().__init__(message)
        self.kind = kind


def decode_image(
    data: bytes, field: str, size: tuple[int, int] | None = None, reducing_gap: float | None = None
) -> Image.Image:
    """Decode an image file into an upright RGB picture.

    Every pixel is decoded here, so a file that breaks off is noticed. Pictures are turned as their EXIF says,
    transparent parts become white, and 16-bit gray keeps its range.

    Args:
        data: content of the file.
        field: its name, for messages.
        size: (height, width) in pixels that the picture will be cropped and resized to, if known.
        reducing_gap: a JPEG may be decoded at a fraction of its size, as long as it stays this many times larger than
            `size`; None decodes in full.

    Raises:
        CorruptSampleError: for what isn't a readable JPEG, PNG or WebP, for an animation, and for an absurd size.
    """
    try:
        # The header alone tells size and kind, so nothing absurd is ever decoded.
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        check_size(image.size, field)
        # An MPO of a camera has several frames too, but they are previews of one picture.
        if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
            raise CorruptSampleError(f"{field} is animated", "animated image")
        # A large JPEG decodes several times faster at a fraction of its size.
        if size and reducing_gap and isinstance(image, JpegImageFile):
            _choose_jpeg_scale(image, size, reducing_gap)
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return to_rgb(image)
    # The data may be anything, so any error of a parser means one thing: this sample can't be used.
    except CorruptSampleError:
        raise
    except UNREADABLE as error:
        raise CorruptSampleError(
            f"{field} is not a readable image ({error or type(error).__name__})", "unreadable image"
        ) from None


def check_reducing_gap(gap: float | None, name: str) -> None:
    """Raise ValueError for a gap that would decode fewer pixels than are needed; `name` is the option's."""
    if gap is not None and gap < 1:
        raise ValueError(f"{name} must be at least 1, or null to decode in full; got {gap}")


def _choose_jpeg_scale(image: Image.Image, size: tuple[int, int], gap: float) -> None:
    """Choose the scale that a JPEG is decoded at: the smallest one that is still `gap` times larger than `size`.

    JPEG offers a half, a quarter and an eighth. Scales that don't divide the sides are left out, since they would shift
    the picture by a part of a pixel.
    """
    width, height = image.size
    if image.getexif().get(ORIENTATION) in TURNED:
        width, height = height, width
    larger = min(width / size[1], height / size[0]) / gap
    factor = next((f for f in (8, 4, 2) if f <= larger and width % f == height % f == 0), 1)
    image.draft(None, (image.width // factor, image.height // factor))


def check_size(size: tuple[int, int], field: str) -> None:
    """Raise CorruptSampleError for a (width, height) that no sensible picture has."""
    short, long = sorted(size)
    if short * long > MAX_PIXELS or short < MIN_SIDE or long > MAX_ASPECT_RATIO * short:
        raise CorruptSampleError(
            f"{field} has {size[0]} x {size[1]} pixels; accepted are sides from {MIN_SIDE}, up to {MAX_PIXELS} pixels "
            f"and an aspect ratio up to {MAX_ASPECT_RATIO}",
            "absurd size",
        )


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert to three channels of 8 bits; transparent parts become white.

    Raises:
        ValueError: for pixels without a known range.
    """
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no known range")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layered = image.convert("RGBA")
        white = Image.new("RGBA", layered.size, "white")
        return Image.alpha_composite(white, layered).convert("RGB")
    return image.convert("RGB")


def decode_text(raw: Mapping[str, Any]) -> str:
    """Read the caption: `txt`, or else `instruction` or `caption` of `json`.

    Raises:
        CorruptSampleError: when there is no text, or it can't be read.
    """
    try:
        if "txt" in raw:
            text = raw["txt"].decode("utf-8-sig")
        elif "json" in raw:
            fields = json.loads(raw["json"])
            text = fields.get("instruction", fields.get("caption")) if isinstance(fields, dict) else None
        else:
            raise CorruptSampleError("neither txt nor json", "no caption")
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CorruptSampleError(f"text can't be read ({error})", "unreadable text") from None
    if not isinstance(text, str) or not text.strip():
        raise CorruptSampleError("the caption or instruction is missing or empty", "no caption")
    return text


def find_image(raw: Mapping[str, Any], name: str) -> tuple[str, bytes] | None:
    """Find an image by its name without extension ("" in text-to-image samples); returns its field and its bytes."""
    for extension in IMAGE_EXTENSIONS:
        field = f"{name}.{extension}" if name else extension
        if field in raw:
            return field, raw[field]
    return None


def decode_sample(
    raw: Mapping[str, Any],
    use_latents: bool = True,
    size: tuple[int, int] | None = None,
    reducing_gap: float | None = None,
) -> Sample:
    """Decode one text-to-image or edit sample.

    Args:
        raw: fields of one key, as bytes, with `__key__` and `__url__`.
        use_latents: take cached latents where the shard has them, instead of the target image.
        size: (height, width) in pixels that the target will be cropped to, if known.
        reducing_gap: lets a large JPEG target be decoded at a fraction of its size, as `decode_image` says; input
            images are always decoded in full.

    Raises:
        CorruptSampleError: when a part is missing or unreadable.
    """
    key, origin = raw["__key__"], raw.get("__url__", "")
    text = decode_text(raw)
    sources = decode_sources(raw)
    has_target = any(field.startswith("target.") for field in raw)
    if has_target and not sources:
        raise CorruptSampleError("an edit sample without a source image", "no source image")
    # Cached latents spare decoding the target image.
    packed = raw.get("target.latent.safetensors", raw.get("latent.safetensors"))
    if use_latents and packed:
        return Sample(key, text, sources, None, decode_latents(packed), origin)
    # An edit calls its image "target"; in a text-to-image sample there is only one, which needs no name.
    name = "target" if has_target or sources else ""
    image_file = find_image(raw, name)
    if image_file is None:
        raise CorruptSampleError("no target image", "no target image")
    field, data = image_file
    return Sample(key, text, sources, decode_image(data, field, size, reducing_gap), None, origin)


def decode_sources(raw: Mapping[str, Any]) -> list[Image.Image]:
    """Decode the input images `source`, `source_1`, … in the order of their numbers.

    Raises:
        CorruptSampleError: when one is unreadable.
    """
    fields = [field for field in raw if field.startswith("source") and field.endswith(IMAGE_EXTENSIONS)]
    names = {field.rsplit(".", 1)[0] for field in fields}
    sources = []
    # By length first, so that source_2 comes before source_10.
    for name in sorted(names, key=lambda name: (len(name), name)):
        image_file = find_image(raw, name)
        assert image_file is not None, "the name was taken from a field that is there"
        field, data = image_file
        sources.append(decode_image(data, field))
    return sources


def decode_latents(packed: bytes) -> Tensor:
    """Decode cached latents (channel, height, width) as float32.

    Raises:
        CorruptSampleError: for what isn't a safetensors file of such latents, all of them finite.
    """
    try:
        latents = load_safetensors(packed)["latents"]
    except (SafetensorError, KeyError) as error:
        raise CorruptSampleError(f"cached latents can't be read ({error})", "unreadable latents") from None
    if latents.ndim != 3:
        message = f"cached latents have shape {tuple(latents.shape)} instead of three axes"
        raise CorruptSampleError(message, "unreadable latents")
    if not latents.isfinite().all():
        raise CorruptSampleError("cached latents aren't finite", "unreadable latents")
    return latents.float()
