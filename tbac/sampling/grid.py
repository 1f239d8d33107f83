"""Putting pictures side by side, with captions."""

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

LINE_HEIGHT = 13


def join_pictures(
    images: Sequence[Image.Image],
    columns: int,
    scale: int = 1,
    captions: Sequence[str] | None = None,
    wrap: int = 22,
    margin: int = 4,
) -> Image.Image:
    """Join many pictures in one.

    Args:
        images: pictures of one size.
        columns: pictures per row.
        scale: factor by which pictures are enlarged, without smoothing.
        captions: one text under each picture.
        wrap: characters per caption line.
        margin: pixels between pictures.

    Raises:
        ValueError: without any picture.
    """
    if not images:
        raise ValueError("a grid needs at least one picture")
    # All captions get as much room as the longest one needs.
    lines: list[list[str]] = [[] for _ in images]
    if captions:
        lines = [textwrap.wrap(caption, wrap) for caption in captions]
    text_height = LINE_HEIGHT * max(map(len, lines))
    width, height = images[0].width * scale, images[0].height * scale
    # Fewer pictures than columns make a narrower sheet; the last row may have gaps.
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    sheet_size = (columns * (width + margin) + margin, rows * (height + text_height + margin) + margin)
    sheet = Image.new("RGB", sheet_size, "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default()
    for index, (image, text) in enumerate(zip(images, lines, strict=True)):
        left = margin + index % columns * (width + margin)
        top = margin + index // columns * (height + text_height + margin)
        sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), (left, top))
        for number, line in enumerate(text):
            draw.text((left, top + height + number * LINE_HEIGHT), line, fill="black", font=font)
    return sheet
