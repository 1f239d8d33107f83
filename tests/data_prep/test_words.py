"""The world of words says what is in its pictures, and training never has a word or a pair that is held out."""

import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random

import pytest
import torch
import yaml
from PIL import Image

from data_prep.shapes.scene import COLORS, GLYPHS, Item, Scene, render, sample_scene
from data_prep.words.lexicon import FILE, Lexicon, read_lexicon
from data_prep.words.samples import UNSEEN_OF_EDITS, Sizes, World, write_benchmarks, write_training_sets
from data_prep.words.speech import Speaker
from data_prep.words.suites import PLAIN, SUITES, sample_suite
from tbac.evaluation.benchmarks.geneval import read_geneval
from tbac.evaluation.detectors.template import TemplateDetector
from tbac.evaluation.rules import judge_geneval

LEXICON = read_lexicon()
SIZES = Sizes(
    t2i=60, edit=30, curated=20, val=10, samples_per_shard=30, prompts_per_tag=6, dense=3, edits=6, questions=6
)


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    write_benchmarks(World(SIZES, 0, LEXICON), folder)
    return folder


def list_training_texts(count: int) -> Iterator[str]:
    world = World(SIZES, 0, LEXICON)
    yield from (text for text, _ in islice(world.draw_captions("t2i"), count))
    yield from (text for text, _ in islice(world.draw_captions("val", held_out=True), count))
    yield from (edit.instruction for edit in islice(world.draw_instructions("edit"), count))


def normalize(text: str) -> str:
    return text.lower().replace("colour", "color").replace("grey", "gray")


def find_concepts(text: str, kind: str, lexicon: Lexicon = LEXICON) -> set[str]:
    """The concepts of a kind that a text names, the longest words first; a word counts once."""
    words = []
    for concept, by_split in lexicon.words[kind].items():
        for word in (*by_split["train"], *by_split["held_out"]):
            words += [(word.lower(), concept), (lexicon.plurals.get(word, word).lower(), concept)]
    text, found = normalize(text), set()
    for word, concept in sorted(words, key=lambda pair: -len(pair[0])):
        text, times = re.subn(rf"(?<![\w-]){re.escape(word)}(?![\w-])", "_", text)
        if times:
            found.add(concept)
    return found


def test_no_word_that_is_held_out_is_ever_seen() -> None:
    # What stands in the blanks of a sentence may be anything.
    forms = [".+".join(map(re.escape, re.split(r"\{\w*\}", word.lower()))) for word in LEXICON.list_words("held_out")]
    unseen = re.compile(rf"(?<![\w-])({'|'.join(forms)})(?![\w-])")
    for text in list_training_texts(4000):
        assert not unseen.search(normalize(text)), text


def test_every_word_for_training_is_seen() -> None:
    texts = "\n".join(map(normalize, list_training_texts(6000)))
    for kind in ("colors", "shapes", "numbers", "relations", "verbs", "places", "backgrounds", "shape_clues", "edits"):
        for concept, by_split in LEXICON.words[kind].items():
            for word in by_split["train"] if concept not in ("5", "6") else ():  # hardly ever of one kind
                longest = max(re.split(r"\{\w*\}", word.lower()), key=len)
                assert longest in texts, word


def test_a_caption_names_what_the_scene_has() -> None:
    rng = Random(0)
    speaker = Speaker(LEXICON, rng, habits=PLAIN)
    for unseen in ((), ("colors", "shapes", "numbers", "relations", "verbs", "places")):
        speaker = Speaker(LEXICON, rng, unseen, PLAIN)
        for _ in range(500):
            scene = sample_scene(rng)
            text = speaker.write_caption(scene)
            assert find_concepts(text, "shapes") == {item.shape for item in scene.items}, text
            assert find_concepts(text.split("background")[0], "colors") >= {item.color for item in scene.items}, text


@pytest.mark.parametrize("unseen", [(), UNSEEN_OF_EDITS], ids=["seen", "unseen"])
def test_an_instruction_names_what_the_edit_changes(unseen: tuple[str, ...]) -> None:
    for edit in islice(World(SIZES, 0, LEXICON).draw_instructions("edits", True, unseen), 300):
        changed = set(edit.source.items) ^ set(edit.target.items)
        shapes = find_concepts(edit.instruction, "shapes")
        assert shapes == {item.shape for item in changed}, edit
        if edit.kind == "recolor":
            assert find_concepts(edit.instruction, "colors") == {item.color for item in changed}, edit
        if edit.kind in ("move", "add") and not edit.anywhere:
            assert find_concepts(edit.instruction, "places") == {
                i.place for i in set(edit.target.items) - set(edit.source.items)
            }


def fulfil(row: dict) -> Scene:
    """A scene that shows what a row asks for: groups in rows, or one object beside the other."""
    spots = {
        "left of": ((1, 2), (1, 0)),
        "right of": ((1, 0), (1, 2)),
        "above": ((2, 1), (0, 1)),
        "below": ((0, 1), (2, 1)),
    }
    position = row["include"][-1].get("position")
    cells = list(spots[position[0]]) if position else [(r, c) for r in range(3) for c in range(3)]
    items = []
    for wanted in row["include"]:
        for _ in range(wanted["count"]):
            items.append(Item(wanted["class"], wanted.get("color", "red"), *cells.pop(0)))
    return Scene("black", tuple(items))


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_is_judged_by_what_its_prompts_say(name: str, benchmarks: Path) -> None:
    detector = TemplateDetector.from_world(benchmarks / "world.json")
    rows = read_geneval(benchmarks / f"{name}.jsonl")
    assert len({row["prompt"] for row in rows}) == len(rows) == SIZES.prompts_per_tag * len(SUITES[name])
    for row in rows:
        scene = fulfil(row)
        assert judge_geneval(detector(render(scene)).detections, row).correct, row
        # Without its first object, and with one that the prompt rules out, the picture is wrong.
        assert not judge_geneval(detector(render(Scene("black", scene.items[1:]))).detections, row).correct, row
        for banned in row.get("exclude", ()):
            extra = tuple(Item(banned["class"], "green", 2, column) for column in range(3))
            crowded = Scene("black", (*(i for i in scene.items if i.row < 2), *extra))
            if banned["count"] == 1:
                assert not judge_geneval(detector(render(crowded)).detections, row).correct, row
        if name != "riddles":
            named = find_concepts(row["prompt"], "shapes") - {banned["class"] for banned in row.get("exclude", ())}
            assert named <= {wanted["class"] for wanted in row["include"]}
            colors = {wanted["color"] for wanted in row["include"] if "color" in wanted}
            assert colors <= find_concepts(row["prompt"], "colors"), row


def test_suites_differ_in_what_they_say_they_do() -> None:
    for name, tags in SUITES.items():
        rows = sample_suite(name, LEXICON, Random(0), 20)
        for row in rows:
            unseen = tags[row["tag"]].unseen
            held_out = {
                kind: any(find_words(row["prompt"], by_split["held_out"]) for by_split in LEXICON.words[kind].values())
                for kind in ("colors", "shapes", "numbers", "relations", "shape_clues", "color_clues")
            }
            assert {kind for kind, used in held_out.items() if used} <= set(unseen), row
            if len(unseen) == 1 and unseen[0] in held_out:
                assert held_out[unseen[0]], row
            pairs = {(w["class"], w.get("color")) for w in row["include"]}
            assert bool(pairs & set(LEXICON.unseen_pairs.items())) == (name == "unseen_compositions"), row


def find_words(text: str, words: list[str]) -> bool:
    forms = [form.lower() for word in words for form in (word, LEXICON.plurals.get(word, word))]
    return any(re.search(rf"(?<![\w-]){re.escape(form)}(?![\w-])", normalize(text)) for form in forms)


def test_training_never_draws_an_unseen_pair_or_a_held_out_scene() -> None:
    world = World(SIZES, 0, LEXICON)
    scenes = [scene for _, scene in islice(world.draw_captions("t2i"), 500)]
    scenes += [scene for edit in islice(world.draw_instructions("edit"), 200) for scene in (edit.source, edit.target)]
    assert not any(scene.held_out for scene in scenes)
    pairs = {(item.shape, item.color) for scene in scenes for item in scene.items}
    assert pairs == {(shape, color) for shape in GLYPHS for color in COLORS} - set(LEXICON.unseen_pairs.items())
    assert all(scene.held_out for _, scene in islice(world.draw_captions("val", held_out=True), 100))


def test_a_seed_gives_the_same_world(tmp_path: Path) -> None:
    digests = []
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        world = World(SIZES, seed, LEXICON)
        write_training_sets(world, tmp_path / folder, lambda images: torch.zeros(len(images), 8, 6, 6), "digest")
        write_benchmarks(world, tmp_path / folder)
        manifests = [
            json.loads(file.read_text())["shards"] for file in sorted(tmp_path.glob(f"{folder}/*/manifest.json"))
        ]
        digests.append((manifests, [file.read_bytes() for file in sorted(tmp_path.glob(f"{folder}/*.jsonl"))]))
    assert digests[0] == digests[1]
    assert digests[0] != digests[2]


def test_edits_start_from_their_pictures(benchmarks: Path) -> None:
    detector = TemplateDetector.from_world(benchmarks / "world.json")
    for name in ("edits", "edits_unseen"):
        for line in (benchmarks / f"{name}.jsonl").read_text().splitlines():
            row = json.loads(line)
            scan = detector(Image.open(benchmarks / row["image"]))
            found = sorted((d.name, d.color, list(d.box)) for d in scan.detections)
            assert found == sorted((o["name"], o["color"], o["box"]) for o in row["source"]["objects"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["colors"].pop("red"), "colors must have red"),
        (lambda content: content["colors"]["red"]["held_out"].append("scarlet"), "scarlet can't be both"),
        (lambda content: content["edits"]["add"].update(train=[]), "edits.add must have words for train"),
        (lambda content: content["unseen_pairs"].update(circle="pink"), "unseen_pairs must map shapes to colors"),
        (lambda content: content.update(colours={}), "must have"),
    ],
)  # fmt: skip
def test_a_wrong_lexicon_is_refused(change: object, message: str, tmp_path: Path) -> None:
    content = yaml.safe_load(FILE.read_text())
    change(content)  # type: ignore[operator]
    (tmp_path / "lexicon.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=message):
        read_lexicon(tmp_path / "lexicon.yaml")
