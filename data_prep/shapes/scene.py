"""Draws scenes of coloured shapes and letters, and pictures of them.

A picture is 24 x 24 pixels, divided into 3 x 3 cells of 8. An object is a 6 x 6 glyph in the middle of a cell, so there
are two pixels of background between neighbours. The light is uneven, as in photographs: in the background red grows
from top to bottom and blue from left to right, so that a single patch tells where it is.

Most pictures are composed, as photographs are: one object stands in the centre, two stand side by side or one above the
other, and more stand in a row, in the corners or in two rows. A caption may then leave out where they stand. In the
other pictures objects stand anywhere, and captions say where.

Everything is a function of a `random.Random`, so a seed gives the same world on every machine. A hash of the scene
decides which tenth of all possible scenes is held out of training.
"""

import hashlib
from dataclasses import dataclass, field
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

# The light adds at most 15 levels to the background, or takes them away: (row, column, channel).
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
GLYPH_SIZE = 6
GLYPHS = {
    name: (np.array(list(rows.replace(" ", ""))) == "#").reshape(GLYPH_SIZE, GLYPH_SIZE)
    for name, rows in _GLYPH_ROWS.items()
}
MARGIN = (CELL_SIZE - GLYPH_SIZE) // 2

ROW_NAMES = ("top", "middle", "bottom")
COLUMN_NAMES = ("left", "center", "right")

# Number of objects -> cells (row, column) of a composed picture; two objects may also stand one above the other.
COMPOSED = {
    1: ((1, 1),),
    2: ((1, 0), (1, 2)),
    3: ((1, 0), (1, 1), (1, 2)),
    4: ((0, 0), (0, 2), (2, 0), (2, 2)),
    5: ((0, 0), (0, 2), (1, 1), (2, 0), (2, 2)),
    6: ((0, 0), (0, 1), (0, 2), (2, 0), (2, 1), (2, 2)),
}
STACKED = ((0, 1), (2, 1))
LETTERS = tuple(name for name in GLYPHS if name.startswith("letter "))


@dataclass(frozen=True)
class Mixture:
    """Shares of unusual scenes.

    Args:
        words: share of words: two or three letters of one colour in one row, from the left.
        dense: share of pictures of five or six objects, besides the few among the usual ones.
    """

    words: float = 0.0
    dense: float = 0.0


USUAL = Mixture()


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
    """A background and up to six objects in reading order; `word` says that they are the letters of a word."""

    background: str
    items: tuple[Item, ...]
    word: bool = field(default=False, repr=False)

    @property
    def cells(self) -> tuple[tuple[int, int], ...]:
        """(row, column) of each object."""
        return tuple((i.row, i.column) for i in self.items)

    @property
    def composed(self) -> bool:
        """Whether the objects stand where a composed picture has so many objects."""
        return self.cells == COMPOSED.get(len(self.items))

    @property
    def letters(self) -> str:
        """The letters of a word, in reading order."""
        return "".join(i.shape[-1] for i in self.items)

    @property
    def held_out(self) -> bool:
        """Whether the scene belongs to the tenth that is never trained on."""
        return hashlib.sha256(repr(self).encode()).digest()[0] % 10 == 0


def arrange_scene(background: str, items: list[Item]) -> Scene:
    """Make a scene of objects, sorted in reading order."""
    return Scene(background, tuple(sorted(items, key=lambda i: (i.row, i.column))))


def list_free_cells(items: list[Item] | tuple[Item, ...]) -> list[tuple[int, int]]:
    """List the cells that hold no object."""
    taken = {(i.row, i.column) for i in items}
    return [(r, c) for r in range(CELLS) for c in range(CELLS) if (r, c) not in taken]


def place_object(rng: Random, items: list[Item], shape: str, color: str) -> None:
    """Put one more object into a random free cell."""
    row, column = rng.choice(list_free_cells(items))
    items.append(Item(shape, color, row, column))


def draw_word_scene(rng: Random) -> Scene:
    """Draw a word."""
    row, color = rng.randrange(CELLS), rng.choice(list(COLORS))
    items = [Item(rng.choice(LETTERS), color, row, column) for column in range(rng.randint(2, CELLS))]
    return Scene(rng.choice(list(BACKGROUNDS)), tuple(items), word=True)


def draw_crowded_scene(rng: Random) -> Scene:
    """Draw a composed scene of five or six objects."""
    cells = COMPOSED[rng.randint(5, 6)]
    items = [Item(rng.choice(list(GLYPHS)), rng.choice(list(COLORS)), row, column) for row, column in cells]
    return arrange_scene(rng.choice(list(BACKGROUNDS)), items)


def sample_scene(rng: Random, mixture: Mixture = USUAL) -> Scene:
    """Draw a scene of 1 to 6 objects: single, pair, group of one kind, or mixture; up to three may stand anywhere."""
    if mixture != USUAL:
        draw = rng.random()
        if draw < mixture.words:
            return draw_word_scene(rng)
        if draw < mixture.words + mixture.dense:
            return draw_crowded_scene(rng)
    # The objects: one, two different ones, a group of one kind, or a mixture, as captions distinguish them.
    shapes, colors = list(GLYPHS), list(COLORS)
    kind = rng.random()
    if kind < 0.25:
        wanted = [(rng.choice(shapes), rng.choice(colors))]
    elif kind < 0.65:
        wanted = list(zip(rng.sample(shapes, 2), rng.sample(colors, 2), strict=True))
    elif kind < 0.9:
        wanted = [(rng.choice(shapes), rng.choice(colors))] * rng.randint(2, 4)
    else:
        wanted = [(rng.choice(shapes), rng.choice(colors)) for _ in range(rng.randint(3, 6))]
    # The places: mostly composed, so that captions may leave them out; sometimes anywhere, so that others are learned.
    background = rng.choice(list(BACKGROUNDS))
    items: list[Item] = []
    if len(wanted) <= 3 and rng.random() < 0.3:
        for shape, color in wanted:
            place_object(rng, items, shape, color)
        return arrange_scene(background, items)
    cells = STACKED if kind < 0.65 and len(wanted) == 2 and rng.random() < 0.5 else COMPOSED[len(wanted)]
    for (shape, color), (row, column) in zip(wanted, cells, strict=True):
        items.append(Item(shape, color, row, column))
    return arrange_scene(background, items)


def render(scene: Scene) -> Image.Image:
    """Draw the scene as an RGB picture of `IMAGE_SIZE` pixels a side."""
    pixels = BACKGROUNDS[scene.background] + LIGHT
    for item in scene.items:
        top, left = item.corner
        pixels[top : top + GLYPH_SIZE, left : left + GLYPH_SIZE][GLYPHS[item.shape]] = COLORS[item.color]
    return Image.fromarray(pixels.astype(np.uint8))
