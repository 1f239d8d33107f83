"""Writes what is said about a scene: captions, edits, questions with answers, and prompts in GenEval's format."""

import math
from collections import Counter
from dataclasses import dataclass, replace
from random import Random

from data_prep.shapes.scene import (
    BACKGROUNDS,
    COLORS,
    GLYPHS,
    ROW_NAMES,
    STACKED,
    Item,
    Scene,
    arrange_scene,
    list_free_cells,
    place_object,
)

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
OPENINGS = ("", "a photo of ", "a picture of ", "an image with ")
EDIT_TYPES = ("add", "remove", "replace", "recolor", "move", "background")
QUESTION_KINDS = ("color", "where", "shape", "count", "exists", "background")
GENEVAL_TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")


def make_plural(shape: str) -> str:
    """Make the plural of a shape's name."""
    if shape.startswith("letter "):
        return "letters " + shape.split()[1]
    return shape + ("es" if shape.endswith("s") else "s")


def name_object(item: Item, with_color: bool = True) -> str:
    """Name an object by its shape, with or without its colour."""
    return f"{item.color} {item.shape}" if with_color else item.shape


def find_relations(first: Item, second: Item) -> list[str]:
    """Find where the first object clearly stands relative to the second: at most 60 degrees off an axis (GenEval)."""
    dx, dy = first.column - second.column, first.row - second.row
    distance = math.hypot(dx, dy)
    named = ((dx, "left of", "right of"), (dy, "above", "below"))
    return [(less if d < 0 else more) for d, less, more in named if abs(d) > 0.5 * distance]


def write_long_caption(scene: Scene) -> str:
    """Describe everything in a scene: the background, then each object with its colour and place, in reading order."""
    parts = [f"a {name_object(i)} at the {i.place}" for i in scene.items]
    return f"on a {scene.background} background: " + ", ".join(parts) if parts else f"a {scene.background} background"


def is_stacked(scene: Scene) -> bool:
    """Whether two different shapes stand one above the other, as pairs in composed pictures may."""
    return scene.cells == STACKED and scene.items[0].shape != scene.items[1].shape


def list_objects(scene: Scene, with_color: bool) -> str:
    """List the objects in reading order as counted groups, such as "three red squares and a circle"."""
    groups = Counter(name_object(i, with_color) for i in scene.items)
    parts = []
    for item in scene.items:
        name = name_object(item, with_color)
        if name in groups:
            n = groups.pop(name)
            color = f"{item.color} " if with_color else ""
            parts.append(f"a {name}" if n == 1 else f"{NUMBERS[n]} {color}{make_plural(item.shape)}")
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def sample_short_caption(rng: Random, scene: Scene) -> str:
    """Draw a caption without places: the objects in reading order, or where one of two stands relative to the other."""
    items = list(scene.items)
    with_color = rng.random() < 0.7
    body = list_objects(scene, with_color)
    if is_stacked(scene) or (len(items) == 2 and items[0].shape != items[1].shape and rng.random() < 0.5):
        first, second = rng.sample(items, 2)
        where = rng.choice(find_relations(first, second))
        body = f"a {name_object(first, with_color)} {where} a {name_object(second, with_color)}"
    if rng.random() < 0.1:
        body += f" on a {scene.background} background"
    return rng.choice(OPENINGS) + body


def write_word_caption(scene: Scene) -> str:
    """Describe a picture of a word: its letters, its colour and its row."""
    return f'the word "{scene.letters}" in {scene.items[0].color} at the {ROW_NAMES[scene.items[0].row]}'


def sample_caption(rng: Random, scene: Scene) -> str:
    """Draw a caption: mostly a short one if the places follow from how pictures are composed, else the long one."""
    if scene.word:
        return rng.choice(OPENINGS) + write_word_caption(scene) if rng.random() > 0.1 else write_long_caption(scene)
    follows = scene.composed or is_stacked(scene)
    return sample_short_caption(rng, scene) if follows and rng.random() > 0.1 else write_long_caption(scene)


@dataclass(frozen=True)
class Edit:
    """An instruction that turns one scene into another; `anywhere`: it leaves open where an object is added."""

    kind: str
    instruction: str
    source: Scene
    target: Scene
    anywhere: bool = False


def sample_edit(rng: Random, source: Scene) -> Edit:
    """Draw an edit of the scene, whose instruction never fits two objects."""
    names = Counter(name_object(item) for item in source.items)
    unique = [item for item in source.items if names[name_object(item)] == 1]
    kind = rng.choice(_list_possible_edits(source, unique))
    items, background, anywhere = list(source.items), source.background, False
    if kind == "background":
        background = rng.choice([name for name in BACKGROUNDS if name != source.background])
        instruction = rng.choice((f"change the background to {background}", f"make the background {background}"))
    elif kind == "add":
        place_object(rng, items, rng.choice(list(GLYPHS)), rng.choice(list(COLORS)))
        anywhere = rng.random() >= 0.75
        where = "" if anywhere else f" at the {items[-1].place}"
        instruction = rng.choice(("add", "put")) + f" a {name_object(items[-1])}" + where
    elif kind == "remove":
        chosen = rng.choice(unique)
        items.remove(chosen)
        instruction = rng.choice(("remove", "delete")) + f" the {name_object(chosen)}"
    else:
        chosen = rng.choice(unique)
        items.remove(chosen)
        changed, instruction = _change_item(rng, kind, chosen, source)
        items.append(changed)
    return Edit(kind, instruction, source, arrange_scene(background, items), anywhere)


def _list_possible_edits(source: Scene, unique: list[Item]) -> list[str]:
    """List the kinds of edits that a scene allows; `unique` are the objects whose names fit no other object."""
    kinds = ["background"]
    if unique:
        kinds += ["replace", "recolor"]
    if unique and len(source.items) > 1:
        kinds.append("remove")
    if unique and list_free_cells(source.items):
        kinds.append("move")
    if len(source.items) < 6 and list_free_cells(source.items):
        kinds.append("add")
    return kinds


def _change_item(rng: Random, kind: str, item: Item, source: Scene) -> tuple[Item, str]:
    """Change an object by an edit of this kind; returns the new object and the instruction."""
    if kind == "replace":
        changed = replace(item, shape=rng.choice([shape for shape in GLYPHS if shape != item.shape]))
        return changed, f"replace the {name_object(item)} with a {name_object(changed)}"
    if kind == "recolor":
        changed = replace(item, color=rng.choice([color for color in COLORS if color != item.color]))
        form = rng.choice(("make the {} {}", "change the color of the {} to {}"))
        return changed, form.format(name_object(item), changed.color)
    row, column = rng.choice(list_free_cells(source.items))
    changed = replace(item, row=row, column=column)
    return changed, f"move the {name_object(item)} to the {changed.place}"


def sample_question(rng: Random, scene: Scene, kinds: tuple[str, ...] = QUESTION_KINDS) -> tuple[str, str]:
    """Draw a question about the scene and its answer; the word just before the question mark says what is asked for."""
    shapes = Counter(i.shape for i in scene.items)
    colors = Counter(i.color for i in scene.items)
    # A question about "the circle" needs that there is only one.
    of_single_shape = [i for i in scene.items if shapes[i.shape] == 1]
    of_single_color = [i for i in scene.items if colors[i.color] == 1]
    kind = rng.choice(kinds)
    if kind in ("color", "where") and of_single_shape:
        item = rng.choice(of_single_shape)
        if kind == "where":
            return f"where is the {item.shape}?", item.place
        return f"what color is the {item.shape}?", item.color
    if kind == "shape" and of_single_color:
        item = rng.choice(of_single_color)
        return f"what shape is {item.color}?", item.shape
    if kind == "count" and shapes:
        shape = rng.choice(list(shapes)) if rng.random() < 0.7 else rng.choice(list(GLYPHS))
        return f"what is the number of {make_plural(shape)}?", NUMBERS[shapes[shape]]
    if kind == "exists" or "background" not in kinds:
        shape = rng.choice(list(GLYPHS) + list(shapes) * 2)
        return f"is there a {shape}?", "yes" if shapes[shape] else "no"
    return "what color is the background?", scene.background


def sample_geneval_prompts(rng: Random, per_tag: int) -> list[dict]:
    """Draw prompts in the format of GenEval's `evaluation_metadata.jsonl`, `per_tag` for each of its six tags."""
    rows = []
    for tag in GENEVAL_TAGS:
        seen: set[str] = set()
        for index in range(per_tag * 50):
            body, asked = _sample_geneval_prompt(rng, tag, index)
            # "a photo of" as GenEval has it; the other openings only where all such prompts are taken.
            prompts = [opening + body for opening in (*OPENINGS[1:], "")]
            prompt = next((text for text in prompts if text not in seen), None)
            if prompt is not None:
                seen.add(prompt)
                rows.append({"tag": tag, **asked, "prompt": prompt})
            if len(seen) == per_tag:
                break
    return rows


def _sample_geneval_prompt(rng: Random, tag: str, index: int) -> tuple[str, dict]:
    """Draw the text of a prompt of a tag, and `include` and `exclude`, the objects that GenEval looks for."""
    shapes = list(GLYPHS)
    a, b = rng.sample(shapes, 2)
    color_a, color_b = rng.sample(list(COLORS), 2)
    if tag == "single_object":
        a = shapes[index % len(shapes)]
        return f"a {a}", {"include": [{"class": a, "count": 1}]}
    if tag == "two_object":
        return f"a {a} and a {b}", {"include": [{"class": a, "count": 1}, {"class": b, "count": 1}]}
    if tag == "counting":
        n = rng.randint(2, 4)
        asked = {"include": [{"class": a, "count": n}], "exclude": [{"class": a, "count": n + 1}]}
        return f"{NUMBERS[n]} {make_plural(a)}", asked
    if tag == "colors":
        return f"a {color_a} {a}", {"include": [{"class": a, "count": 1, "color": color_a}]}
    if tag == "position":
        where = rng.choice(RELATIONS)
        wanted = [{"class": b, "count": 1}, {"class": a, "count": 1, "position": [where, 0]}]
        return f"a {a} {where} a {b}", {"include": wanted}
    wanted = [{"class": a, "count": 1, "color": color_a}, {"class": b, "count": 1, "color": color_b}]
    return f"a {color_a} {a} and a {color_b} {b}", {"include": wanted}
