"""Tars are WebDataset's, with the same bytes for the same samples, and have their names only when they are whole."""

import json
import tarfile
import time
from pathlib import Path

import pytest
import webdataset

from data_prep.shards.writer import ShardWriter, write_shards
from tbac.data.tars import TarIndex
from tests.helpers.pictures import make_noise_image

SAMPLES = [
    ("a", {"txt": "caf\xe9", "jpg": b"\xff\xd8 bytes of a picture"}),
    ("b", {"txt": "two", "png": make_noise_image(1, (8, 8)), "json": {"kind": "x"}}),
]


def test_the_same_samples_give_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(Path("first"), "train", SAMPLES, 10)
    monkeypatch.setattr(time, "time", lambda: 2e9)
    monkeypatch.setattr("os.getuid", lambda: 1234)
    reordered = [(key, dict(reversed(fields.items()))) for key, fields in SAMPLES]
    write_shards(Path("second"), "train", reordered, 10)
    for name in ("train-000000.tar", "manifest.json"):
        assert Path("first", name).read_bytes() == Path("second", name).read_bytes()
    with tarfile.open("first/train-000000.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in tar} == {(0, 0, 0, "", "")}


def test_webdataset_reads_what_was_given() -> None:
    write_shards(Path("shards"), "train", SAMPLES, 10)
    found = list(webdataset.WebDataset("shards/train-000000.tar", shardshuffle=False))
    assert [sample["__key__"] for sample in found] == ["a", "b"]
    assert found[0]["jpg"] == b"\xff\xd8 bytes of a picture"
    assert found[0]["txt"].decode() == "caf\xe9"
    assert json.loads(found[1]["json"]) == {"kind": "x"}


def test_a_tar_has_its_name_when_it_is_whole() -> None:
    writer = ShardWriter(Path("x.tar"))
    writer.add("a", {"txt": "x"})
    assert not Path("x.tar").exists()
    entry = writer.close()
    assert entry["samples"] == len(TarIndex(Path("x.tar")).samples) == 1
    assert entry["bytes"] == Path("x.tar").stat().st_size
    assert [path.name for path in Path().glob("x.tar*")] == ["x.tar"]


@pytest.mark.parametrize(
    ("key", "field", "words"),
    [
        ("a.b", "txt", "must hold neither a dot nor a slash"),
        ("a/b", "txt", "must hold neither a dot nor a slash"),
        ("", "txt", "must hold neither a dot nor a slash"),
        ("a", "__origin", "must not begin with an underscore"),
    ],
)
def test_what_webdataset_would_split_or_leave_out_is_refused(key: str, field: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ShardWriter(Path("x.tar")).add(key, {field: "x"})
