"""Reading samples out of shards; corrupt ones replaced, counted and named."""

import io
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.shards.writer import write_shards
from tbac.data.order import Draw
from tbac.data.reader import ShardReader
from tbac.data.shards import DataError, Source
from tbac.data.tars import TarIndex
from tbac.data.transforms import ConditionDropout
from tests.helpers.pictures import make_noise_image
from tests.helpers.shards import break_members, make_reader, read_samples


def write(folder: Path, count: int, per_shard: int, split: str = "train", prefix: str = "s") -> Source:
    samples = ((f"{prefix}{i:04d}", {"png": make_noise_image(i, (8, 8)), "txt": f"caption {i}"}) for i in range(count))
    write_shards(folder, split, samples, per_shard)
    return Source(str(folder), split)


def keys(reader: ShardReader, passes: int = 1) -> list[str]:
    return [s.key for s in read_samples(reader, passes)]


def test_dropout_depends_on_sample_and_pass_and_not_on_the_reader(tmp_path: Path) -> None:
    source = write(tmp_path / "a", 40, 10)
    first, second = (read_samples(make_reader(source, seed=5, dropout=ConditionDropout(0.5)), 2) for _ in range(2))
    texts = [s.text for s in first]
    assert texts == [s.text for s in second]
    assert texts[:40] != texts[40:]
    assert 0 < sum(text == "" for text in texts[:40]) < 40
    backwards = make_reader(source, seed=5, dropout=ConditionDropout(0.5))
    assert [backwards.read_sample(Draw(7 + n, 0, 0, 1, n)).text for n in (9, 3)] == [texts[19], texts[13]]


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
        make_noise_image(3, (64, 64)).save(buffer, "png")
        broken = {"s0003.png": buffer.getvalue()[:2000]}
    break_members(tmp_path / "a" / "train-000000.tar", broken)
    first, again = (keys(make_reader(source, check_manifest=False), 3) for _ in range(2))
    assert first == again
    drawn = Counter(first)
    assert "s0003" not in drawn
    assert sum(drawn.values()) == 90
    assert sum(n - 3 for n in drawn.values()) == 3  # its places went to others
    assert first[3] in [f"s{i:04d}" for i in range(30)]
    assert "s0003" in caplog.text
    assert "1 bad of" in caplog.text


def test_too_many_corrupt_samples_stop_training(tmp_path: Path) -> None:
    source = write(tmp_path / "a", 30, 10)
    break_members(tmp_path / "a" / "train-000000.tar", {f"s{i:04d}.png": b"no" for i in range(3)})
    reader = make_reader(source, max_bad_share=0.05, check_manifest=False)
    with pytest.raises(DataError, match=r"2 of 2 samples.*data\.max_bad_share=0\.05"):
        keys(reader, 3)
    assert len(keys(make_reader(source, max_bad_share=0.2, check_manifest=False), 3)) == 90


def test_a_source_without_any_good_sample_stops(tmp_path: Path) -> None:
    source = write(tmp_path / "a", 4, 2)
    for tar in (tmp_path / "a").glob("*.tar"):
        break_members(tar, {f"s{i:04d}.png": b"no" for i in range(4)})
    with pytest.raises(DataError, match=r"no usable sample|4 of 4 samples"):
        keys(make_reader(source, max_bad_share=1.0, check_manifest=False))


@pytest.mark.parametrize("into", [0, 300, 512, 700])
def test_a_truncated_tar_loses_only_its_end(tmp_path: Path, caplog: pytest.LogCaptureFixture, into: int) -> None:
    source = write(tmp_path / "a", 30, 30)
    shard = tmp_path / "a" / "train-000000.tar"
    with tarfile.open(shard) as tar:
        start = tar.getmember("s0018.png").offset
    shard.write_bytes(shard.read_bytes()[: start + into])
    with pytest.raises(DataError, match=r"train-000000.tar is truncated.*manifest.*data.check_manifest=false"):
        make_reader(source)
    samples = read_samples(make_reader(source, check_manifest=False))
    assert len(samples) in (17, 18)  # the last one before the cut can't be known to be complete
    for index, sample in enumerate(samples):  # what is left is what was written
        assert sample.key == f"s{index:04d}"
        assert sample.text == f"caption {index}"
        assert sample.target.tobytes() == make_noise_image(index, (8, 8)).tobytes()  # type: ignore[union-attr]
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
        make_reader(Source(str(tmp_path / "a")))
    assert str(tmp_path / "a") in str(error.value)


def test_an_altered_or_absent_shard_is_named(tmp_path: Path) -> None:
    source = write(tmp_path / "a", 20, 10)
    (tmp_path / "a" / "train-000001.tar").unlink()
    with pytest.raises(DataError, match=r"train-000001\.tar is in the manifest but absent"):
        make_reader(source)


def test_shards_without_a_manifest_are_read(tmp_path: Path) -> None:
    source = write(tmp_path / "a", 20, 10)
    (tmp_path / "a" / "manifest.json").unlink()
    assert keys(make_reader(source)) == [f"s{i:04d}" for i in range(20)]


def test_jpeg_and_webp_are_read(tmp_path: Path) -> None:
    picture = Image.new("RGB", (8, 8), (10, 200, 30))
    samples = [(f"k{i}", {ext: picture, "txt": "x"}) for i, ext in enumerate(("jpg", "webp", "png"))]
    write_shards(tmp_path / "a", "train", samples, 10)
    for sample in read_samples(make_reader(Source(str(tmp_path / "a")))):
        assert sample.target is not None
        pixel = np.asarray(sample.target.convert("RGB"), int)[4, 4]
        assert np.abs(pixel - (10, 200, 30)).max() < 8


def test_a_shard_that_vanishes_is_named_at_once(tmp_path: Path) -> None:
    reader = make_reader(write(tmp_path / "a", 40, 10), max_bad_share=0.5)
    (tmp_path / "a" / "train-000002.tar").unlink()
    with pytest.raises(DataError, match=r"train-000002.tar was there when training began and is gone"):
        keys(reader)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_index_agrees_with_tarfile_also_for_long_names(tmp_path: Path, form: int) -> None:
    folder = "x" * 90 + "/" + ("y" * 60 if form == tarfile.USTAR_FORMAT else "y" * 180)
    written = {f"{folder}/k{i}": {"txt": b"a" * i, "JSON": b"{}", "source_1.png": bytes(700)} for i in range(3)}
    with tarfile.open(tmp_path / "t.tar", "w", format=form) as tar:
        for key, fields in written.items():
            for name, data in fields.items():
                info = tarfile.TarInfo(f"{key}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    index = TarIndex(tmp_path / "t.tar")
    assert index.broken is None
    assert [key for key, _ in index.samples] == list(written)
    data = (tmp_path / "t.tar").read_bytes()
    for (_, members), fields in zip(index.samples, written.values(), strict=True):
        assert {k: data[o : o + n] for k, (o, n) in members.items()} == {k.lower(): v for k, v in fields.items()}


def test_only_the_latest_tars_stay_open(tmp_path: Path) -> None:
    source = write(tmp_path / "a", 40, 4)
    reader = make_reader(source)
    reader.tars.keep = 2
    assert keys(reader) == [f"s{i:04d}" for i in range(40)]
    assert len(reader.tars._open) == 2
