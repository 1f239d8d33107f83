"""Reads captions by a grammar of its own, so that a test doesn't compare the caption writer with itself."""

import re
from collections import Counter

from data_prep.shapes.language import NUMBERS, OPENINGS, make_plural
from data_prep.shapes.scene import COLORS, GLYPHS


def parse_objects(text: str) -> Counter:
    """Count the objects that a caption names: (colour or None, shape) -> count."""
    for opening in sorted(OPENINGS, key=len, reverse=True):
        if opening and text.startswith(opening):
            text = text.removeprefix(opening)
    objects: Counter = Counter()
    names = {make_plural(s): s for s in GLYPHS} | {s: s for s in GLYPHS}
    pattern = (
        rf"\b(a|{'|'.join(NUMBERS[2:])}) (?:({'|'.join(COLORS)}) )?({'|'.join(sorted(names, key=len, reverse=True))})\b"
    )
    for count, color, shape in re.findall(pattern, text):
        objects[color or None, names[shape]] += 1 if count == "a" else NUMBERS.index(count)
    return objects
