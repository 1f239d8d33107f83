"""Pictures side by side, with captions."""

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
    """One picture of many.

    Args:
        images: all of one size.
        columns: pictures per row.
        scale: enlargement without smoothing.
        captions: one text under each picture.
        wrap: characters per caption line.
        margin: pixels between pictures.

    Raises:
        ValueError: without any picture.
    """
    if not images:
        raise ValueError("a grid needs at least one picture")
    lines = [textwrap.wrap(c, wrap) for c in captions] if captions else [[] for _ in images]
    text_height = LINE_HEIGHT * max(map(len, lines))
    width, height = images[0].width * scale, images[0].height * scale
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    sheet = Image.new(
        "RGB", (columns * (width + margin) + margin, rows * (height + text_height + margin) + margin), "white"
    )
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default()
    for index, (image, text) in enumerate(zip(images, lines, strict=True)):
        left = margin + index % columns * (width + margin)
        top = margin + index // columns * (height + text_height + margin)
        sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), (left, top))
        for number, line in enumerate(text):
            draw.text((left, top + height + number * LINE_HEIGHT), line, fill="black", font=font)
    return sheet
