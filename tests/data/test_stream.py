"""Streaming: every sample once, in an order that the seed decides; corrupt ones skipped, counted and named."""

import io
import itertools
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.shards import write_shards
from tbac.data.shards import DataError, Source
from tbac.data.stream import ShardStream
from tbac.data.transforms import ConditionDropout
from tests.conftest import noise_image


def write(folder: Path, count: int, per_shard: int, split: str = "train", prefix: str = "s") -> Source:
    samples = ((f"{prefix}{i:04d}", {"png": noise_image(i, (8, 8)), "txt": f"caption {i}"}) for i in range(count))
    write_shards(folder, split, samples, per_shard)
    return Source(str(folder), split)


def keys(stream: ShardStream, count: int | None = None) -> list[str]:
    return [s.key for s in itertools.islice(stream, count)]


def break_members(tar: Path, broken: dict[str, bytes | None]) -> None:
    """Rewrite a tar with the contents of some members replaced, or left out (None)."""
    with tarfile.open(tar) as old:
        members = [(m.name, old.extractfile(m).read()) for m in old]  # type: ignore[union-attr]
    with tarfile.open(tar, "w") as new:
        for name, data in members:
            content = broken.get(name, data)
            if content is not None:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                new.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("buffer", [0, 7, 1000])
def test_one_pass_holds_every_sample_once(tmp_path: Path, buffer: int) -> None:
    source = write(tmp_path / "a", 40, 10)
    stream = ShardStream([source], seed=1, shuffle_buffer=buffer)
    # A pass ends at 40 samples only without a buffer; with one, each sample comes once in any window of passes.
    drawn = Counter(keys(stream, 40 * 50))
    assert set(drawn) == {f"s{i:04d}" for i in range(40)}
    assert max(drawn.values()) - min(drawn.values()) <= (0 if buffer == 0 else 30)


def test_the_seed_decides_the_order(tmp_path: Path) -> None:
    source = write(tmp_path / "a", 60, 10)
    first, again, other = (keys(ShardStream([source], seed=s, shuffle_buffer=20), 100) for s in (1, 1, 2))
    assert first == again
    assert first != other
    assert first[:20] != sorted(first[:20])


@pytest.mark.parametrize(("world_size", "shards"), [(2, 4), (3, 7), (4, 4)])
def test_ranks_read_disjoint_parts_that_cover_all(tmp_path: Path, world_size: int, shards: int) -> None:
    source = write(tmp_path / "a", shards * 5, 5)
    parts = []
    for rank in range(world_size):
        stream = ShardStream([source], seed=3, shuffle_buffer=0, rank=rank, world_size=world_size)
        own = len(range(rank, shards, world_size)) * 5
        parts.append(keys(stream, own))
    assert sum(map(len, parts)) == shards * 5
    assert len(set().union(*parts)) == shards * 5


def test_workers_read_disjoint_parts(tmp_path: Path) -> None:
    source = write(tmp_path / "a", 20, 5)
    stream = ShardStream([source], seed=3, shuffle_buffer=0)
    loader = torch.utils.data.DataLoader(
        stream, batch_size=None, num_workers=2, collate_fn=lambda s: s.key, multiprocessing_context="fork"
    )
    assert len(set(itertools.islice(loader, 20))) == 20


def test_fewer_shards_than_readers_is_an_error(tmp_path: Path) -> None:
    source = write(tmp_path / "a", 10, 5)
    with pytest.raises(DataError, match="2 train shards for 3 readers"):
        next(iter(ShardStream([source], seed=0, world_size=3)))


def test_validation_is_one_pass_in_order_and_split_by_sample(tmp_path: Path) -> None:
    source = write(tmp_path / "a", 25, 25, "val")
    assert keys(ShardStream([source], seed=0, repeat=False)) == [f"s{i:04d}" for i in range(25)]
    parts = [keys(ShardStream([source], seed=0, repeat=False, rank=r, world_size=3)) for r in range(3)]
    assert sorted(itertools.chain(*parts)) == [f"s{i:04d}" for i in range(25)]


def test_the_mixture_follows_the_weights(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", 20, 10, prefix="a"), write(tmp_path / "b", 20, 10, prefix="b")
    stream = ShardStream([Source(a.path, weight=3.0), Source(b.path, weight=1.0)], seed=0)
    drawn = Counter(key[0] for key in keys(stream, 4000))
    # Binomial: standard deviation 0.007 of the share.
    assert abs(drawn["a"] / 4000 - 0.75) < 0.03


def test_dropout_depends_on_the_sample_and_not_on_the_reader(tmp_path: Path) -> None:
    source = write(tmp_path / "a", 40, 10)
    whole = {
        s.key: s.text
        for s in itertools.islice(ShardStream([source], seed=5, shuffle_buffer=0, dropout=ConditionDropout(0.5)), 40)
    }
    halves = {}
    for rank in range(2):
        stream = ShardStream([source], seed=5, shuffle_buffer=0, dropout=ConditionDropout(0.5), rank=rank, world_size=2)
        halves |= {s.key: s.text for s in itertools.islice(stream, 20)}
    assert halves == whole
    assert 0 < sum(text == "" for text in whole.values()) < 40


BROKEN: dict[str, dict[str, bytes | None]] = {
    "garbage image": {"s0003.png": b"\xff\xd8 not a jpeg"},
    "image that breaks off": {"s0003.png": b""},
    "no image": {"s0003.png": None},
    "no caption": {"s0003.txt": None},
    "caption that isn't text": {"s0003.txt": b"\xff\xfe\x00"},
    "empty caption": {"s0003.txt": b"  "},
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_corrupt_sample_is_skipped_counted_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    source = write(tmp_path / "a", 30, 10)
    broken = dict(BROKEN[what])
    if what == "image that breaks off":
        buffer = io.BytesIO()
        noise_image(3, (64, 64)).save(buffer, "png")
        broken = {"s0003.png": buffer.getvalue()[:2000]}
    break_members(tmp_path / "a" / "train-000000.tar", broken)
    stream = ShardStream([source], seed=0, shuffle_buffer=0, check_manifest=False)
    drawn = Counter(keys(stream, 29 * 3))
    assert "s0003" not in drawn
    assert set(drawn.values()) == {3}
    assert "s0003" in caplog.text
    assert "1 bad of" in caplog.text


def test_too_many_corrupt_samples_stop_training(tmp_path: Path) -> None:
    source = write(tmp_path / "a", 30, 10)
    break_members(tmp_path / "a" / "train-000000.tar", {f"s{i:04d}.png": b"no" for i in range(3)})
    stream = ShardStream([source], seed=0, max_bad_share=0.05, check_manifest=False)
    with pytest.raises(DataError, match=r"3 of 30 samples.*data\.max_bad_share=0\.05"):
        keys(stream, 100)
    assert keys(ShardStream([source], seed=0, max_bad_share=0.2, check_manifest=False), 100)


def test_a_source_without_any_good_sample_stops(tmp_path: Path) -> None:
    source = write(tmp_path / "a", 4, 2)
    for tar in (tmp_path / "a").glob("*.tar"):
        break_members(tar, {f"s{i:04d}.png": b"no" for i in range(4)})
    with pytest.raises(DataError, match=r"no usable sample|4 of 4 samples"):
        keys(ShardStream([source], seed=0, max_bad_share=1.0, check_manifest=False), 1)


@pytest.mark.parametrize("into", [0, 300, 512, 700])
def test_a_truncated_tar_loses_only_its_end(tmp_path: Path, caplog: pytest.LogCaptureFixture, into: int) -> None:
    source = write(tmp_path / "a", 30, 30)
    shard = tmp_path / "a" / "train-000000.tar"
    with tarfile.open(shard) as tar:
        start = tar.getmember("s0018.png").offset
    shard.write_bytes(shard.read_bytes()[: start + into])
    with pytest.raises(DataError, match=r"train-000000.tar is truncated.*manifest.*data.check_manifest=false"):
        ShardStream([source], seed=0)
    samples = list(ShardStream([source], seed=0, repeat=False, check_manifest=False, max_bad_share=0.5))
    assert len(samples) in (17, 18)  # the last one before the cut can't be known to be complete
    for index, sample in enumerate(samples):  # what is left is what was written
        assert sample.key == f"s{index:04d}"
        assert sample.text == f"caption {index}"
        assert sample.target.tobytes() == noise_image(index, (8, 8)).tobytes()  # type: ignore[union-attr]
    assert "breaks off" in caplog.text


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: None, "doesn't exist"),
        (lambda folder: folder.mkdir(), "holds no train-"),
        (lambda folder: write(folder, 4, 2, "val"), "holds no train-"),
    ],
)
def test_absent_and_empty_folders_are_named(tmp_path: Path, make, words: str) -> None:
    make(tmp_path / "a")
    with pytest.raises(DataError, match=words) as error:
        ShardStream([Source(str(tmp_path / "a"))], seed=0)
    assert str(tmp_path / "a") in str(error.value)


def test_an_altered_or_absent_shard_is_named(tmp_path: Path) -> None:
    source = write(tmp_path / "a", 20, 10)
    (tmp_path / "a" / "train-000001.tar").unlink()
    with pytest.raises(DataError, match=r"train-000001\.tar is in the manifest but absent"):
        ShardStream([source], seed=0)


def test_shards_without_a_manifest_are_read(tmp_path: Path) -> None:
    source = write(tmp_path / "a", 20, 10)
    (tmp_path / "a" / "manifest.json").unlink()
    assert len(keys(ShardStream([source], seed=0), 20)) == 20


def test_jpeg_and_webp_are_read(tmp_path: Path) -> None:
    picture = Image.new("RGB", (8, 8), (10, 200, 30))
    samples = [(f"k{i}", {ext: picture, "txt": "x"}) for i, ext in enumerate(("jpg", "webp", "png"))]
    write_shards(tmp_path / "a", "train", samples, 10)
    for sample in ShardStream([Source(str(tmp_path / "a"))], seed=0, repeat=False):
        assert sample.target is not None
        pixel = np.asarray(sample.target.convert("RGB"), int)[4, 4]
        assert np.abs(pixel - (10, 200, 30)).max() < 8
