"""Writes prompts of the shapes world in the formats of two benchmarks: dense ones as DPG-Bench, pairs as TIIF-Bench.

The same code scores this closed world and the real benchmarks, since
`tbac.evaluation.judges.detector.DetectorJudge` can answer their questions.
"""

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from random import Random

from data_prep.shapes.language import (
    find_relations,
    make_plural,
    name_object,
    sample_short_caption,
    write_long_caption,
    write_word_caption,
)
from data_prep.shapes.scene import (
    BACKGROUNDS,
    COLORS,
    COMPOSED,
    GLYPHS,
    STACKED,
    Item,
    Scene,
    draw_word_scene,
)

Asked = tuple[str, str, tuple[int, ...]]  # category, question, numbers of the questions that it depends on
DPG_COLUMNS = (
    "item_id", "text", "keywords", "proposition_id", "dependency", "category_broad", "category_detailed", "tuple",
    "question_natural_language",
)  # fmt: skip
PAIR_TYPES = ("shape+color", "2d_spatial_relation", "numeracy", "color+2d", "text")


def list_dense_questions(scene: Scene) -> list[Asked]:
    """List questions about objects, colours, relations of neighbours, numbers, and the background; numbered from 1."""
    asked: list[Asked] = []
    entity: dict[Item, int] = {}
    for item in scene.items:
        asked.append(("entity - whole", f"is there a {item.shape} at the {item.place}?", ()))
        entity[item] = len(asked)
        asked.append(("attribute - color", f"is there a {name_object(item)} at the {item.place}?", (entity[item],)))
    for first, second in pairwise(scene.items):
        if name_object(first) != name_object(second):
            text = f"is a {name_object(first)} {find_relations(first, second)[0]} a {name_object(second)}?"
            asked.append(("relation - spatial", text, (entity[first] + 1, entity[second] + 1)))
    for shape, count in Counter(i.shape for i in scene.items).items():
        parents = tuple(entity[i] for i in scene.items if i.shape == shape)
        asked.append(("other - count", f"is the number of {make_plural(shape)} {count}?", parents))
    asked.append(("global - background", f"is the background {scene.background}?", ()))
    return asked


def write_dense(
    scenes: Iterator[Scene],
    count: int,
    folder: Path,
    describe: Callable[[Scene], str],
    ask: Callable[[Scene], list[Asked]] = list_dense_questions,
) -> None:
    """Write `prompts/<stem>.txt` and `questions.csv`, as DPG-Bench has them.

    Args:
        scenes: without end, of which the first `count` different ones are taken.
        count: number of prompts.
        folder: where the files go.
        describe: writes what a scene shows.
        ask: lists the questions about a scene.
    """
    prompts = folder / "prompts"
    prompts.mkdir(parents=True)
    with (folder / "questions.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(DPG_COLUMNS)
        for index, scene in enumerate(_take_different(count, scenes)):
            stem, text = f"{folder.name}_{index:03d}", describe(scene)
            (prompts / f"{stem}.txt").write_text(f"{text}\n")
            for number, (category, question, parents) in enumerate(ask(scene), start=1):
                dependency = ",".join(map(str, parents)) or "0"
                kind = category.split(" - ")[0]
                table.writerow([stem, text, "", number, dependency, kind, category, f"{category} (…)", question])


def select_held_out(scenes: Iterator[Scene]) -> Iterator[Scene]:
    """Select the scenes that are held out of training."""
    return (scene for scene in scenes if scene.held_out)


def _take_different(count: int, scenes: Iterator[Scene]) -> Iterator[Scene]:
    """Take the first scenes, each of them once."""
    seen: set[Scene] = set()
    for scene in scenes:
        if scene not in seen:
            seen.add(scene)
            yield scene
        if len(seen) == count:
            return


def draw_pair_scene(rng: Random, kind: str) -> Scene:
    """Draw a scene that is fully described by a short caption of this type."""
    if kind == "text":
        return draw_word_scene(rng)
    background = rng.choice(list(BACKGROUNDS))
    if kind == "numeracy":
        shape, color, cells = rng.choice(list(GLYPHS)), rng.choice(list(COLORS)), COMPOSED[rng.randint(2, 4)]
        return Scene(background, tuple(Item(shape, color, *cell) for cell in cells))
    cells = COMPOSED[2] if kind == "shape+color" or rng.random() < 0.5 else STACKED
    shapes, colors = rng.sample(list(GLYPHS), 2), rng.sample(list(COLORS), 2)
    return Scene(background, tuple(Item(s, c, *cell) for s, c, cell in zip(shapes, colors, cells, strict=True)))


def write_pair(rng: Random, kind: str, scene: Scene) -> tuple[str, list[str]]:
    """Write the short description of a scene, and the questions that both descriptions answer with yes."""
    items = scene.items
    if kind == "text":
        color = items[0].color
        return write_word_caption(scene), [
            f'does it say "{scene.letters}"?',
            f'does it say "{scene.letters}" in {color}?',
        ]
    if kind == "numeracy":
        text = f"is the number of {items[0].color} {make_plural(items[0].shape)} {len(items)}?"
        return next(c for c in iter(lambda: sample_short_caption(rng, scene), None) if items[0].color in c), [text]
    nouns = [name_object(item, kind != "2d_spatial_relation") for item in items]
    there = [f"is there a {name}?" for name in nouns]
    if kind == "shape+color":
        return f"a {nouns[0]} and a {nouns[1]}", there
    where = find_relations(*items)[0]
    return f"a {nouns[0]} {where} a {nouns[1]}", [*there, f"is a {nouns[0]} {where} a {nouns[1]}?"]


def write_pairs(rng: Random, count: int, folder: Path) -> None:
    """Write `prompts/<type>.jsonl` and `questions/<type>.jsonl`, as TIIF-Bench has them, two prompts of each scene."""
    for part in ("prompts", "questions"):
        (folder / part).mkdir(parents=True)
    for kind in PAIR_TYPES:
        prompts, questions = [], []
        drawn = iter(lambda kind=kind: draw_pair_scene(rng, kind), None)  # type: ignore[misc]
        for scene in _take_different(count, select_held_out(drawn)):
            short, asked = write_pair(rng, kind, scene)
            described = {"type": kind, "short_description": short, "long_description": write_long_caption(scene)}
            prompts.append(described)
            questions.append(described | {"yn_question_list": asked, "yn_answer_list": ["yes"] * len(asked)})
        for part, rows in (("prompts", prompts), ("questions", questions)):
            (folder / part / f"{kind}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
