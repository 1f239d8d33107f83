"""Writes what the shapes world's model may learn from by reward: prompts with what is true of a right picture.

GenEval's own rules don't mind objects that nobody asked for, and a model that learns from them soon fills its pictures
with such. So here a picture is right only if it shows nothing else.

They show scenes that aren't held out, and none of the prompts of the benchmark of GenEval's format is among them,
whatever it begins with, so that scores on the benchmarks tell what was learnt.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from data_prep.shapes.benchmarks import Asked, list_dense_questions, write_dense
from data_prep.shapes.language import (
    NUMBERS,
    OPENINGS,
    find_relations,
    is_stacked,
    make_plural,
    name_object,
    sample_geneval_prompts,
    write_long_caption,
    write_word_caption,
)
from data_prep.shapes.samples import World, write_edits, write_rows, write_world_file
from data_prep.shapes.scene import GLYPHS, Item, Scene, draw_crowded_scene, draw_word_scene

MOST_WORDS = 100  # prompts of words; there are only so many


def write_reward_files(world: World, out: Path) -> None:
    """Write `world.json` for the detector, `geneval.jsonl`, `edits.jsonl` with its pictures, `dense/` and `words/`.

    `strict.jsonl` is for scores: the prompts of the benchmark of GenEval's format, judged as those to learn from are.
    """
    count = world.sizes.rewards
    write_world_file(out)
    write_rows(out / "geneval.jsonl", list(islice(draw_geneval_rows(world), count)))
    write_rows(out / "strict.jsonl", [make_strict(row) for row in sample_benchmark(world)])
    write_edits(list(islice(world.draw_training_edits("rewards"), count)), out)
    rng = Random(f"rewards dense/{world.seed}")
    crowded = (scene for scene in iter(lambda: draw_crowded_scene(rng), None) if not scene.held_out)
    write_dense(crowded, count, out / "dense", write_long_caption, list_dense_questions)
    words = Random(f"rewards words/{world.seed}")
    spelled = (scene for scene in iter(lambda: draw_word_scene(words), None) if not scene.held_out)
    write_dense(spelled, min(count, MOST_WORDS), out / "words", write_word_caption, list_word_questions)


def list_word_questions(scene: Scene) -> list[Asked]:
    """List questions about a word: how often each letter is there, whether it is spelt right, and in its colour."""
    asked: list[Asked] = []
    for shape in dict.fromkeys(item.shape for item in scene.items):
        count = sum(item.shape == shape for item in scene.items)
        asked.append(("other - count", f"is the number of {make_plural(shape)} {count}?", ()))
    letters = tuple(range(1, len(asked) + 1))
    asked.append(("entity - text", f'does it say "{scene.letters}"?', letters))
    text = f'does it say "{scene.letters}" in {scene.items[0].color}?'
    asked.append(("attribute - color", text, (len(asked),)))
    return asked


def draw_geneval_rows(world: World) -> Iterator[dict[str, Any]]:
    """Draw prompts in GenEval's format without end, each once, none of which the benchmark has."""
    taken = {strip_opening(row["prompt"]) for row in sample_benchmark(world)}
    seen: set[str] = set()
    for rng, scene in world.draw_training_scenes("rewards"):
        described = describe_scene(rng, scene)
        if described is None or described[0] in taken:
            continue
        body, row = described
        prompt = rng.choice(OPENINGS) + body
        if prompt not in seen:
            seen.add(prompt)
            yield make_strict({**row, "prompt": prompt})


def sample_benchmark(world: World) -> list[dict[str, Any]]:
    """Draw the rows of the world's benchmark of GenEval's format, as it does itself."""
    return sample_geneval_prompts(Random(f"benchmarks/{world.seed}"), world.sizes.prompts_per_tag)


def make_strict(row: dict[str, Any]) -> dict[str, Any]:
    """Exclude all objects that a row of GenEval's format doesn't ask for, and more of those that it does."""
    counts: dict[str, int] = dict.fromkeys(GLYPHS, 0)
    for wanted in row["include"]:
        counts[wanted["class"]] += wanted["count"]
    return {**row, "exclude": [{"class": name, "count": count + 1} for name, count in counts.items()]}


def strip_opening(prompt: str) -> str:
    """Return a prompt without the words that it may begin with, such as "a photo of"."""
    opening = max((opening for opening in OPENINGS if prompt.startswith(opening)), key=len)
    return prompt.removeprefix(opening)


def describe_scene(rng: Random, scene: Scene) -> tuple[str, dict[str, Any]] | None:
    """Describe a group, or two objects, without places; None for a scene that isn't one of these, or isn't composed.

    Returns:
        The prompt without its opening, and the row of GenEval's format but for the prompt.
    """
    items = scene.items
    kinds = {(item.shape, item.color) for item in items}
    if not (scene.composed or is_stacked(scene)):
        return None
    if len(items) > 1 and len(kinds) == 1:
        shape, color, count = items[0].shape, items[0].color, len(items)
        include = [{"class": shape, "count": count, "color": color}]
        return f"{NUMBERS[count]} {color} {make_plural(shape)}", {"tag": "counting", "include": include}
    if len(items) != 2 or items[0].shape == items[1].shape:
        return None
    first, second = rng.sample(list(items), 2)
    with_color = rng.random() < 0.7
    names = [name_object(item, with_color) for item in (first, second)]
    if rng.random() < 0.5 and with_color:
        include = [make_entry(first, True), make_entry(second, True)]
        return f"a {names[0]} and a {names[1]}", {"tag": "color_attr", "include": include}
    where = rng.choice(find_relations(first, second))
    include = [make_entry(second, with_color), {**make_entry(first, with_color), "position": [where, 0]}]
    return f"a {names[0]} {where} a {names[1]}", {"tag": "position", "include": include}


def make_entry(item: Item, with_color: bool) -> dict[str, Any]:
    """Make an entry of GenEval's `include`."""
    entry: dict[str, Any] = {"class": item.shape, "count": 1}
    return {**entry, "color": item.color} if with_color else entry
