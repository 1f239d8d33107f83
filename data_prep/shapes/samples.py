"""Writes the samples of the shapes world: training sets of the three stages, and the files of its benchmarks."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from data_prep.shapes.benchmarks import select_held_out, write_dense, write_pairs
from data_prep.shapes.language import (
    Edit,
    sample_caption,
    sample_edit,
    sample_geneval_prompts,
    sample_question,
    write_long_caption,
)
from data_prep.shapes.scene import (
    BACKGROUNDS,
    COLORS,
    GLYPHS,
    USUAL,
    Item,
    Mixture,
    Scene,
    draw_crowded_scene,
    render,
    sample_scene,
)
from data_prep.shards.writer import write_shards

Encode = Callable[[list[Image.Image]], Any]


@dataclass(frozen=True)
class Sizes:
    """How much of everything is drawn.

    Args:
        t2i: text-to-image training samples.
        edit: edit training triplets.
        curated: training samples of each kind for fine-tuning.
        val: validation samples of each set.
        samples_per_shard: of training tars.
        prompts_per_tag: GenEval-format prompts for each of the six tags.
        questions: of the answering benchmark.
        edits: of the editing benchmark.
        dense: prompts of the suite of dense prompts.
        pairs_per_type: pairs of a short and a long prompt of each type.
        rewards: prompts of each kind to learn from by reward.
    """

    t2i: int = 12000
    edit: int = 8000
    curated: int = 2000
    val: int = 256
    samples_per_shard: int = 1000
    prompts_per_tag: int = 20
    questions: int = 200
    edits: int = 48
    dense: int = 24
    pairs_per_type: int = 8
    rewards: int = 400


@dataclass(frozen=True)
class World:
    """All that is drawn from one seed. Only validation and benchmarks use held-out scenes; training never does."""

    sizes: Sizes
    seed: int
    val_scenes: list[Scene]
    val_edits: list[Edit]
    mixture: Mixture = USUAL

    @classmethod
    def draw(cls, seed: int, sizes: Sizes, mixture: Mixture = USUAL) -> "World":
        rng = Random(f"held out/{seed}")
        scenes = _take(max(sizes.val, sizes.questions), (s for s in _draw_scenes(rng, mixture) if s.held_out))
        drawn = (sample_edit(rng, s) for s in _draw_scenes(rng, mixture) if s.held_out)
        edits = _take(max(sizes.val, sizes.edits), (e for e in drawn if e.target.held_out))
        return cls(sizes, seed, scenes, edits, mixture)

    def draw_training_scenes(self, name: str) -> Iterator[tuple[Random, Scene]]:
        """Draw scenes without end that aren't held out, each with a generator for its caption or edit."""
        rng = Random(f"{name}/{self.seed}")
        return ((rng, scene) for scene in _draw_scenes(rng, self.mixture) if not scene.held_out)

    def draw_training_edits(self, name: str) -> Iterator[Edit]:
        """Draw edits without end whose source and target aren't held out."""
        edits = (sample_edit(rng, scene) for rng, scene in self.draw_training_scenes(name))
        return (edit for edit in edits if not edit.target.held_out)


def _draw_scenes(rng: Random, mixture: Mixture) -> Iterator[Scene]:
    while True:
        yield sample_scene(rng, mixture)


def _take(count: int, items: Iterator[Any]) -> list[Any]:
    return list(islice(items, count))


def _cut_into_chunks(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    chunk = _take(size, items)
    while chunk:
        yield chunk
        chunk = _take(size, items)


def make_t2i_samples(prefix: str, drawn: Iterator[tuple[str, Scene]], encode: Encode) -> Iterator[tuple[str, dict]]:
    """Make text-to-image samples with cached latents."""
    index = 0
    for chunk in _cut_into_chunks(drawn, 256):
        images = [render(scene) for _, scene in chunk]
        for (text, _), image, latents in zip(chunk, images, encode(images), strict=True):
            yield f"{prefix}_{index:06d}", {"png": image, "txt": text, "latent.safetensors": latents}
            index += 1


def make_edit_samples(prefix: str, edits: Iterator[Edit], encode: Encode) -> Iterator[tuple[str, dict]]:
    """Make edit triplets with cached latents of the target."""
    index = 0
    for chunk in _cut_into_chunks(edits, 256):
        targets = [render(edit.target) for edit in chunk]
        for edit, target, latents in zip(chunk, targets, encode(targets), strict=True):
            fields = {
                "source.png": render(edit.source),
                "target.png": target,
                "json": {"instruction": edit.instruction, "kind": edit.kind},
                "target.latent.safetensors": latents,
            }
            yield f"{prefix}_{index:06d}", fields
            index += 1


def write_both_splits(
    folder: Path, train: Iterator[Any], val: Iterator[Any], sizes: Any, facts: Mapping[str, Any]
) -> None:
    """Write the shards of a training set, and the one shard of its validation set.

    Args:
        folder: of both.
        train: samples to train on.
        val: samples to validate with.
        sizes: with `samples_per_shard` and `val`.
        facts: more fields of the manifest.
    """
    write_shards(folder, "train", train, sizes.samples_per_shard, facts)
    write_shards(folder, "val", val, sizes.val, facts)


def write_training_sets(world: World, out: Path, encode: Encode, autoencoder_digest: str) -> None:
    """Write the shards of the three stages: `t2i`, `edit`, and the curated `finetune_t2i` and `finetune_edit`."""
    sizes = world.sizes
    facts = {"provenance": {"world": "shapes", "seed": world.seed}, "autoencoder_digest": autoencoder_digest}
    rng = Random(f"val captions/{world.seed}")
    val_t2i = [(sample_caption(rng, s), s) for s in world.val_scenes[: sizes.val]]
    val_edits = world.val_edits[: sizes.val]
    for name, count in (("t2i", sizes.t2i), ("finetune_t2i", sizes.curated)):
        drawn = ((sample_caption(r, s), s) for r, s in islice(world.draw_training_scenes(name), count))
        samples = make_t2i_samples(name, drawn, encode), make_t2i_samples(f"{name}_val", iter(val_t2i), encode)
        write_both_splits(out / name, *samples, sizes, facts)
    for name, count in (("edit", sizes.edit), ("finetune_edit", sizes.curated)):
        edits = islice(world.draw_training_edits(name), count)
        samples = make_edit_samples(name, edits, encode), make_edit_samples(f"{name}_val", iter(val_edits), encode)
        write_both_splits(out / name, *samples, sizes, facts)


def scene_to_json(scene: Scene) -> dict[str, Any]:
    """Describe a scene as a detector would read it."""
    objects = [{"name": item.shape, "color": item.color, "box": find_box(item)} for item in scene.items]
    return {"background": scene.background, "objects": objects}


def find_box(item: Item) -> list[int]:
    """Find left, top, right and bottom of an object's glyph, in pixels."""
    rows, columns = np.nonzero(GLYPHS[item.shape])
    top, left = item.corner
    box = (left + columns.min(), top + rows.min(), left + columns.max() + 1, top + rows.max() + 1)
    return [int(side) for side in box]


def write_benchmarks(world: World, out: Path) -> None:
    """`world.json` for the detector; `geneval.jsonl`, `edits.jsonl`, `questions.jsonl` with their pictures; `dense/`
    and `pairs/`.
    """
    write_world_file(out)
    # One generator serves prompts and questions one after the other, so their order here decides what a seed gives.
    rng = Random(f"benchmarks/{world.seed}")
    write_rows(out / "geneval.jsonl", sample_geneval_prompts(rng, world.sizes.prompts_per_tag))
    write_questions(rng, world.val_scenes[: world.sizes.questions], out)
    write_edits(world.val_edits[: world.sizes.edits], out)
    dense = Random(f"dense/{world.seed}")
    crowded = iter(lambda: draw_crowded_scene(dense), None)
    write_dense(select_held_out(crowded), world.sizes.dense, out / "dense", write_long_caption)
    write_pairs(Random(f"pairs/{world.seed}"), world.sizes.pairs_per_type, out / "pairs")


def write_world_file(out: Path) -> None:
    """Write `world.json`, from which the exact detector is built; the folder is made."""
    out.mkdir(parents=True, exist_ok=True)
    drawn = {}
    for name, mask in GLYPHS.items():
        drawn[name] = ["".join(row) for row in np.where(mask, "#", ".")]
    described = {"colors": COLORS, "backgrounds": BACKGROUNDS, "glyphs": drawn}
    (out / "world.json").write_text(json.dumps(described, indent=2) + "\n")


def write_questions(rng: Random, scenes: list[Scene], out: Path) -> None:
    """Write `questions.jsonl`, a question about each scene, and the pictures."""
    rows = []
    for index, scene in enumerate(scenes):
        name = save_picture(scene, out, f"question_{index:04d}")
        question, answer = sample_question(rng, scene)
        rows.append({"image": name, "question": question, "answer": answer, "scene": scene_to_json(scene)})
    write_rows(out / "questions.jsonl", rows)


def write_edits(edits: list[Edit], out: Path, name: str = "edits") -> None:
    """Write `<name>.jsonl`, what each edit should make of its source, and the pictures of the sources."""
    rows = []
    for index, edit in enumerate(edits):
        row = {
            "image": save_picture(edit.source, out, f"{name.removesuffix('s')}_{index:04d}"),
            "instruction": edit.instruction,
            "kind": edit.kind,
            "source": scene_to_json(edit.source),
            "target": scene_to_json(edit.target),
            "anywhere": edit.anywhere,
        }
        rows.append(row)
    write_rows(out / f"{name}.jsonl", rows)


def save_picture(scene: Scene, out: Path, stem: str) -> str:
    """Draw a scene into `pictures/`; returns the path below `out`."""
    (out / "pictures").mkdir(exist_ok=True)
    name = f"pictures/{stem}.png"
    render(scene).save(out / name)
    return name


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
