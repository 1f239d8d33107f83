"""Scenes of coloured shapes and letters: what is in a picture, and how it is drawn.

A picture is 24 x 24 pixels, divided into 3 x 3 cells of 8. An object is a 6 x 6 glyph in the middle of a cell, so that two
pixels of background are between neighbours. The light is uneven, as in photographs: red grows from top to bottom and blue
from left to right in the background, so that a single patch tells where it is. Everything is a function of a
`random.Random`, so a seed gives the same world on every machine.
"""

from dataclasses import dataclass
from random import Random

import numpy as np
from PIL import Image

CELLS = 3
CELL_SIZE = 8
IMAGE_SIZE = CELLS * CELL_SIZE

COLORS = {
    "red": (224, 48, 48),
    "green": (40, 168, 64),
    "blue": (48, 80, 232),
    "yellow": (240, 208, 32),
}
BACKGROUNDS = {"black": (16, 16, 16), "gray": (88, 88, 88)}

# What the light adds to the background: (row, column, channel), at most 15 levels either way.
_SLOPE = np.repeat(np.linspace(-15, 15, CELLS), CELL_SIZE).round().astype(int)
LIGHT = np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), int)
LIGHT[:, :, 0] = _SLOPE[:, None]
LIGHT[:, :, 2] = _SLOPE[None, :]

_GLYPH_ROWS = {
    "circle": "..##.. .####. ###### ###### .####. ..##..",
    "square": "###### ###### ###### ###### ###### ######",
    "triangle": "..##.. ..##.. .####. .####. ###### ######",
    "letter L": "##.... ##.... ##.... ##.... ###### ######",
    "letter T": "###### ###### ..##.. ..##.. ..##.. ..##..",
}
GLYPHS = {name: np.array([[c == "#" for c in row] for row in rows.split()]) for name, rows in _GLYPH_ROWS.items()}
GLYPH_SIZE = 6
MARGIN = (CELL_SIZE - GLYPH_SIZE) // 2

ROW_NAMES = ("top", "middle", "bottom")
COLUMN_NAMES = ("left", "center", "right")


@dataclass(frozen=True)
class Item:
    """One object: a shape (a key of `GLYPHS`) of a colour, in a cell."""

    shape: str
    color: str
    row: int
    column: int

    @property
    def place(self) -> str:
        return f"{ROW_NAMES[self.row]} {COLUMN_NAMES[self.column]}"

    @property
    def corner(self) -> tuple[int, int]:
        """(top, left) pixel of its glyph."""
        return self.row * CELL_SIZE + MARGIN, self.column * CELL_SIZE + MARGIN


@dataclass(frozen=True)
class Scene:
    """A background and up to six objects, in reading order."""

    background: str
    items: tuple[Item, ...]


def in_reading_order(background: str, items: list[Item]) -> Scene:
    return Scene(background, tuple(sorted(items, key=lambda i: (i.row, i.column))))


def free_cells(items: list[Item] | tuple[Item, ...]) -> list[tuple[int, int]]:
    """Cells that hold no object."""
    taken = {(i.row, i.column) for i in items}
    return [(r, c) for r in range(CELLS) for c in range(CELLS) if (r, c) not in taken]


def place(rng: Random, items: list[Item], shape: str, color: str) -> None:
    """Put one more object into a random free cell."""
    row, column = rng.choice(free_cells(items))
    items.append(Item(shape, color, row, column))


def sample_scene(rng: Random) -> Scene:
    """Draw a scene of 1 to 6 objects: singles, pairs, groups of one shape, and mixtures."""
    shapes, colors = list(GLYPHS), list(COLORS)
    kind = rng.random()
    if kind < 0.25:
        wanted = [(rng.choice(shapes), rng.choice(colors))]
    elif kind < 0.65:
        wanted = list(zip(rng.sample(shapes, 2), rng.sample(colors, 2), strict=True))
    elif kind < 0.88:
        shape, count = rng.choice(shapes), rng.randint(2, 4)
        one_color, one_palette = rng.choice(colors), rng.random() < 0.7
        wanted = [(shape, one_color if one_palette else rng.choice(colors)) for _ in range(count)]
    else:
        wanted = [(rng.choice(shapes), rng.choice(colors)) for _ in range(rng.randint(3, 6))]
    background = rng.choice(list(BACKGROUNDS))
    items: list[Item] = []
    for shape, color in wanted:
        place(rng, items, shape, color)
    return in_reading_order(background, items)


def render(scene: Scene) -> Image.Image:
    """Draw the scene as an RGB picture of `IMAGE_SIZE` pixels a side."""
    pixels = BACKGROUNDS[scene.background] + LIGHT
    for item in scene.items:
        top, left = item.corner
        pixels[top : top + GLYPH_SIZE, left : left + GLYPH_SIZE][GLYPHS[item.shape]] = COLORS[item.color]
    return Image.fromarray(pixels.astype(np.uint8))
