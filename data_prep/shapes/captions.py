"""Captions of the shapes world with what is true of them, for `experiments/probe.py`.

The world has one word for each thing, so what is unseen are not words but combinations: one colour of each shape is
tested and never learnt from.
"""

from random import Random

from data_prep.shapes.language import NUMBERS, OPENINGS, RELATIONS, make_plural
from data_prep.shapes.scene import BACKGROUNDS, COLORS, GLYPHS
from tbac.evaluation.captions import LabelledCaption, choose_split


def draw_captions(seed: int, count: int) -> list[LabelledCaption]:
    """Draw captions about one object, a group, or two objects.

    Args:
        seed: of the draws.
        count: how many captions; those that are drawn twice are there once.

    Returns:
        Captions with the concepts shape, color, count, relation, and the colour of that object of two which stands left
        or above: a bag of words doesn't tell it.
    """
    rng = Random(f"captions/{seed}")
    shapes, colors = list(GLYPHS), list(COLORS)
    # One colour of each shape isn't learnt from.
    left_out = {(shape, colors[index % len(colors)]) for index, shape in enumerate(shapes)}
    captions: dict[str, LabelledCaption] = {}
    for _ in range(count):
        kind = rng.choice(("object", "group", "pair"))
        shape, color = rng.choice(shapes), rng.choice(colors)
        objects = [(shape, color)]
        opening, background = rng.choice(OPENINGS), rng.choice([None, *BACKGROUNDS])
        end = f" on a {background} background" if background else ""
        if kind == "object":
            body, labels = f"a {color} {shape}", {"shape": shape, "color": color, "count": "one"}
        elif kind == "group":
            number = rng.randint(2, 4)
            body = f"{NUMBERS[number]} {color} {make_plural(shape)}"
            labels = {"shape": shape, "color": color, "count": NUMBERS[number]}
        else:
            other = rng.choice([name for name in shapes if name != shape]), rng.choice(colors)
            objects.append(other)
            relation = rng.choice(RELATIONS)
            body = f"a {color} {shape} {relation} a {other[1]} {other[0]}"
            leads = relation in ("left of", "above")  # the object that is named first stands left or above
            labels = {"relation": relation, "color of the left or upper": color if leads else other[1]}
        text = opening + body + end
        split = "unseen" if left_out & set(objects) else choose_split(text)
        captions[text] = LabelledCaption(text, labels, split)
    return list(captions.values())
