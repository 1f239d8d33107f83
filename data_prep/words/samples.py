"""Writes the samples of the world of words: training sets of the three stages, suites, edits and questions."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from data_prep.shapes.benchmarks import select_held_out, write_dense
from data_prep.shapes.language import Edit, sample_edit
from data_prep.shapes.rewards import make_strict
from data_prep.shapes.samples import (
    Encode,
    make_edit_samples,
    make_t2i_samples,
    write_both_splits,
    write_edits,
    write_questions,
    write_rows,
    write_world_file,
)
from data_prep.shapes.scene import Scene, draw_crowded_scene, sample_scene
from data_prep.words.lexicon import Lexicon
from data_prep.words.speech import Habits, Speaker
from data_prep.words.suites import PLAIN, SUITES, sample_suite

UNSEEN_OF_EDITS = ("colors", "shapes", "places", "backgrounds", "edits")


@dataclass(frozen=True)
class Sizes:
    """How much of everything is drawn.

    Args:
        t2i: text-to-image training samples.
        edit: edit training triplets.
        curated: training samples of each kind for fine-tuning.
        val: validation samples of each set.
        samples_per_shard: of training tars.
        prompts_per_tag: prompts for each tag of a suite.
        dense: prompts of the suite of dense sentences.
        edits: of each of the two suites of edits.
        questions: of the answering benchmark.
        rewards: prompts of each kind to learn from by reward.
    """

    t2i: int = 5000
    edit: int = 4000
    curated: int = 2000
    val: int = 256
    samples_per_shard: int = 1000
    prompts_per_tag: int = 40
    dense: int = 40
    edits: int = 64
    questions: int = 200
    rewards: int = 400


@dataclass(frozen=True)
class World:
    """All that is drawn from one seed with one lexicon.

    Validation and suites show only scenes that are held out of training by their hash. Neither has objects in the
    colors that training never draws; the suite of unseen compositions asks for these.
    """

    sizes: Sizes
    seed: int
    lexicon: Lexicon

    def draw_scenes(self, rng: Random, held_out: bool) -> Iterator[Scene]:
        """Draw scenes without end."""
        while True:
            scene = sample_scene(rng)
            if scene.held_out == held_out and not self.lexicon.is_unseen(scene):
                yield scene

    def draw_edits(self, rng: Random, held_out: bool) -> Iterator[Edit]:
        """Draw edits without end, with the instructions of the shapes world."""
        for scene in self.draw_scenes(rng, held_out):
            edit = sample_edit(rng, scene)
            if edit.target.held_out == held_out and not self.lexicon.is_unseen(edit.target):
                yield edit

    def draw_captions(self, name: str, held_out: bool = False) -> Iterator[tuple[str, Scene]]:
        """Draw captions and their scenes without end, in words for training."""
        rng = Random(f"words {name}/{self.seed}")
        speaker = Speaker(self.lexicon, rng)
        return ((speaker.write_caption(scene), scene) for scene in self.draw_scenes(rng, held_out))

    def draw_instructions(self, name: str, held_out: bool = False, unseen: tuple[str, ...] = ()) -> Iterator[Edit]:
        """Draw edits without end, with their instructions as people write; `unseen` are kinds of words never seen."""
        rng = Random(f"words {name}/{self.seed}")
        habits = PLAIN if unseen else Habits(denied=0.0)
        speaker = Speaker(self.lexicon, rng, unseen, habits)
        edits = self.draw_edits(rng, held_out)
        return (replace(edit, instruction=speaker.write_instruction(edit)) for edit in edits)


def write_benchmarks(world: World, out: Path) -> None:
    """Write `world.json`, a file for each suite, `dense/`, `edits.jsonl`, `edits_unseen.jsonl`, `questions.jsonl`."""
    sizes, lexicon = world.sizes, world.lexicon
    write_world_file(out)
    for name in SUITES:
        rows = sample_suite(name, lexicon, Random(f"words {name}/{world.seed}"), sizes.prompts_per_tag)
        write_rows(out / f"{name}.jsonl", rows)
    # Dense sentences are judged by questions, as DPG-Bench's are.
    rng = Random(f"words dense/{world.seed}")
    speaker = Speaker(lexicon, rng, (), PLAIN)
    crowded = (scene for scene in iter(lambda: draw_crowded_scene(rng), None) if not lexicon.is_unseen(scene))
    write_dense(select_held_out(crowded), sizes.dense, out / "dense", lambda scene: speaker.describe_fully(scene).text)
    for name, unseen in (("edits", ()), ("edits_unseen", UNSEEN_OF_EDITS)):
        edits = world.draw_instructions(name, held_out=True, unseen=unseen)
        write_edits(list(islice(edits, sizes.edits)), out, name)
    rng = Random(f"words questions/{world.seed}")
    write_questions(rng, list(islice(world.draw_scenes(rng, held_out=True), sizes.questions)), out)


def write_reward_files(world: World, out: Path) -> None:
    """Write what a model may learn from by reward: `world.json`, `geneval.jsonl`, `dense/`, and `edits.jsonl`.

    None shows a held-out scene or has words that training never sees, and no prompt of a suite is among them. A picture
    is right only if nothing else is seen in it.
    """
    sizes, lexicon = world.sizes, world.lexicon
    write_world_file(out)
    taken: set[str] = set()
    for name in SUITES:
        suite = sample_suite(name, lexicon, Random(f"words {name}/{world.seed}"), sizes.prompts_per_tag)
        taken.update(row["prompt"] for row in suite)
    per_tag = math.ceil(sizes.rewards / len(SUITES["seen_words"]))
    rows = sample_suite("seen_words", lexicon, Random(f"words rewards/{world.seed}"), per_tag)
    write_rows(out / "geneval.jsonl", [make_strict(row) for row in rows if row["prompt"] not in taken])
    rng = Random(f"words rewards dense/{world.seed}")
    speaker = Speaker(lexicon, rng, (), PLAIN)
    crowded = (scene for scene in iter(lambda: draw_crowded_scene(rng), None) if not scene.held_out)
    seen = (scene for scene in crowded if not lexicon.is_unseen(scene))
    write_dense(seen, sizes.rewards, out / "dense", lambda scene: speaker.describe_fully(scene).text)
    write_edits(list(islice(world.draw_instructions("rewards"), sizes.rewards)), out)


def write_training_sets(world: World, out: Path, encode: Encode, autoencoder_digest: str) -> None:
    """Write the shards of the three stages: `t2i`, `edit`, and the curated `finetune_t2i` and `finetune_edit`."""
    sizes = world.sizes
    facts: dict[str, Any] = {
        "provenance": {"world": "words", "seed": world.seed},
        "autoencoder_digest": autoencoder_digest,
    }
    for name, count in (("t2i", sizes.t2i), ("finetune_t2i", sizes.curated)):
        train, val = world.draw_captions(name), world.draw_captions("val", held_out=True)
        samples = make_t2i_samples(name, islice(train, count), encode)
        val_samples = make_t2i_samples(f"{name}_val", islice(val, sizes.val), encode)
        write_both_splits(out / name, samples, val_samples, sizes, facts)
    for name, count in (("edit", sizes.edit), ("finetune_edit", sizes.curated)):
        edits, val_edits = world.draw_instructions(name), world.draw_instructions("val edits", held_out=True)
        samples = make_edit_samples(name, islice(edits, count), encode)
        val_samples = make_edit_samples(f"{name}_val", islice(val_edits, sizes.val), encode)
        write_both_splits(out / name, samples, val_samples, sizes, facts)
