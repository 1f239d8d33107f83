"""Training sets and benchmarks of the shapes world: apart from each other, the same from the same seed, true."""

import hashlib
import io
import json
import tarfile
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from PIL import Image

from data_prep.shapes.samples import World, write_benchmarks, write_training_sets
from data_prep.shapes.scene import render
from data_prep.shards.writer import write_shards
from tbac.evaluation.benchmarks.edits import parse_scan
from tbac.evaluation.detectors.template import TemplateDetector
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
