"""Training sets and benchmarks of the shapes world: apart from each other, the same from the same seed, true."""

import hashlib
import io
import json
import tarfile
from collections import defaultdict
from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random

import pytest
import torch
from PIL import Image

from data_prep.shapes.rewards import (
    describe_scene,
    list_word_questions,
    make_strict,
    strip_opening,
    write_reward_files,
)
from data_prep.shapes.samples import World, write_benchmarks, write_training_sets
from data_prep.shapes.scene import draw_word_scene, render
from data_prep.shards.writer import write_shards
from tbac.evaluation.benchmarks.edits import parse_scan
from tbac.evaluation.detectors.template import TemplateDetector
from tbac.evaluation.judges.detector import DetectorJudge
from tbac.evaluation.rules import judge_geneval
from tests.helpers.worlds import SIZES

SETS = ("t2i", "edit", "finetune_t2i", "finetune_edit")


def fake_latents(images: list[Image.Image]) -> torch.Tensor:
    return torch.zeros(len(images), 8, 6, 6)


def pictures(folder: Path, split: str) -> set[str]:
    """Digests of the pixels of all pictures in a split's shards."""
    found = set()
    for shard in sorted(folder.glob(f"{split}-*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".png"):
                    file = tar.extractfile(member)
                    assert file is not None
                    found.add(hashlib.sha256(Image.open(io.BytesIO(file.read())).tobytes()).hexdigest())
    return found


def test_validation_shares_no_scene_with_training(world_folder: Path) -> None:
    seen: dict[str, set[str]] = defaultdict(set)
    for split in ("train", "val"):
        for name in SETS:
            seen[split] |= pictures(world_folder / "data" / name, split)
    assert len(seen["train"]) > 50
    assert len(seen["val"]) > 10
    assert not seen["train"] & seen["val"]
    asked = {
        hashlib.sha256(Image.open(f).convert("RGB").tobytes()).hexdigest()
        for f in (world_folder / "benchmarks" / "pictures").glob("*.png")
    }
    assert not seen["train"] & asked


def test_a_seed_gives_the_same_shards(tmp_path: Path) -> None:
    manifests = []
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_training_sets(World.draw(seed, SIZES), tmp_path / folder, fake_latents, "digest")
        manifests.append([json.loads((tmp_path / folder / n / "manifest.json").read_text())["shards"] for n in SETS])
    assert manifests[0] == manifests[1]
    assert manifests[0] != manifests[2]


def test_manifests_say_what_is_in_the_shards(world_folder: Path) -> None:
    for name in SETS:
        manifest = json.loads((world_folder / "data" / name / "manifest.json").read_text())
        assert manifest["schema_version"] == 1
        assert len(manifest["autoencoder_digest"]) == 64
        for shard, facts in manifest["shards"].items():
            content = (world_folder / "data" / name / shard).read_bytes()
            assert (len(content), hashlib.sha256(content).hexdigest()) == (facts["bytes"], facts["sha256"])
            with tarfile.open(world_folder / "data" / name / shard) as tar:
                assert len({m.name.split(".")[0] for m in tar}) == facts["samples"]


def test_the_detector_reads_every_drawn_scene_exactly(tmp_path: Path) -> None:
    world = World.draw(0, SIZES)
    write_benchmarks(world, tmp_path)
    detector = TemplateDetector.from_world(tmp_path / "world.json")
    rows = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    for row in rows:
        found, truth = detector(Image.open(tmp_path / row["image"])), parse_scan(row["scene"])
        assert found.background == truth.background
        assert sorted((d.name, d.color, d.box) for d in found.detections) == sorted(
            (d.name, d.color, d.box) for d in truth.detections
        )


def test_edit_rows_show_their_source(tmp_path: Path) -> None:
    world = World.draw(0, SIZES)
    write_benchmarks(world, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "edits.jsonl").read_text().splitlines()]
    assert len(rows) == SIZES.edits
    for row, edit in zip(rows, world.val_edits, strict=False):
        assert Image.open(tmp_path / row["image"]).tobytes() == render(edit.source).tobytes()
        assert row["anywhere"] == (row["kind"] == "add" and " at the " not in row["instruction"])


@pytest.mark.parametrize("key", ["a.b", "a/b"])
def test_keys_that_webdataset_would_split_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="neither a dot nor a slash"):
        write_shards(tmp_path, "train", iter([(key, {"txt": "x"})]), 10)


def test_prompts_to_learn_from_share_nothing_with_the_benchmarks(tmp_path: Path) -> None:
    world = World.draw(0, replace(SIZES, rewards=60, prompts_per_tag=20))
    write_reward_files(world, tmp_path / "rewards")
    write_benchmarks(world, tmp_path / "benchmarks")
    learnt, asked = (
        [json.loads(line) for line in (tmp_path / part / "geneval.jsonl").read_text().splitlines()]
        for part in ("rewards", "benchmarks")
    )
    assert len({row["prompt"] for row in learnt}) == 60
    assert {row["tag"] for row in learnt} == {"counting", "position", "color_attr"}
    assert not {strip_opening(row["prompt"]) for row in learnt} & {strip_opening(row["prompt"]) for row in asked}
    sources = {
        hashlib.sha256(Image.open(f).convert("RGB").tobytes()).hexdigest()
        for f in (tmp_path / "rewards" / "pictures").glob("*.png")
    }
    shown = {
        hashlib.sha256(Image.open(f).convert("RGB").tobytes()).hexdigest()
        for f in (tmp_path / "benchmarks" / "pictures").glob("*.png")
    }
    assert sources
    assert not sources & shown


def test_the_pictures_that_prompts_are_about_are_right_by_their_own_rules(tmp_path: Path) -> None:
    """What is asked for is true of the scene that the prompt was written about."""
    world = World.draw(0, SIZES)
    write_reward_files(replace(world, sizes=replace(SIZES, rewards=30)), tmp_path)
    detector = TemplateDetector.from_world(tmp_path / "world.json")
    rng, seen = Random("x"), 0
    for _, scene in islice(world.draw_training_scenes("x"), 300):
        described = describe_scene(rng, scene)
        if described is not None:
            seen += 1
            row, found = make_strict(described[1]), detector(render(scene)).detections
            assert judge_geneval(found, row).correct, described
            # One object more, or another one, makes it wrong.
            for name in ("letter T", scene.items[0].shape):
                more = replace(found[0], name=name)
                assert not judge_geneval((*found, more), row).correct, described
    assert seen > 100
    judge = DetectorJudge(detector, detector.object_names, detector.color_names)
    for _ in range(20):
        scene = draw_word_scene(rng)
        for _, question, _ in list_word_questions(scene):
            assert judge.ask(question, [render(scene)]) == "yes", question
