"""Putting pictures side by side, with captions."""

import io
import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

MARGIN = 4  # pixels between pictures


def encode_png(picture: Image.Image) -> bytes:
    """Encode a picture as a PNG file."""
    png = io.BytesIO()
    picture.save(png, format="PNG")
    return png.getvalue()


def join_pictures(
    images: Sequence[Image.Image],
    columns: int,
    scale: int = 1,
    captions: Sequence[str] | None = None,
    wrap: int = 22,
    font_size: int = 10,
) -> Image.Image:
    """Join many pictures in one.

    Args:
        images: pictures of one size.
        columns: pictures per row.
        scale: factor by which pictures are enlarged, without smoothing.
        captions: one text under each picture.
        wrap: characters per caption line.
        font_size: of the captions, in pixels.

    Raises:
        ValueError: without any picture.
    """
    if not images:
        raise ValueError("a grid needs at least one picture")
    # All captions get as much room as the longest one needs.
    lines: list[list[str]] = [[] for _ in images]
    if captions:
        lines = [textwrap.wrap(caption, wrap) for caption in captions]
    line_height = round(1.3 * font_size)
    text_height = line_height * max(map(len, lines))
    width, height = images[0].width * scale, images[0].height * scale
    # Fewer pictures than columns make a narrower sheet; the last row may have gaps.
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    sheet_size = (columns * (width + MARGIN) + MARGIN, rows * (height + text_height + MARGIN) + MARGIN)
    sheet = Image.new("RGB", sheet_size, "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(font_size)
    for index, (image, text) in enumerate(zip(images, lines, strict=True)):
        left = MARGIN + index % columns * (width + MARGIN)
        top = MARGIN + index // columns * (height + text_height + MARGIN)
        sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), (left, top))
        for number, line in enumerate(text):
            draw.text((left, top + height + number * line_height), line, fill="black", font=font)
    return sheet
