"""Aspect-ratio buckets: SANA's table, sizes without decoding, batches of one bucket that no process waits for."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import ASPECT_RATIO_512_BIN, ASPECT_RATIO_1024_BIN
from hydra.errors import InstantiationException
from hydra.utils import instantiate

from data_prep.shards.latents import CachingOptions, cache_latents
from data_prep.shards.writer import write_shards
from tbac.data.buckets import Buckets, load_target_sizes, parse_buckets, read_sizes, write_sizes
from tbac.data.datamodule import ShardDataModule
from tbac.data.decoding import decode_sample
from tbac.data.order import BatchPlan, BucketedOrder, Draw, Mixture, ValidationOrder
from tbac.data.shards import DataError
from tbac.data.tars import TarReader
from tbac.models import UniImage
from tbac.models.autoencoder import FrozenAutoencoder
from tbac.models.weights import compute_autoencoder_digest
from tests.helpers.commands import run_app
from tests.helpers.configs import compose_config
from tests.helpers.pictures import encode_image, make_noise_image, make_orientation_exif
from tests.helpers.shards import write_mixed_sizes
from tests.helpers.training import make_module, make_trainer, train_and_list_losses
from tests.helpers.worlds import load_small_model

# --- the table


@pytest.mark.parametrize(("side", "published"), [(512, ASPECT_RATIO_512_BIN), (1024, ASPECT_RATIO_1024_BIN)])
def test_the_table_is_sanas(side: int, published: dict[str, list[float]]) -> None:
    buckets = parse_buckets("sana", side)
    assert buckets is not None
    own = dict(zip(buckets.ratios.tolist(), buckets.sizes, strict=True))
    assert len(own) == 40
    for ratio, (height, width) in published.items():  # diffusers has 33 of them
        assert own[float(ratio)] == (height, width)
    assert all(h % 32 == w % 32 == 0 for h, w in buckets.sizes)


def test_the_nearest_ratio_decides() -> None:
    buckets = parse_buckets("sana", 512)
    assert buckets is not None
    rng = np.random.default_rng(0)
    sizes = rng.integers(64, 4096, (2000, 2))
    ratios = buckets.ratios.tolist()
    expected = [ratios.index(min(ratios, key=lambda ratio: abs(ratio - h / w))) for h, w in sizes]
    assert buckets.find_nearest(sizes).tolist() == expected
    assert buckets.find_nearest(np.array(buckets.sizes)).tolist() == list(range(40))
    assert buckets.find_nearest(np.array(buckets.sizes) // 32).tolist() == list(
        range(40)
    )  # so latents go where they were
    assert buckets.sizes[int(buckets.find_nearest(np.zeros((1, 2)))[0])] == (512, 512)


@pytest.mark.parametrize(
    ("value", "side", "words"),
    [
        ("sona", 512, "must be null, sana, or a list"),
        ([], 512, "must be null, sana, or a list"),
        ([[512, 512, 3]], 512, "must be null, sana, or a list"),
        ([[512.0, 512]], 512, "must be null, sana, or a list"),
        (7, 512, "must be null, sana, or a list"),
        ([[0, 8]], 512, "at least one pixel"),
        ([[8, 8], [16, 16]], 512, "two sizes of one aspect ratio"),
        ("sana", 500, "that 16 divides, got 500"),
    ],
)
def test_other_buckets_are_refused(value: Any, side: int, words: str) -> None:
    with pytest.raises(ValueError, match=rf"data\.buckets.*{words}"):
        parse_buckets(value, side)


# --- sizes


def pictures() -> list[tuple[str, dict[str, Any]]]:
    """Targets of all formats, some turned; edits among them; one that can't be read; one with latents."""
    samples: list[tuple[str, dict[str, Any]]] = []
    for i, (kind, orientation) in enumerate(itertools.product(("JPEG", "PNG", "WEBP"), (1, 3, 6, 8))):
        data = encode_image(make_noise_image(i, (40 + i, 20 + 3 * i)), kind, exif=make_orientation_exif(orientation))
        field = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[kind]
        fields: dict[str, Any] = {field: data, "txt": f"caption {i}"}
        if i % 3 == 1:
            source = make_noise_image(i, (9, 9))
            fields = {"source.png": source, f"target.{field}": data, "json": {"instruction": "go"}}
        samples.append((f"s{i:02d}", fields))
    cmyk = make_noise_image(50, (33, 44)).convert("CMYK")
    samples.append(("s12", {"jpg": encode_image(cmyk, "JPEG"), "txt": "x"}))
    samples.append(("s13", {"jpg": b"garbage", "txt": "x"}))
    samples.append(
        ("s14", {"png": make_noise_image(3, (24, 48)), "latent.safetensors": torch.zeros(4, 6, 3), "txt": "x"})
    )
    return samples


def test_sizes_are_those_of_the_decoded_pictures() -> None:
    write_shards(Path("a"), "train", pictures(), 100)
    tar = Path("a/train-000000.tar")
    found, reader = load_target_sizes(tar), TarReader()
    for i, size in enumerate(found.tolist()):
        if i == 13:
            assert size == [0, 0]
            continue
        if i == 14:
            assert size == [6, 3]
            assert load_target_sizes(tar, use_latents=False)[14].tolist() == [48, 24]
            continue
        target = decode_sample(reader.read(tar, i)).target
        assert target is not None
        assert size == [target.height, target.width], i


def test_sizes_beside_a_shard_are_used_while_it_is_the_same(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(Path("a"), "train", pictures(), 8)
    tar = Path("a/train-000000.tar")
    expected = [read_sizes(tar, use) for use in (True, False)]
    assert write_sizes(tar) == 8
    with monkeypatch.context() as patched:
        patched.setattr("tbac.data.buckets.read_sizes", None)
        for use, sizes in zip((True, False), expected, strict=True):
            assert np.array_equal(load_target_sizes(tar, use), sizes)
    write_shards(Path("a"), "train", pictures()[3:], 8)
    assert np.array_equal(load_target_sizes(tar), read_sizes(tar))
    assert "train-000000.sizes.npz was written for another train-000000.tar" in caplog.text


def test_the_application_writes_sizes_beside_all_shards(capfd: pytest.CaptureFixture[str]) -> None:
    write_shards(Path("a"), "train", pictures(), 8)
    status, text = run_app("data_prep.verify", capfd, "path=a", "processes=1", "samples=false", "write_sizes=true")
    assert status == 0, text
    for tar in Path("a").glob("*.tar"):
        assert len(load_target_sizes(tar)) == len(read_sizes(tar))
    assert sorted(p.name for p in Path("a").glob("*.npz")) == ["train-000000.sizes.npz", "train-000001.sizes.npz"]
    status, text = run_app("data_prep.verify", capfd, "path=.", "samples=false", "write_sizes=true")
    assert status == 1
    assert "path=. holds no *.tar" in text
    status, text = run_app("data_prep.verify", capfd, "path=a", "samples=false")
    assert status == 1
    assert "samples=false and write_sizes=false leave nothing to do" in text


# --- order

SIZES = [[7, 5, 9, 4], [3, 8]]


@dataclass
class Made:
    """Buckets by a made-up rule."""

    sizes: tuple[tuple[int, int], ...] = ((8, 8), (8, 16), (16, 8))

    def __call__(self, draw: Draw) -> int:
        return (draw.source + draw.shard + draw.sample**2) % 3


def order_of(rank: int = 0, world_size: int = 1, batch_size: int = 4, state: Any = None) -> BucketedOrder:
    return BucketedOrder(Made(), Mixture(SIZES, [3.0, 1.0], 5, 10), batch_size, rank, world_size, state)


def take(order: Any, count: int) -> list[BatchPlan]:
    return list(itertools.islice(order, count))


def positions(plans: list[BatchPlan]) -> list[int]:
    return [draw.position for plan in plans for draw in plan.draws]


def test_batches_are_of_one_bucket_and_no_draw_is_lost() -> None:
    plans = take(order_of(), 300)
    for plan in plans:
        assert len(plan.draws) == 4
        assert {Made().sizes[Made()(draw)] for draw in plan.draws} == {plan.size}
    assert len({plan.size for plan in plans}) == 3
    last = plans[-1].after
    waiting = [position for position, *_ in last["waiting"]]
    assert len(waiting) <= 3 * 3
    assert sorted(positions(plans) + waiting) == list(range(last["position"] + len(waiting)))
    counts = [sum(d.source == s for p in plans for d in p.draws) for s in range(2)]
    assert last["drawn"] == counts
    assert last["position"] == sum(counts) == 1200
    for source, total in enumerate((25, 11)):  # whole passes hold every sample once
        own = sorted((d for p in plans for d in p.draws if d.source == source), key=lambda d: d.position)
        passes = [{(d.shard, d.sample) for d in own if d.passes == i} for i in range(len(own) // total - 2)]
        assert all(len(p) == total for p in passes)


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_processes_share_out_the_same_batches(world_size: int) -> None:
    alone = take(order_of(), 20 * world_size)
    parts = [take(order_of(rank, world_size), 20) for rank in range(world_size)]
    assert [plan.draws for step in zip(*parts, strict=True) for plan in step] == [plan.draws for plan in alone]
    for step in range(20):
        afters = [part[step].after for part in parts]
        assert all(after == alone[(step + 1) * world_size - 1].after for after in afters)


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 4), (2, 4), (2, 1), (1, 3), (1, 9), (4, 2)])
def test_going_on_neither_repeats_nor_loses(world_size: int, batch_size: int) -> None:
    for stop in (1, 8, 61):
        begun = take(order_of(), stop)
        state = json.loads(json.dumps(dict(begun[-1].after)))
        parts = [take(order_of(rank, world_size, batch_size, state), 40) for rank in range(world_size)]
        after = parts[0][-1].after
        waiting = [position for position, *_ in after["waiting"]]
        taken = positions(begun) + [p for part in parts for p in positions(part)]
        assert sorted(taken + waiting) == list(range(after["position"] + len(waiting)))
        if (world_size, batch_size) == (1, 4):
            assert begun + parts[0] == take(order_of(), stop + 40)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 36])
def test_validation_has_equally_many_batches_of_one_bucket(world_size: int) -> None:
    orders = [ValidationOrder(SIZES, 1000, 4, rank, world_size, Made()) for rank in range(world_size)]
    assert len({len(order) for order in orders}) == 1
    plans = [plan for order in orders for plan in order]
    for plan in plans:
        assert 1 <= len(plan.draws) <= 4
        assert {Made().sizes[Made()(draw)] for draw in plan.draws} == {plan.size}
    drawn = sorted((d.source, d.shard, d.sample) for plan in plans for d in plan.draws)
    everything = [(k, i, n) for k, shards in enumerate(SIZES) for i, size in enumerate(shards) for n in range(size)]
    assert drawn == everything[: 36 // world_size * world_size]


# --- the whole way

BUCKETS = [[24, 24], [16, 32], [32, 16]]
GIVEN = f"data.buckets={BUCKETS}"


def data_of(folder: str, *more: str) -> ShardDataModule:
    sources = f"[{{path: {folder}, split: train}}]"
    options = [f"stage.sources={sources}", f"stage.val_sources={sources}", "stage.batch_size=4", *more]
    return instantiate(compose_config("train", "run_dir=.", *options).data)


def batches_of(data: ShardDataModule, model: UniImage, count: int) -> Iterator[Any]:
    data.bind(model.prompt, model.provenance.digests["autoencoder"], model.size_multiple)
    return itertools.islice(data.train_dataloader(), count)


def losses(model: UniImage, data: ShardDataModule) -> list[float]:
    data.bind(model.prompt, model.provenance.digests["autoencoder"], model.size_multiple)
    return train_and_list_losses(model, data)


def test_batches_have_one_size_which_fits_their_pictures(model: UniImage) -> None:
    write_mixed_sizes("raw")
    shapes = set()
    reader = TarReader()
    by_key = {f"s{i:03d}": reader.read(Path(f"raw/train-{i // 10:06d}.tar"), i % 10) for i in range(24)}
    for batch in batches_of(data_of("raw", GIVEN), model, 20):
        shapes.add(tuple(batch.pixels.shape[2:]))
        for key in batch.keys:
            target = decode_sample(by_key[key]).target
            assert target is not None
            nearest = min(BUCKETS, key=lambda size: abs(size[0] / size[1] - target.height / target.width))
            assert list(batch.pixels.shape[2:]) == nearest
    assert shapes == {(24, 24), (16, 32), (32, 16)}


@pytest.mark.parametrize("keep_images", [True, False])
def test_training_on_bucketed_latents_is_training_on_the_pictures(in_world: Path, keep_images: bool) -> None:
    write_mixed_sizes("raw")
    denoiser = in_world / "backbones" / "denoiser"
    buckets = Buckets(tuple((h, w) for h, w in BUCKETS))
    autoencoder = FrozenAutoencoder.from_folder(denoiser / "vae")
    digest = compute_autoencoder_digest(denoiser)
    options = CachingOptions(24, buckets, keep_images=keep_images, batch_size=4)
    cache_latents(Path("raw"), Path("cached"), autoencoder, digest, options)
    on_images = losses(load_small_model(in_world), data_of("raw", GIVEN))
    on_latents = losses(load_small_model(in_world), data_of("cached", GIVEN))
    assert on_latents == pytest.approx(on_images, rel=1e-5)
    assert len(set(on_images)) == 6
    with pytest.raises(InstantiationException, match=r"were made with the buckets.*data\.buckets isn't the same"):
        data_of("cached")
    cache_latents(Path("raw"), Path("squares"), autoencoder, digest, CachingOptions(24, batch_size=4))
    with pytest.raises(InstantiationException, match=r"were made with no buckets, and data\.buckets isn't the same"):
        data_of("squares", GIVEN)
    Path("cached/manifest.json").unlink()  # without it nobody can say, until a batch holds two shapes
    blind = data_of("cached")
    with pytest.raises(DataError, match=r"latents of the shapes \[\(\d+, 4, 8\).*data\.buckets"):
        list(batches_of(blind, load_small_model(in_world), 10))


def test_going_on_with_buckets_gives_the_same_batches(model: UniImage) -> None:
    write_mixed_sizes("raw")

    def read(data: ShardDataModule, count: int) -> list[Any]:
        return [data.on_before_batch_transfer(batch, 0) for batch in batches_of(data, model, count)]

    whole = read(data_of("raw", GIVEN), 14)
    stopped = data_of("raw", GIVEN)
    read(stopped, 5)
    state = json.loads(json.dumps(stopped.state_dict()))
    assert state["position"] == stopped.position == 20
    assert state["waiting"]
    again = data_of("raw", GIVEN, "data.num_workers=2")
    again.load_state_dict(state)
    for batch, expected in zip(read(again, 9), whole[5:], strict=True):
        assert (batch.keys, batch.positions) == (expected.keys, expected.positions)
        assert torch.equal(batch.pixels, expected.pixels)
    assert again.drawn == {"raw-train": 56}


def test_turning_buckets_off_or_on_says_what_becomes_of_the_order(
    model: UniImage, caplog: pytest.LogCaptureFixture
) -> None:
    write_mixed_sizes("raw")
    data = data_of("raw", GIVEN)
    for batch in batches_of(data, model, 5):
        data.on_before_batch_transfer(batch, 0)
    squares = data_of("raw")
    squares.load_state_dict(data.state_dict())
    assert "the order is another one, and samples of this pass may repeat" in caplog.text
    assert next(batches_of(squares, model, 1)).pixels.shape[2:] == (24, 24)
    caplog.clear()
    on = data_of("raw", GIVEN)
    on.load_state_dict(data_of("raw").state_dict())
    assert "no sample of this pass is repeated or lost" in caplog.text


def test_validation_with_buckets_gives_one_loss(model: UniImage) -> None:
    write_mixed_sizes("raw")
    data = data_of("raw", GIVEN, "stage.val_samples=16", "data.val_batch_size=5")
    data.bind(model.prompt)
    module = make_module(model)
    (found,) = make_trainer(1).validate(module, datamodule=data, verbose=False)
    assert found["val/loss"] > 0
    assert sum(len(batch) for batch in data.val_dataloader()) == 16


def test_sides_that_the_model_cant_take_are_named(model: UniImage) -> None:
    write_mixed_sizes("raw", 8)
    for options, name in ((("data.buckets=[[24,24],[18,32]]",), r"data\.buckets"), (("stage.image_size=30",), "stage")):
        data = data_of("raw", *options)
        with pytest.raises(ValueError, match=rf"{name}.*must be multiples of 8 pixels"):
            data.bind(model.prompt, None, model.size_multiple)


def cached_with_a_broken_caption(world: Path) -> ShardDataModule:
    """60 samples in buckets, of which s003 can't be read."""
    write_mixed_sizes("raw", 60)
    denoiser = world / "backbones" / "denoiser"
    autoencoder = FrozenAutoencoder.from_folder(denoiser / "vae")
    buckets = Buckets(tuple((h, w) for h, w in BUCKETS))
    cache_latents(
        Path("raw"), Path("cached"), autoencoder, compute_autoencoder_digest(denoiser), CachingOptions(24, buckets)
    )
    tar = Path("cached/train-000000.tar")
    offset, size = TarReader().read_index(tar).samples[3][1]["txt"]
    with tar.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * size)
    return data_of("cached", GIVEN, "data.max_bad_share=0.2")


def test_a_corrupt_picture_among_cached_ones_is_replaced_by_one_of_its_shape(in_world: Path, model: UniImage) -> None:
    data = cached_with_a_broken_caption(in_world)
    seen = [key for batch in batches_of(data, model, 40) for key in batch.keys]
    assert "s003" not in seen
    assert len(set(seen)) == 59


def test_a_corrupt_picture_of_a_rare_shape_is_replaced_by_its_batch(
    in_world: Path, model: UniImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tbac.data.reader.ATTEMPTS", 1)
    data = cached_with_a_broken_caption(in_world)
    batches = list(batches_of(data, model, 40))
    assert all(len(batch) == len(batch.positions) == 4 for batch in batches)
    seen = [key for batch in batches for key in batch.keys]
    assert "s003" not in seen
    assert len(set(seen)) == 59
    assert any(len(set(batch.keys)) < 4 for batch in batches)
