"""Datasets from elsewhere: nothing is read outside of their folder, and no sample gets another's picture."""

import errno
import io
import json
import os
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.datasets import archives
from data_prep.datasets.archives import FileStore, LookupFailedError, find_archives
from data_prep.datasets.gpt_image_edit import GPTImageEdit
from data_prep.datasets.image_folder import ImageFolder
from data_prep.datasets.sharegpt4o import ShareGPT4oImage
from data_prep.datasets.table import Table
from data_prep.datasets.webdataset_tars import WebDatasetTars
from data_prep.shards.conversion import NAME, ConversionOptions, Counts, Dataset, convert
from tbac.data.decoding import decode_sample
from tbac.data.shards import DataError, Source, SourceShards
from tbac.data.tars import TarReader
from tbac.types import Sample
from tests.helpers.pictures import encode_image, make_noise_image

ALL = ConversionOptions(val_samples=0)
SECRET = 999  # seed of the picture that lies outside


def picture(seed: int) -> bytes:
    return encode_image(make_noise_image(seed, (24, 16)), "PNG")


def write_tar(file: Path, members: Mapping[str, bytes], mode: str = "w") -> bytes:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, mode) as tar:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.read_bytes()


def read_samples(out: str = "out") -> list[Sample]:
    reader = TarReader()
    return [
        decode_sample(reader.read(tar, number))
        for tar in SourceShards(Source(out)).tars
        for number in range(len(reader.read_index(tar).samples))
    ]


def convert_all(dataset: Dataset, out: str = "out") -> tuple[Counts, dict[str, Sample]]:
    """Convert, and return the counts and text -> sample."""
    try:
        counts = convert(dataset, Path(out), ALL)
    except DataError as error:
        if "could be converted" not in str(error):
            raise
        return Counts(), {}
    assert counts.read == counts.total + sum(counts.rejected.values())
    samples = {sample.text: sample for sample in read_samples(out)}
    assert len(samples) == counts.total
    return counts, samples


def is_picture(sample: Sample, seed: int) -> bool:
    assert sample.target is not None
    return sample.target.tobytes() == make_noise_image(seed, (24, 16)).tobytes()


# --- paths that lead out

ESCAPES: dict[str, Callable[[Path], str]] = {
    "a folder up": lambda root: "../secret.png",
    "three folders up and down": lambda root: f"../../../{root.parent.name}/secret.png",
    "from a folder inside": lambda root: "inside/../../secret.png",
    "an absolute path": lambda root: str(root.parent / "secret.png"),
    "a link": lambda root: link(root, "link.png", root.parent / "secret.png"),
    "a relative link": lambda root: link(root, "link.png", Path("../secret.png")),
    "a link to a link": lambda root: link(
        root, "second.png", root / link(root, "first.png", root.parent / "secret.png")),
    "a linked folder": lambda root: link(root, "folder", root.parent) + "/secret.png",
    "a device": lambda root: "/dev/zero",
    "a link to a device": lambda root: link(root, "zero.png", Path("/dev/zero")),
    "a pipe": lambda root: (os.mkfifo(root / "pipe.png"), "pipe.png")[1],
    "a link in a circle": lambda root: link(root, "circle.png", Path("circle.png")),
    "a folder": lambda root: "inside",
    "nothing": lambda root: "absent.png",
    "a zero": lambda root: "x\0.png",
    "a name too long": lambda root: "x" * 5000 + ".png",
    "the home folder": lambda root: "~/secret.png",
}  # fmt: skip


def link(root: Path, name: str, target: Path) -> str:
    (root / name).symlink_to(target)
    return name


def prepare(tmp_path: Path) -> Path:
    root = tmp_path / "dataset"
    (root / "inside").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(picture(SECRET))
    (root / "good.png").write_bytes(picture(1))
    return root


def make_csv(root: Path, path: str) -> Dataset:
    (root / "rows.csv").write_text(f'text,image\ngood,good.png\nbad,"{path}"\n')
    return Table(str(root))


def make_json_lines(root: Path, path: str) -> Dataset:
    rows = [{"text": "good", "image": "good.png"}, {"text": "bad", "image": {"path": path, "bytes": None}}]
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return Table(str(root))


def make_parquet(root: Path, path: str) -> Dataset:
    rows = [{"text": "good", "image": "good.png", "old": ["good.png"]},
            {"text": "bad", "image": "good.png", "old": ["good.png", path]}]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), root / "rows.parquet")
    return Table(str(root), sources=["old"])


def make_sharegpt(root: Path, path: str) -> Dataset:
    rows = [{"input_prompt": "good", "output_image": "good.png"}, {"input_prompt": "bad", "output_image": path}]
    (root / "text_to_image.json").write_text(json.dumps(rows))
    return ShareGPT4oImage(str(root))


def make_gpt_edit(root: Path, path: str) -> Dataset:
    rows = [{"input": "good.png", "output": "good.png", "instruction": "good"},
            {"input": path, "output": "good.png", "instruction": "bad"}]  # fmt: skip
    (root / "train.json").write_text(json.dumps(rows))
    return GPTImageEdit(str(root), ["train.json"])


LAYOUTS = {f.__name__: f for f in (make_csv, make_json_lines, make_parquet, make_sharegpt, make_gpt_edit)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("escape", ESCAPES)
def test_a_path_never_leads_out_of_the_dataset(escape: str, layout: str, tmp_path: Path) -> None:
    root = prepare(tmp_path)
    counts, samples = convert_all(LAYOUTS[layout](root, ESCAPES[escape](root)))
    assert set(samples) == {"good"}
    assert (counts.read, sum(counts.rejected.values())) == (2, 1)
    assert "found" in next(iter(counts.rejected))


@pytest.mark.parametrize("what", ["picture", "caption"])
@pytest.mark.parametrize("escape", [name for name in ESCAPES if "link" in name and "folder" not in name])
def test_a_folder_of_pictures_follows_no_link_out(escape: str, what: str, tmp_path: Path) -> None:
    root = prepare(tmp_path)
    (root / "good.txt").write_text("good")
    (tmp_path / "secret.txt").write_text("bad")
    made = root / ESCAPES[escape](root)
    if what == "caption":
        made.rename(root / "x.txt")
        (root / "x.png").write_bytes(picture(2))
    else:
        made.with_suffix(".txt").write_text("bad")
    counts, samples = convert_all(ImageFolder(str(root)))
    assert set(samples) == {"good"}
    assert counts.rejected


def test_links_inside_of_a_dataset_and_those_of_the_hub_s_cache_are_followed(tmp_path: Path) -> None:
    blobs, root = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    for folder in (blobs, root):
        folder.mkdir(parents=True)
    (blobs / "one").write_bytes(picture(1))
    (root / "two.png").write_bytes(picture(2))
    link(root, "one.png", Path("../../blobs/one"))
    link(root, "also.png", root / "two.png")
    (root / "rows.csv").write_text("text,image\none,one.png\ntwo,also.png\n")
    _, samples = convert_all(Table(str(root)))
    assert is_picture(samples["one"], 1)
    assert is_picture(samples["two"], 2)


@pytest.mark.parametrize("make", [
    lambda root: link(root, "a.tar", root.parent / "other.tar"), lambda root: os.mkfifo(root / "a.tar"),
    lambda root: link(root, "a.tar", Path("/dev/zero")),
])  # fmt: skip
def test_a_tar_outside_of_the_dataset_is_named(make: Callable[[Path], Any], tmp_path: Path) -> None:
    root = prepare(tmp_path)
    write_tar(tmp_path / "other.tar", {"a.png": picture(SECRET), "a.txt": b"bad"})
    make(root)
    with pytest.raises(DataError, match=r"a\.tar isn't a file inside of dataset\.path="):
        WebDatasetTars(str(root), "x")


# --- whose picture it is


def test_a_missing_output_makes_no_edit_of_its_source(tmp_path: Path) -> None:
    for kept in ("input", "output"):
        root = tmp_path / kept
        rows = [
            {"input": f"task/input/{i}.png", "output": f"task/output/{i}.png", "instruction": f"{i}"} for i in (1, 2)
        ]
        members = {"gpt-edit/task/metadata/all.json": json.dumps(rows).encode()}
        members |= {f"gpt-edit/task/{side}/1.png": picture(1 + 10 * (side == "output")) for side in ("input", "output")}
        members[f"gpt-edit/task/{kept}/2.png"] = picture(2)
        write_tar(root / "task.tar", members)
        counts, samples = convert_all(GPTImageEdit(str(root)), f"out_{kept}")
        assert set(samples) == {"1"}
        assert counts.rejected == {"a picture that isn't found: the file isn't there": 1}
        assert is_picture(samples["1"], 11)


FOUND: dict[str, tuple[str, str, set[str], str | None]] = {
    # path of the metadata, origin of it, what is there, what it means
    "its own path": ("a/b/1.png", "", {"a/b/1.png", "c/b/1.png"}, "a/b/1.png"),
    "below the folder of the metadata": ("b/1.png", "x/meta/m.json", {"x/b/1.png", "y/b/1.png"}, "x/b/1.png"),
    "another part's": ("b/1.png", "x/meta/m.json", {"y/b/1.png"}, None),
    "in one folder more": ("b/1.png", "m.json", {"part_0/b/1.png"}, "part_0/b/1.png"),
    "in two folders": ("b/1.png", "m.json", {"part_0/b/1.png", "part_1/b/1.png"}, None),
    "in one folder less": ("data/b/1.png", "m.json", {"b/1.png"}, "b/1.png"),
    "at another machine's path": ("/home/x/data/b/1.png", "m.json", {"b/1.png"}, "b/1.png"),
    "its name alone, elsewhere": ("output/1.png", "m.json", {"input/1.png"}, None),
    "its name alone, at the top": ("output/1.png", "m.json", {"1.png"}, None),
    "a bare name below": ("1.png", "m.json", {"input/1.png"}, None),
    "a bare name": ("1.png", "m.json", {"1.png"}, "1.png"),
    "other parts of a path": ("part_1/b/1.png", "m.json", {"part_0/b/1.png"}, None),
    "a name that begins with a dot": (".hidden/1.png", "m.json", {"hidden/1.png"}, None),
    "dots in a name": ("b/1..png", "m.json", {"b/1..png"}, "b/1..png"),
    "a dot before": ("./b/1.png", "m.json", {"b/1.png"}, "b/1.png"),
    "a folder up": ("../b/1.png", "m.json", {"b/1.png"}, None),
    "nothing": ("", "m.json", {"b/1.png"}, None),
    "the top": ("/", "m.json", {"b/1.png"}, None),
}


@pytest.mark.parametrize("what", FOUND)
@pytest.mark.parametrize("packed", [True, False])
def test_a_picture_is_found_by_its_own_path(what: str, packed: bool) -> None:
    path, origin, there, meant = FOUND[what]
    if packed:
        write_tar(Path("x.tar"), {name: name.encode() for name in there})
        store = FileStore(archives=[[Path("x.tar")]])
    else:
        for name in there:
            Path("data", name).parent.mkdir(parents=True, exist_ok=True)
            Path("data", name).write_text(name)
        store = FileStore([Path("data")])
    if meant is None:
        with pytest.raises(LookupFailedError):
            store.read(path, origin)
    else:
        assert store.read(path, origin) == meant.encode()


def test_two_files_of_one_path_are_told_apart_or_refused() -> None:
    write_tar(Path("a.tar"), {"b/1.png": b"one", "b/2.png": b"two"})
    write_tar(Path("b.tar"), {"b/1.png": b"another", "b/2.png": b"two"})
    store = FileStore(archives=[[Path("a.tar")], [Path("b.tar")]])
    assert store.read("b/2.png") == b"two"
    with pytest.raises(LookupFailedError, match="several files could be meant"):
        store.read("b/1.png")


# --- archives in parts


def cut(data: bytes, names: list[str]) -> None:
    size = -(-len(data) // len(names))
    for number, name in enumerate(names):
        Path(f"data/x.tar.{name}").write_bytes(data[number * size : (number + 1) * size])


MEMBERS = {f"b/{i}.png": os.urandom(3000) for i in range(12)}
LETTERS = [f"part{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(30)]


@pytest.mark.parametrize("names", [
    [f"part{i}" for i in range(1, 13)], [f"part{i}" for i in range(12)], [f"part{i:02d}" for i in range(12)],
    [f"{i:03d}" for i in range(12)], LETTERS, [name.removeprefix("part") for name in LETTERS],
    [f"part_{i}" for i in range(9, -1, -1)], [f"part-{i}" for i in range(1, 101)],
], ids=lambda names: f"{names[0]}..{names[-1]}")  # fmt: skip
def test_parts_are_joined_in_the_order_of_their_numbers(names: list[str]) -> None:
    data = write_tar(Path("whole.tar"), MEMBERS)
    Path("data").mkdir()
    cut(data, sorted(names, key=lambda name: (len(name), name)))
    store = FileStore(archives=find_archives(Path("data")))
    assert store.broken == []
    assert {name: store.read(name) for name in store.list_names()} == MEMBERS
    absent = sorted(names, key=lambda name: (len(name), name))[len(names) // 2]
    Path(f"data/x.tar.{absent}").unlink()
    with pytest.raises(DataError, match="lacks a part"):
        find_archives(Path("data"))


def test_a_whole_archive_and_parts_beside_it_are_two() -> None:
    data = write_tar(Path("data/x.tar"), MEMBERS)
    cut(data, ["part0", "part1"])
    write_tar(Path("data/x.tar.gz"), MEMBERS, "w:gz")
    assert [len(parts) for parts in find_archives(Path("data"))] == [1, 1, 2]


def write_edit_archive(root: Path, mode: str = "w:gz", suffix: str = ".tar.gz") -> None:
    rows = [{"input": f"t/in/{i}.png", "output": f"t/out/{i}.png", "instruction": f"{i}"} for i in range(4)]
    members = {"t/metadata/all.json": json.dumps(rows).encode()}
    members |= {f"t/{side}/{i}.png": picture(i) for side in ("in", "out") for i in range(4)}
    write_tar(root / f"t{suffix}", members, mode)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
@pytest.mark.parametrize(("mode", "suffix"), [("w:gz", ".tar.gz"), ("w:xz", ".tar.xz"), ("w:gz", ".tgz")])
def test_a_full_disk_is_no_broken_archive(
    error: int, mode: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_edit_archive(tmp_path / "raw", mode, suffix)
    dataset = GPTImageEdit(str(tmp_path / "raw"))

    def fail(*_: Any) -> None:
        raise OSError(error, os.strerror(error))

    with monkeypatch.context() as patched:
        patched.setattr(archives, "_copy_within", fail)
        with pytest.raises(DataError, match=r"can't be decompressed into .*start again to go on"):
            convert(dataset, Path("out"), ALL)
    counts, samples = convert_all(dataset)
    assert counts.rejected == {}
    assert len(samples) == 4


@pytest.mark.parametrize("damage", [
    lambda data: data[: len(data) // 2], lambda data: data[:5], lambda data: b"garbage" * 100, lambda data: b"",
    lambda data: data[:1000] + bytes(50) + data[1050:],
])  # fmt: skip
@pytest.mark.parametrize(("mode", "suffix"), [("w:gz", ".tar.gz"), ("w:xz", ".tar.xz"), ("w", ".tar")])
def test_a_broken_archive_is_rejected_by_name(damage: Callable[[bytes], bytes], mode: str, suffix: str) -> None:
    write_edit_archive(Path("raw"), mode, suffix)
    file = Path(f"raw/t{suffix}")
    file.write_bytes(damage(file.read_bytes()))
    dataset = GPTImageEdit("raw")
    rejected = [record for record in dataset.read(f"t{suffix}", Path()) if not hasattr(record, "fields")]
    assert rejected


def test_an_archive_that_unpacks_to_absurdly_much_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MIN_UNPACKED", 2**20)
    write_tar(Path("raw/t.tar.gz"), {"t/metadata/all.json": bytes(2**26)}, "w:gz")
    (record,) = GPTImageEdit("raw").read("t.tar.gz", Path())
    assert "unpacks to more than" in record.name  # type: ignore[union-attr]
    assert Path("t.tar").stat().st_size < 2**25


# --- keys

NAMES = ["\u732b.png", "\u72ac.png", "a b.png", "a_b.png", "a(b).png", "a.b.png", "a-b.png", "caf\xe9.png", "caf.png",
         "!.png", "sub/a_b.png", "sub_a/b.png", "\U0001f63a.png", "__.png", "\u202ex.png"]  # fmt: skip


def test_names_that_a_key_can_t_hold_keep_their_samples_apart() -> None:
    for number, name in enumerate(NAMES):
        file = Path("raw", name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(number))
        file.with_suffix(".txt").write_text(f"caption {number}")
    counts, samples = convert_all(ImageFolder("raw"))
    assert counts.rejected == {}
    assert len(samples) == len({sample.key for sample in samples.values()}) == len(NAMES)
    for number in range(len(NAMES)):
        assert is_picture(samples[f"caption {number}"], number)


def test_names_that_are_no_unicode_are_kept_apart_and_can_be_printed() -> None:
    Path("raw").mkdir()
    for number, name in enumerate([b"caf\xe9.png", b"caf\xe8.png"]):
        with open(os.path.join(b"raw", name), "wb") as file:
            file.write(picture(number))
        with open(os.path.join(b"raw", name.replace(b"png", b"txt")), "wb") as file:
            file.write(f"caption {number}".encode())
    with open(b"raw/\xff\x1b[2J.png", "wb") as file:
        file.write(b"garbage")
    counts, samples = convert_all(ImageFolder("raw"))
    assert len(samples) == 2
    (named,) = counts.named["no caption"]
    assert named.isprintable()
    assert named.encode()


def test_a_tar_whose_name_is_no_unicode_is_converted_and_trained_on() -> None:
    write_tar(Path("x.tar"), {"a.png": picture(1), "a.txt": b"a cat"})
    os.makedirs(b"raw")
    os.rename(b"x.tar", b"raw/caf\xe9.tar")
    dataset = WebDatasetTars("raw", "x")
    for _ in range(2):  # the second time it is there already
        counts, samples = convert_all(dataset)
        assert counts.total == 1
        assert is_picture(samples["a cat"], 1)


# --- text that is none

BAD_TEXTS: dict[str, Any] = {
    "half a surrogate pair": "a \ud800 cat", "the other half": "\udfff", "a very long one": "x " * 50_000, "empty": " ",
    "a number": 3, "a list": ["a cat"], "null": None, "an object": {"a": "cat"},
}  # fmt: skip


@pytest.mark.parametrize("check_images", [True, False])
@pytest.mark.parametrize("what", BAD_TEXTS)
def test_one_bad_text_is_one_rejected_sample(what: str, check_images: bool) -> None:
    root = Path("raw")
    root.mkdir()
    for i in (1, 2):
        (root / f"{i}.png").write_bytes(picture(i))
    rows = [{"text": text, "image": f"{i}.png"} for i, text in ((1, BAD_TEXTS[what]), (2, "good"))]
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shared = [{"input_prompt": row["text"], "output_image": row["image"]} for row in rows]
    (root / "text_to_image.json").write_text(json.dumps(shared))
    members = {}
    for i, row in enumerate(rows):
        members |= {f"{i}.png": picture(i), f"{i}.json": json.dumps({"caption": row["text"]}).encode()}
    write_tar(root / "a.tar", members)
    datasets: list[Dataset] = [Table(str(root / "rows.jsonl")), ShareGPT4oImage("raw"), WebDatasetTars("raw", "x")]
    for number, dataset in enumerate(datasets):
        options = ConversionOptions(val_samples=0, check_images=check_images)
        counts = convert(dataset, Path(f"out{number}"), options)
        assert (counts.read, counts.total) == (2, 1)
        assert [sample.text for sample in read_samples(f"out{number}")] == ["good"]


# --- state of a conversion that was stopped

STATES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda good: b"",
    "torn": lambda good: good[: len(good) // 2],
    "garbage": lambda good: os.urandom(200),
    "null": lambda good: b"null",
    "a list": lambda good: b"[]",
    "of another version": lambda good: json.dumps(json.loads(good).get("result", [])).encode(),
    "a number changed": lambda good: good.replace(b'"samples": 2', b'"samples": 3').replace(b"dataset", b"datosot"),
    "deep": lambda good: b"[" * 100_000,
}


@pytest.mark.parametrize("file", ["recipe.json", "unit-000000.json", "unit-000001.json"])
@pytest.mark.parametrize("state", STATES)
def test_a_stopped_conversion_goes_on_whatever_became_of_its_state(
    state: str, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for shard in range(3):
        members = {}
        for i in range(2):
            members |= {f"{shard}{i}.png": picture(shard * 10 + i), f"{shard}{i}.txt": f"{shard}{i}".encode()}
        write_tar(Path(f"raw/{shard}.tar"), members)
    dataset = WebDatasetTars("raw", "x")
    convert(dataset, Path("whole"), ALL)
    read = WebDatasetTars.read

    def fail(self: Any, unit: str, scratch: Path) -> Any:
        if unit == "2.tar":
            raise KeyboardInterrupt
        return read(self, unit, scratch)

    with monkeypatch.context() as patched:
        patched.setattr(WebDatasetTars, "read", fail)
        with pytest.raises(KeyboardInterrupt):
            convert(dataset, Path("out"), ALL)
    kept = Path("out", f".{NAME}", file)
    kept.write_bytes(STATES[state](kept.read_bytes()))
    if file == "recipe.json" and state in ("null", "a list", "of another version", "a number changed"):
        with pytest.raises(DataError, match="holds the beginning of other work"):
            convert(dataset, Path("out"), ALL)
        return
    convert(dataset, Path("out"), ALL)
    for made in sorted(Path("whole").iterdir()):
        assert Path("out", made.name).read_bytes() == made.read_bytes()


@pytest.mark.parametrize(
    "damage", [Path.unlink, lambda file: os.truncate(file, 100), lambda file: file.write_bytes(b"")]
)
def test_a_unit_whose_tar_is_gone_is_made_again(damage: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for shard in range(2):
        write_tar(Path(f"raw/{shard}.tar"), {f"{shard}.png": picture(shard), f"{shard}.txt": f"{shard}".encode()})
    dataset = WebDatasetTars("raw", "x")
    convert(dataset, Path("whole"), ALL)
    read = WebDatasetTars.read

    def fail(self: Any, unit: str, scratch: Path) -> Any:
        if unit == "1.tar":
            raise KeyboardInterrupt
        return read(self, unit, scratch)

    with monkeypatch.context() as patched:
        patched.setattr(WebDatasetTars, "read", fail)
        with pytest.raises(KeyboardInterrupt):
            convert(dataset, Path("out"), ALL)
    (tar,) = Path("out", f".{NAME}").glob("*.tar")
    damage(tar)
    convert(dataset, Path("out"), ALL)
    for made in sorted(Path("whole").iterdir()):
        assert Path("out", made.name).read_bytes() == made.read_bytes()
