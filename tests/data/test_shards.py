"""Manifests and size tables from elsewhere: what every tool makes of torn, empty, foreign and hostile ones."""

import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.shards.latents import CachingOptions, cache_latents
from data_prep.shards.verification import verify, write_all_sizes
from data_prep.shards.writer import write_shards
from tbac.data.buckets import BucketIndex, load_target_sizes, name_sizes_file, parse_buckets, read_sizes, write_sizes
from tbac.data.order import Draw
from tbac.data.shards import DataError, Source, SourceShards, parse_source
from tbac.types import Sample
from tests.helpers.pictures import make_noise_image
from tests.helpers.shards import make_reader

SIDES = [(24, 24), (40, 20), (20, 40), (64, 16), (16, 64), (32, 32)]


def write(count: int = 6) -> Path:
    samples = [(f"s{i}", {"png": make_noise_image(i, SIDES[i % 6]), "txt": f"caption {i}"}) for i in range(count)]
    write_shards(Path("shards"), "train", samples, 3)
    return Path("shards/train-000000.tar")


# --- manifests

TOOLS: dict[str, Callable[[], Any]] = {
    "training": lambda: SourceShards(Source("shards")),
    "verify": lambda: verify(Path("shards"), None, 1),
    "sizes": lambda: write_all_sizes(Path("shards"), 1),
    "caching": lambda: cache_latents(Path("shards"), Path("out"), None, "0" * 64, CachingOptions(8)),  # type: ignore[arg-type]
    "writing": lambda: write(3),
}
ENTRY = {"samples": 3, "bytes": 10240, "sha256": "0" * 64}


def change(**fields: Any) -> bytes:
    manifest = {"schema_version": 1, "shards": {"train-000000.tar": ENTRY, "train-000001.tar": ENTRY}}
    return json.dumps(manifest | fields).encode()


def change_entry(**fields: Any) -> bytes:
    return change(shards={"train-000000.tar": ENTRY | fields, "train-000001.tar": ENTRY})


MANIFESTS: dict[str, bytes] = {
    "empty": b"",
    "torn": change()[:-30],
    "garbage": os.urandom(300),
    "text": b"nonsense",
    "a list": b"[]",
    "null": b"null",
    "a number": b"7",
    "deep": b'{"shards":' * 50_000,
    "deep lists": b"[" * 200_000,
    "a long number": b'{"schema_version": 1, "shards": ' + b"9" * 5000 + b"}",
    "a lone surrogate": b'{"schema_version": 1, "shards": {"\\ud800": {}}}',
    "a later version": change(schema_version=2),
    "an earlier version": change(schema_version=0),
    "a version that is text": change(schema_version="1"),
    "a version that is true": change(schema_version=True),
    "a version that is a fraction": change(schema_version=1.0),
    "no version": b'{"shards": {}}',
    "no shards": b'{"schema_version": 1}',
    "shards in a list": change(shards=[ENTRY]),
    "an entry that is null": change(shards={"train-000000.tar": None}),
    "an entry that is a number": change(shards={"train-000000.tar": 3}),
    "an entry that is a list": change(shards={"train-000000.tar": [3, 10240]}),
    "no count": change(shards={"train-000000.tar": {"bytes": 10240}}),
    "no size": change(shards={"train-000000.tar": {"samples": 3}}),
    **{f"samples: {value!r}": change_entry(samples=value)
       for value in (-1, 10**6, 10**30, 1.5, 3.0, "3", None, True, [3], {}, float("nan"), float("inf"))},
    **{f"bytes: {value!r}": change_entry(bytes=value)
       for value in (-1, 10**30, 1.5, "10240", None, True, [], float("nan"), float("-inf"))},
    **{f"sha256: {value!r}": change_entry(sha256=value) for value in (7, [], "0", "../x", True)},
    **{f"image_size: {value!r}": change(image_size=value) for value in (-24, 0, 24.0, "24", True, [24], float("nan"))},
    **{f"buckets: {value!r}": change(buckets=value)
       for value in ([], {}, "sana", [24], [[24]], [[24, 0]], [[24, -1]], [[24, "24"]], [[1.5, 2]])},
    **{f"autoencoder_digest: {value!r}": change(autoencoder_digest=value) for value in (7, [], True)},
}  # fmt: skip


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("what", MANIFESTS)
def test_a_manifest_of_another_form_is_named_by_every_tool(what: str, tool: str) -> None:
    write()
    Path("shards/manifest.json").write_bytes(MANIFESTS[what])
    with pytest.raises(DataError, match=r"shards/manifest\.json") as error:
        TOOLS[tool]()
    assert len(str(error.value)) < 400
    assert "\n" not in str(error.value)


def cut_tar(tar: Path) -> None:
    os.truncate(tar, tar.stat().st_size - 512)


def lengthen_tar(tar: Path) -> None:
    os.truncate(tar, tar.stat().st_size + 512)


@pytest.mark.parametrize("tool", [name for name in TOOLS if name != "writing"])
@pytest.mark.parametrize("damage", [
    cut_tar,
    lengthen_tar,
    Path.unlink,
    lambda tar: (tar.unlink(), tar.mkdir()),
    lambda tar: (tar.unlink(), os.mkfifo(tar)),
    lambda tar: (tar.unlink(), tar.symlink_to("/dev/zero")),
], ids=["cut", "longer", "absent", "a folder", "a pipe", "a device"])  # fmt: skip
def test_shards_are_held_against_the_manifest_by_every_tool(tool: str, damage: Callable[[Path], Any]) -> None:
    damage(write())
    if tool == "verify" and damage.__name__ in ("cut_tar", "lengthen_tar", "unlink"):
        named = TOOLS[tool]().named.values()
        assert any("train-000000.tar" in name for names in named for name in names)
        return
    with pytest.raises(DataError, match=r"shards/train-000000\.tar"):
        TOOLS[tool]()


def test_a_manifest_that_says_too_little_is_named_while_reading(caplog: pytest.LogCaptureFixture) -> None:
    write()
    manifest = json.loads(Path("shards/manifest.json").read_text())
    manifest["shards"]["train-000000.tar"]["samples"] = 2
    Path("shards/manifest.json").write_text(json.dumps(manifest))
    reader = make_reader(Source("shards"))
    sample = reader.read_sample(Draw(0, 0, 0, 0, 0))
    assert isinstance(sample, Sample)
    assert "train-000000.tar holds 3 samples, its manifest says 2" in caplog.text


@pytest.mark.parametrize("make", [
    lambda file: file.symlink_to("/dev/zero"), lambda file: os.mkfifo(file), lambda file: file.mkdir(),
], ids=["device", "pipe", "folder"])  # fmt: skip
def test_what_is_no_manifest_file_is_no_manifest(make: Callable[[Path], Any]) -> None:
    write()
    Path("shards/manifest.json").unlink()
    make(Path("shards/manifest.json"))
    assert SourceShards(Source("shards")).samples == [3, 3]


# --- sources in a config


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "a source needs path"),
        ({"path": "x", "kind": 1}, "a source needs path"),
        (3, "a source needs path"),
        (["x"], "a source needs path"),
        ({"path": 3}, "path of a source must be text, got '3'"),
        ({"path": None}, "path of a source must be text"),
        ({"path": ""}, "path of a source must be text"),
        ("", "path of a source must be text"),
        ({"path": "x", "split": None}, "split of a source must be text"),
        ({"path": "x", "split": "../x"}, "split of source x is the beginning of file names"),
        *(({"path": "x", "weight": w}, "must be a positive number")
          for w in (0, -1, float("nan"), float("inf"), "1", True, None, [1])),
    ],
)  # fmt: skip
def test_a_source_of_another_form_is_named(fields: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_source(fields)


def test_a_path_alone_is_a_source() -> None:
    assert parse_source("a/b") == parse_source({"path": "a/b"}) == Source("a/b", "train", 1.0)


# --- size tables


def make_table(**arrays: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.savez(content, **arrays)
    return content.getvalue()


def make_bomb() -> bytes:
    """A table whose one array of zeros is a gigabyte, packed to a megabyte."""
    content = io.BytesIO()
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<i4", "fortran_order": False, "shape": (2**27, 2)})
    packed = zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED)
    with packed, packed.open("latents.npy", "w", force_zip64=True) as file:
        file.write(header.getvalue())
        for _ in range(64):
            file.write(bytes(2**24))
    return content.getvalue()


def make_promise() -> bytes:
    """A table whose header promises a hundred gigabytes."""
    array = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        array, {"descr": "<i4", "fortran_order": False, "shape": (10**11, 2)}
    )  # fmt: skip
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as packed:
        for name in ("shard", "latents", "images"):
            packed.writestr(f"{name}.npy", array.getvalue())
    return content.getvalue()


def flip(data: bytes, place: int) -> bytes:
    changed = bytearray(data)
    changed[place % len(data)] ^= 4
    return bytes(changed)


SIZES = np.array([[1, 4]] * 3, np.int32)
TABLES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda good: b"",
    "garbage": lambda good: os.urandom(500),
    "text": lambda good: b"garbage",
    "torn": lambda good: good[: len(good) // 2],
    "a byte short": lambda good: good[:-1],
    "one array alone": lambda good: make_table(shard=np.array("x")),
    "of another version": lambda good: make_table(version=np.array(2), sizes=SIZES),
    "of another shard": lambda good: make_table(shard=np.array("1-x"), latents=SIZES, images=SIZES),
    "pickled": lambda good: make_table(shard=np.array([{}], object), latents=SIZES, images=SIZES),
    "a bomb": lambda good: make_bomb(),
    "a promise": lambda good: make_promise(),
    **{f"flipped at {place}": lambda good, place=place: flip(good, place) for place in range(40, 900, 97)},  # type: ignore[misc]
}


@pytest.mark.parametrize("what", TABLES)
def test_a_table_that_cant_be_used_changes_no_bucket(what: str) -> None:
    tar = write()
    write_sizes(tar)
    file, buckets = name_sizes_file(tar), parse_buckets([[24, 24], [8, 32], [32, 8]], 24)
    assert buckets is not None

    def choose() -> list[int]:
        index = BucketIndex(buckets, [[tar]])
        return [index(Draw(i, 0, 0, 0, i)) for i in range(3)]

    expected = choose()
    assert expected[0] == 0
    file.write_bytes(TABLES[what](file.read_bytes()))
    assert choose() == expected
    assert np.array_equal(load_target_sizes(tar), read_sizes(tar))


@pytest.mark.parametrize("array", [
    SIZES.astype(np.float64) * np.nan, SIZES.astype(np.int64), -SIZES, SIZES[0], SIZES.T, SIZES.astype(str),
], ids=["NaN", "int64", "negative", "flat", "turned", "text"])  # fmt: skip
def test_a_table_of_this_shard_with_other_values_is_refused(array: np.ndarray) -> None:
    tar = write()
    write_sizes(tar)
    with np.load(name_sizes_file(tar)) as kept:
        fingerprint = kept["shard"]
    name_sizes_file(tar).write_bytes(make_table(shard=fingerprint, latents=array, images=array))
    assert np.array_equal(load_target_sizes(tar), read_sizes(tar))


def test_without_any_size_a_sample_is_a_square_and_not_the_first_bucket() -> None:
    buckets = parse_buckets("sana", 512)
    assert buckets is not None
    Path("x.tar").write_bytes(b"garbage")
    index = BucketIndex(buckets, [[Path("x.tar"), Path("absent.tar")]])
    assert [buckets.sizes[index(Draw(0, 0, 0, shard, 5))] for shard in (0, 1)] == [(512, 512)] * 2
