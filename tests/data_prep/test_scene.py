"""Scenes and what is said of them: deterministic, apart, true."""

from collections import Counter
from random import Random

import numpy as np
import pytest

from data_prep.shapes.language import (
    EDIT_TYPES,
    GENEVAL_TAGS,
    NUMBERS,
    make_plural,
    sample_caption,
    sample_edit,
    sample_geneval_prompts,
    sample_question,
    write_long_caption,
)
from data_prep.shapes.scene import CELL_SIZE, COLORS, GLYPHS, Scene, render, sample_scene
from tests.helpers.captions import parse_objects

SCENES = [sample_scene(Random(i)) for i in range(300)]


def test_a_seed_gives_the_same_world() -> None:
    def draw(seed: int) -> list:
        rng = Random(seed)
        return [
            (s := sample_scene(rng), sample_caption(rng, s), sample_edit(rng, s), sample_question(rng, s))
            for _ in range(50)
        ]

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)
    assert np.array_equal(render(SCENES[0]), render(SCENES[0]))


def test_scenes_hold_one_to_six_objects_in_cells_of_their_own() -> None:
    for scene in SCENES:
        cells = [(i.row, i.column) for i in scene.items]
        assert 1 <= len(set(cells)) == len(cells) <= 6
    assert {len(s.items) for s in SCENES} == {1, 2, 3, 4, 5, 6}


def test_a_picture_shows_each_object_in_its_colour_and_shape() -> None:
    for scene in SCENES[:60]:
        pixels = np.asarray(render(scene))
        assert pixels.shape == (24, 24, 3)
        for item in scene.items:
            cell = pixels[item.row * CELL_SIZE :, item.column * CELL_SIZE :][1:7, 1:7]
            assert np.array_equal((cell == COLORS[item.color]).all(-1), GLYPHS[item.shape])


def test_captions_tell_all_objects_and_only_these() -> None:
    rng = Random(0)
    forms = set()
    for scene in SCENES:
        for text in (sample_caption(rng, scene), write_long_caption(scene)):
            found = parse_objects(text)
            colored = any(color for color, _ in found)
            truth = Counter((i.color if colored else None, i.shape) for i in scene.items)
            assert found == truth, (text, scene)
            if " background" in text:
                assert f"{scene.background} background" in text
            forms.add(next((r for r in ("left of", "right of", "above", "below") if r in text), "listing"))
    assert forms == {"left of", "right of", "above", "below", "listing"}


def test_relations_in_captions_hold() -> None:
    rng = Random(1)
    checked = 0
    for scene in SCENES:
        text = sample_caption(rng, scene)
        for name in ("left of", "right of", "above", "below"):
            if f" {name} a " in text:
                first, second = (parse_objects(part) for part in text.split(f" {name} ", 1))
                a, b = (next(i for i in scene.items if i.shape == next(iter(s))[1]) for s in (first, second))
                dx, dy = a.column - b.column, a.row - b.row
                assert {"left of": dx < 0, "right of": dx > 0, "above": dy < 0, "below": dy > 0}[name], text
                checked += 1
    assert checked > 20


def test_edits_do_what_they_say_and_leave_the_rest() -> None:
    rng = Random(0)
    kinds = Counter()
    for scene in SCENES:
        edit = sample_edit(rng, scene)
        kinds[edit.kind] += 1
        before, after = set(edit.source.items), set(edit.target.items)
        gone, new = before - after, after - before
        changes = {"add": (0, 1), "remove": (1, 0), "background": (0, 0)}.get(edit.kind, (1, 1))
        assert (len(gone), len(new)) == changes
        assert (edit.source.background != edit.target.background) == (edit.kind == "background")
        if changes == (1, 1):
            (old,), (changed,) = gone, new
            fields = {f for f in ("shape", "color", "place") if getattr(old, f) != getattr(changed, f)}
            assert fields == {{"replace": "shape", "recolor": "color", "move": "place"}[edit.kind]}
            assert f"{old.color} {old.shape}" in edit.instruction
        for item in new:
            word = {"add": item.shape, "replace": item.shape, "recolor": item.color, "move": item.place}[edit.kind]
            assert word in edit.instruction
        if edit.kind == "background":
            assert edit.instruction.endswith(edit.target.background)
        cells = [(i.row, i.column) for i in edit.target.items]
        assert len(set(cells)) == len(cells)
    assert set(kinds) == set(EDIT_TYPES)


def test_answers_are_true() -> None:
    rng = Random(0)
    asked = Counter()
    for scene in SCENES:
        question, answer = sample_question(rng, scene)
        shape = next((s for s in GLYPHS if question.endswith((f" {s}?", f" {make_plural(s)}?"))), None)
        items = [i for i in scene.items if i.shape == shape]
        if question.startswith("what color is the background"):
            expected = scene.background
        elif question.startswith("what color"):
            (item,) = items
            expected = item.color
        elif question.startswith("where"):
            (item,) = items
            expected = item.place
        elif question.startswith("what shape"):
            (item,) = [i for i in scene.items if question == f"what shape is {i.color}?"]
            expected = item.shape
        elif question.startswith("what is the number"):
            expected = NUMBERS[len(items)]
        else:
            expected = "yes" if items else "no"
        assert answer == expected, (question, scene)
        asked[question.split(" the ")[0]] += 1
    assert len(asked) >= 5


@pytest.mark.parametrize("per_tag", [1, 20])
def test_geneval_prompts_say_what_their_metadata_ask(per_tag: int) -> None:
    rows = sample_geneval_prompts(Random(0), per_tag)
    assert Counter(r["tag"] for r in rows) == dict.fromkeys(GENEVAL_TAGS, per_tag)
    for row in rows:
        wanted = Counter({(e.get("color"), e["class"]): e["count"] for e in row["include"]})
        assert parse_objects(row["prompt"]) == wanted
        if row["tag"] == "counting":
            (included,), (excluded,) = row["include"], row["exclude"]
            assert excluded["count"] == included["count"] + 1
        if row["tag"] == "position":
            relation, target = row["include"][1]["position"]
            assert target == 0
            assert f"a {row['include'][1]['class']} {relation} a {row['include'][0]['class']}" in row["prompt"]


def test_scenes_can_be_compared_and_hashed() -> None:
    assert len({*SCENES, Scene(SCENES[0].background, SCENES[0].items)}) == len(set(SCENES))
