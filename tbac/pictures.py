"""The one way in which pictures are read, so that everything sees the same pixels of the same picture.

Training, generate, answer, evaluate and the Python API all end here. A file is a JPEG, PNG or WebP, whatever its name
says: no other parser of Pillow is ever asked, so none that starts a program. A picture is turned as its EXIF says,
transparent parts become white, 16-bit gray keeps its range, and every other mode becomes RGB.
"""

import io
import struct
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from tbac.files import expand_path, read_bytes

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
UNREADABLE = (  # what Pillow and other parsers raise for damaged bytes
    UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError, EOFError, LookupError,
    TypeError, ArithmeticError, AttributeError, RuntimeError, MemoryError, struct.error,
)  # fmt: skip
MAX_PIXELS = 2**26  # 8192 x 8192; larger images are refused before they are decoded
MAX_BYTES = 2**28  # of a file; every format needs less for so many pixels, unless it is padded
MIN_SIDE = 8
ORIENTATION = 0x0112  # EXIF's tag that says how the camera was held
TURNED = (5, 6, 7, 8)  # its values for which width and height change places
MAX_ASPECT_RATIO = 200  # longer side divided by shorter side; Qwen's resizing accepts no more


class PictureError(ValueError):
    """A picture that can't be used.

    Args:
        message: names the picture and what is wrong with it.
        kind: what is wrong in a few words, the same for all pictures with this fault, so that they can be counted.
    """

    def __init__(self, message: str, kind: str = "unreadable image") -> None:
        super().__init__(message)
        self.kind = kind


def decode_picture(
    data: bytes, name: str, size: tuple[int, int] | None = None, reducing_gap: float | None = None
) -> Image.Image:
    """Decode an image file into an upright RGB picture.

    Every pixel is decoded here, so a file that breaks off is noticed.

    Args:
        data: content of the file.
        name: what messages call it.
        size: (height, width) in pixels that the picture will be cropped and resized to, if known.
        reducing_gap: a JPEG may be decoded at a fraction of its size, as long as it stays this many times larger than
            `size`; None decodes in full.

    Raises:
        PictureError: for what isn't a readable JPEG, PNG or WebP, for an animation, and for an absurd size.
    """
    try:
        # The header alone tells size and kind, so nothing absurd is ever decoded.
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        check_size(image.size, name)
        # An MPO of a camera has several frames too, but they are previews of one picture.
        if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
            raise PictureError(f"{name} is animated", "animated image")
        # A large JPEG decodes several times faster at a fraction of its size.
        if size and reducing_gap and isinstance(image, JpegImageFile):
            _choose_jpeg_scale(image, size, reducing_gap)
        image.load()
        return _convert_upright(image)
    # The data may be anything, so any error of a parser means one thing: this picture can't be used.
    except PictureError:
        raise
    except UnidentifiedImageError:
        raise PictureError(f"{name} is not a readable image (it is no {', '.join(IMAGE_FORMATS)})") from None
    except UNREADABLE as error:
        raise PictureError(f"{name} is not a readable image ({error or type(error).__name__})") from None


def open_picture(path: Path | str, name: str | None = None) -> Image.Image:
    """Open a picture file as an upright RGB picture.

    Args:
        path: of the file; `~` is the home folder.
        name: what messages call it; None takes the path.

    Raises:
        PictureError: for what `decode_picture` refuses, and for what isn't a file or can't be read.
    """
    name = name or str(path)
    try:
        data = read_bytes(expand_path(path, name), name, MAX_BYTES)
    except ValueError as error:
        raise PictureError(str(error)) from None
    return decode_picture(data, name)


def check_header(path: Path, name: str | None = None) -> None:
    """Check that a file begins as a picture of a sensible size does, without decoding it.

    Raises:
        PictureError: for what isn't a regular file with the header of a JPEG, PNG or WebP.
    """
    name = name or str(path)
    try:
        with Image.open(io.BytesIO(read_bytes(path, name, MAX_BYTES)), formats=IMAGE_FORMATS) as image:
            check_size(image.size, name)
    except PictureError:
        raise
    except UNREADABLE as error:
        raise PictureError(f"{name} is not a readable image ({error or type(error).__name__})") from None


def to_upright_rgb(image: Image.Image, name: str = "an input image") -> Image.Image:
    """Convert a picture that the caller has opened or made to what `decode_picture` makes of its file.

    Args:
        image: of any mode; it is left as it is.
        name: what messages call it.

    Raises:
        PictureError: for what isn't a picture, can't be decoded, or has pixels without a known range.
    """
    if not isinstance(image, Image.Image):
        raise PictureError(f"{name} must be a PIL image, got {type(image).__name__}")
    try:
        return _convert_upright(image)
    except UNREADABLE as error:
        raise PictureError(f"{name} is not a readable image ({error or type(error).__name__})") from None


def check_size(size: tuple[int, int], name: str) -> None:
    """Raise PictureError for a (width, height) that no sensible picture has."""
    short, long = sorted(size)
    if short * long > MAX_PIXELS or short < MIN_SIDE or long > MAX_ASPECT_RATIO * short:
        raise PictureError(
            f"{name} has {size[0]} x {size[1]} pixels; accepted are sides from {MIN_SIDE}, up to {MAX_PIXELS} pixels "
            f"and an aspect ratio up to {MAX_ASPECT_RATIO}",
            "absurd size",
        )


def _choose_jpeg_scale(image: JpegImageFile, size: tuple[int, int], gap: float) -> None:
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


def _convert_upright(image: Image.Image) -> Image.Image:
    """Turn a picture as its EXIF says, and convert it to RGB; a picture that is both already is returned as it is."""
    if image.getexif().get(ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    return _to_rgb(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert to three channels of 8 bits; transparent parts become white.

    Raises:
        ValueError: for pixels without a known range.
    """
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no known range")
    if image.mode.startswith("I;16"):
        import numpy as np  # a tenth of a second, which few pictures need

        values = np.asarray(image)
        gray = (values // 257).astype(np.uint8)
        # One value may stand for what is transparent.
        if isinstance(transparent := image.info.get("transparency"), int):
            gray[values == transparent] = 255
        return Image.fromarray(gray).convert("RGB")
    if image.has_transparency_data:
        layered = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        # Pasted, not composed: three copies of a large picture would need a gigabyte.
        opaque = Image.new("RGB", layered.size, "white")
        opaque.paste(layered, mask=layered)
        return opaque
    return image if image.mode == "RGB" else image.convert("RGB")
