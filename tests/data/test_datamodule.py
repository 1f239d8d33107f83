"""The data module on the shards of a real stage."""

import itertools
import json
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from PIL import Image

from data_prep.shards.writer import write_shards
from tbac.data import shards
from tbac.data.decoding import decode_sample as plain
from tbac.data.shards import DataError
from tbac.data.transforms import ConditionDropout, crop_to
from tbac.models import UniImage
from tbac.types import Batch, Sample
from tests.helpers.configs import compose_config
from tests.helpers.pictures import make_noise_image


def test_an_edit_stage_gives_prompts_with_images_and_cached_latents(model: UniImage) -> None:
    data = instantiate(compose_config("train", "run_dir=.", "stage=ti2i_pretrain").data)
    data.bind(model.prompt, model.provenance.digests["autoencoder"])
    batch = next(iter(data.train_dataloader()))
    assert batch.latents.shape == (16, 8, 6, 6)
    edits = sum(key.startswith("edit") for key in batch.keys)
    assert 0 < edits < 16
    assert len(batch.prompt["image_grid_thw"]) == edits


def test_validation_is_the_same_every_time_and_bounded(model: UniImage) -> None:
    data = instantiate(compose_config("train", "run_dir=.", "stage.val_samples=12", "stage.batch_size=8").data)
    data.bind(model.prompt)
    first, second = ([k for b in data.val_dataloader() for k in b.keys] for _ in range(2))
    assert first == second
    assert len(first) == 12


def test_cached_latents_of_another_autoencoder_are_refused(model: UniImage) -> None:
    data = instantiate(compose_config("train", "run_dir=.").data)
    with pytest.raises(DataError, match=r"another autoencoder.*data.use_latents=false"):
        data.bind(model.prompt, "0" * 64)
    online = instantiate(compose_config("train", "run_dir=.", "data.use_latents=false").data)
    online.bind(model.prompt, "0" * 64)
    assert next(iter(online.train_dataloader())).pixels.shape == (16, 3, 24, 24)


def test_cached_latents_equal_those_encoded_online(model: UniImage) -> None:
    def read(use: str) -> dict:
        config = compose_config("train", "run_dir=.", f"data.use_latents={use}", "stage.batch_size=16")
        data = instantiate(config.data)
        data.bind(model.prompt)
        return next(iter(data.val_dataloader()))

    cached, online = read("true"), read("false")
    assert cached.keys == online.keys
    torch.testing.assert_close(model.autoencoder.encode(online.pixels), cached.latents, rtol=1e-4, atol=1e-4)


def test_data_errors_read_the_same_from_workers(in_world: Path, model: UniImage, tmp_path: Path) -> None:
    good = make_noise_image(0, (8, 8))
    samples = [(f"k{i}", {"png": good if i % 2 else b"garbage", "txt": "x"}) for i in range(8)]
    write_shards(tmp_path / "bad", "train", samples, 2)
    source = f"stage.sources=[{{path: {tmp_path / 'bad'}}}]"
    for workers in (0, 2):
        data = instantiate(compose_config("train", "run_dir=.", source, f"data.num_workers={workers}").data)
        data.bind(model.prompt)
        with pytest.raises(DataError, match=r"^\d+ of \d+ samples were corrupt"):
            next(iter(data.train_dataloader()))


def test_splits_share_no_scene(in_world: Path) -> None:
    """Validation pictures never occur in training, as targets or as sources."""
    import tarfile

    def pictures(name: str, split: str) -> set[bytes]:
        found = set()
        for tar in (in_world / "data" / name).glob(f"{split}-*.tar"):
            with tarfile.open(tar) as files:
                found |= {files.extractfile(m).read() for m in files if m.name.endswith(".png")}  # type: ignore
        return found

    names = ("t2i", "edit", "finetune_t2i", "finetune_edit")
    training = set().union(*(pictures(n, "train") for n in names))
    validation = set().union(*(pictures(n, "val") for n in names))
    assert validation
    assert not training & validation


@pytest.mark.parametrize("broken", ['{"shards": {}}', "[]", "nonsense", '{"schema_version": 99, "shards": {}}'])
def test_a_broken_manifest_is_named(tmp_path: Path, in_world: Path, broken: str) -> None:
    write_shards(tmp_path / "a", "train", [("k", {"png": make_noise_image(0), "txt": "x"})], 1)
    (tmp_path / "a" / "manifest.json").write_text(broken)
    with pytest.raises(Exception, match=r"manifest\.json"):
        instantiate(compose_config("train", "run_dir=.", f"stage.sources=[{{path: {tmp_path / 'a'}}}]").data)


def test_a_manifest_is_read_once(model: UniImage, in_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    monkeypatch.setattr(shards, "read_bytes", lambda path: (read.append(path), path.read_bytes())[1])
    data = instantiate(compose_config("train", "run_dir=.", "stage=ti2i_pretrain").data)
    data.bind(model.prompt, model.provenance.digests["autoencoder"])
    data.compute_manifest_digests()
    manifests = [path for path in read if path.name == "manifest.json"]
    assert len(manifests) == len(data.sources) + len(data.val_sources)


def test_the_manifest_says_what_the_shards_hold(in_world: Path) -> None:
    import hashlib

    manifest = json.loads((in_world / "data" / "t2i" / "manifest.json").read_text())
    shards = sorted((in_world / "data" / "t2i").glob("*.tar"))
    assert {s.name for s in shards} == set(manifest["shards"])
    for shard in shards:
        entry = manifest["shards"][shard.name]
        assert entry["bytes"] == shard.stat().st_size
        assert entry["sha256"] == hashlib.sha256(shard.read_bytes()).hexdigest()
    assert sum(e["samples"] for n, e in manifest["shards"].items() if n.startswith("train")) == 96


def test_dropout_has_the_stated_probabilities() -> None:
    dropout = ConditionDropout(0.1, 0.2, 0.3)
    edit = Sample("k", "go", [make_noise_image(0, (8, 8))])
    outcomes: Counter = Counter()
    for i in range(6000):
        sample = dropout(edit, Random(f"x/{i}"))
        black = not any(sample.sources[0].tobytes())
        outcomes[sample.text == "", black] += 1
    # Standard deviations are below 0.0065.
    assert abs(outcomes[True, False] / 6000 - 0.1) < 0.02
    assert abs(outcomes[False, True] / 6000 - 0.2) < 0.025
    assert abs(outcomes[True, True] / 6000 - 0.3) < 0.025


def test_text_to_image_samples_lose_only_captions() -> None:
    dropout = ConditionDropout(0.1, 0.4, 0.4)
    texts = [dropout(Sample("k", "go"), Random(f"x/{i}")).text for i in range(6000)]
    assert abs(texts.count("") / 6000 - 0.1) < 0.02


@pytest.mark.parametrize("bad", [(-0.1, 0, 0), (1.2, 0, 0), (0.5, 0.4, 0.2)])
def test_impossible_probabilities_are_refused(bad: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match=r"stage\.dropout"):
        ConditionDropout(*bad)


def test_targets_become_the_central_part() -> None:
    image = make_noise_image(0, (40, 20))
    square = crop_to(image, (20, 20))
    assert (square.shape, square.dtype) == ((20, 20, 3), torch.uint8)
    assert square.numpy().tobytes() == image.crop((10, 0, 30, 20)).tobytes()


@pytest.mark.parametrize(("given", "size", "part"), [
    ((90, 60), (24, 24), (15, 0, 75, 60)),
    ((60, 90), (24, 48), (0, 30, 60, 60)),
    ((33, 47), (64, 32), (4, 0, 28, 47)),
    ((1200, 800), (512, 512), (200, 0, 1000, 800)),
])  # fmt: skip
def test_resizing_is_pillows_bicubic(given: tuple[int, int], size: tuple[int, int], part: tuple[int, ...]) -> None:
    image = make_noise_image(1, given)
    expected = image.crop(part).resize(size[::-1], Image.Resampling.BICUBIC)
    difference = crop_to(image, size).int() - torch.from_numpy(np.array(expected)).int()
    assert difference.abs().max() <= 1
    assert (difference != 0).float().mean() < 0.02


def test_uint8_pixels_are_encoded_as_their_floats(model: UniImage) -> None:
    pixels = torch.randint(0, 256, (2, 3, 24, 24), dtype=torch.uint8)
    assert torch.equal(model.autoencoder.encode(pixels), model.autoencoder.encode(pixels.float() / 127.5 - 1))


def test_several_sources_keep_their_order(tmp_path: Path) -> None:
    from tbac.data.shards import Source
    from tests.helpers.shards import make_reader, read_samples

    fields = {f"source_{i}.png": make_noise_image(i, (8, 8)) for i in (10, 2, 1)}
    fields = {"source.png": make_noise_image(0, (8, 8)), **fields, "target.png": make_noise_image(99, (8, 8))}
    write_shards(tmp_path / "a", "train", [("k", {**fields, "json": {"instruction": "go"}})], 1)  # type: ignore[dict-item]
    sample = read_samples(make_reader(Source(str(tmp_path / "a"))))[0]
    assert [s.tobytes() for s in sample.sources] == [make_noise_image(i, (8, 8)).tobytes() for i in (0, 1, 2, 10)]
    assert sample.target.tobytes() == make_noise_image(99, (8, 8)).tobytes()  # type: ignore[union-attr]


def read_on(data: Any, batches: int) -> list[Batch]:
    """Batches that training takes from the loader, which reads ahead of it."""
    taken = []
    for batch in itertools.islice(data.train_dataloader(), batches):
        taken.append(data.on_before_batch_transfer(batch, 0))
    return taken


@pytest.mark.parametrize("workers", [0, 2])
def test_going_on_gives_the_same_batches_as_not_stopping(model: UniImage, workers: int) -> None:
    def fresh(*more: str) -> Any:
        data = instantiate(
            compose_config("train", "run_dir=.", "stage=ti2i_pretrain", "stage.batch_size=8", *more).data
        )
        data.bind(model.prompt)
        return data

    whole = read_on(fresh("data.num_workers=0"), 20)
    stopped = fresh(f"data.num_workers={workers}")
    read_on(stopped, 7)
    again = fresh(f"data.num_workers={2 - workers}")
    again.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    for batch, expected in zip(read_on(again, 13), whole[7:], strict=True):
        assert (batch.keys, batch.texts, batch.positions) == (expected.keys, expected.texts, expected.positions)
        assert torch.equal(batch.latents, expected.latents)
        for name, value in expected.prompt.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(batch.prompt[name], value), name


def test_going_on_decodes_nothing_of_what_is_past(model: UniImage, monkeypatch: pytest.MonkeyPatch) -> None:
    import tbac.data.reader as reader

    data = instantiate(compose_config("train", "run_dir=.", "stage.batch_size=4", "data.num_workers=0").data)
    data.bind(model.prompt)
    state = data.state_dict() | {"position": 4 * 10**6}
    state["sources"][0]["drawn"] = 4 * 10**6
    data.load_state_dict(state)
    decoded = []
    monkeypatch.setattr(reader, "decode_sample", lambda raw, *how: decoded.append(raw["__key__"]) or plain(raw, *how))
    assert len(next(iter(data.train_dataloader()))) == 4
    assert len(decoded) == 4


def test_going_on_says_what_changed(model: UniImage, caplog: pytest.LogCaptureFixture) -> None:
    def fresh(*more: str) -> Any:
        data = instantiate(compose_config("train", "run_dir=.", "stage=ti2i_pretrain", *more).data)
        data.bind(model.prompt)
        return data

    state = fresh().state_dict()
    fresh().load_state_dict(state)
    assert caplog.text == ""
    fresh("stage.batch_size=3", "data.num_workers=5").load_state_dict(state)
    assert (
        "data.num_workers 1 -> 5, stage.batch_size 16 -> 3; no sample of this pass is repeated or lost" in caplog.text
    )
    caplog.clear()
    fresh("data.shuffle_buffer=7").load_state_dict(state)
    assert "data.shuffle_buffer 2000 -> 7; the order is another one" in caplog.text
    state["sources"][0] |= {"samples": 5}
    state["sources"][1] |= {"path": "elsewhere"}
    fresh().load_state_dict(state)
    for words in ("samples, it had 5", "wasn't part of the mixture before", "elsewhere was part of the mixture before"):
        assert words in caplog.text
