"""Fuzzing of everything that parses bytes from elsewhere: each input ends in what was written, or in a named rejection.

Every input is made of a good file by a few changes that follow from a seed. No input may take ten seconds or a
gigabyte, open a file outside of its folder, or start a program.
"""

import hashlib
import io
import json
import os
import random
import resource
import shutil
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save as save_safetensors

from data_prep.datasets.gpt_image_edit import GPTImageEdit
from data_prep.datasets.rows import BrokenRow, read_rows
from data_prep.datasets.table import Table
from data_prep.shards.conversion import NAME, ConversionOptions, convert
from data_prep.shards.verification import examine_tar, verify
from data_prep.shards.writer import write_shards
from tbac.data.buckets import load_target_sizes, name_sizes_file, read_sizes, write_sizes
from tbac.data.decoding import CorruptSampleError, decode_latents, decode_sample
from tbac.data.shards import DataError, Source, SourceShards, parse_manifest
from tbac.data.tars import TarReader
from tbac.files import read_prompts
from tbac.pictures import PictureError, decode_picture
from tests.helpers.pictures import encode_image, make_noise_image, make_orientation_exif

Bytes = bytes | bytearray
PICTURES = [encode_image(make_noise_image(i, (16, 12)), "PNG") for i in range(6)]
ROWS = [{"text": f"caption {i} caf\xe9", "image": f"{i}.png"} for i in range(6)]
INTERESTING = [
    b"\0", b"\xff", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"-1", b"9" * 30, b"1e999", b"NaN",
    b"null", b"\xed\xa0\x80", b"\\ud800", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\r\n", b"\0" * 512, b"../../", b'"',
    b"/etc/passwd", b"[" * 500, b'{"a":' * 300, b",", b"}", b"]", b"-", b"0", b"{}", b"[]", b"true", b"\x1f\x8b", b"PK",
]  # fmt: skip
SIZES = (b"\xff" * 12, b"\x80" + b"\x7f" * 11, b"77777777777\0", b"-0000000001\0", bytes(12))
KINDS = (b"0", b"1", b"2", b"3", b"5", b"6", b"7", b"g", b"x", b"L", b"K", b"S", b"X", b"Z")
NAMES = (b"../../trap.txt\0", b"/tmp/trap.txt\0", b"a.__key__\0", b".png\0", b"x\0")


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Change a file in one to four places."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        place, length = rng.randrange(len(changed) + 1), rng.choice((1, 2, 4, 8, 64, 512))
        kind = rng.randrange(9)
        if kind == 0 and changed:
            changed[place % len(changed)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del changed[place:]
        elif kind == 2:
            del changed[place : place + length]
        elif kind == 3:
            changed[place:place] = rng.randbytes(length)
        elif kind == 4:
            changed[place : place + length] = rng.randbytes(length)
        elif kind == 5:
            changed[place : place + length] = bytes(length)
        elif kind == 6:
            changed[place:place] = rng.choice(INTERESTING)
        elif kind == 7:
            new = rng.choice(INTERESTING)
            changed[place : place + len(new)] = new
        else:
            other = rng.randrange(len(changed) + 1)
            changed[place:place] = changed[other : other + length]
    return bytes(changed)


# --- what is parsed: how a good file is made, and what must hold of a changed one


def make_tar() -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for i, picture in enumerate(PICTURES):
            for name, data in ((f"caf\xe9{i}.png", picture), (f"caf\xe9{i}.txt", ROWS[i]["text"].encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return content.getvalue()


def mutate_header(data: bytes, rng: random.Random, right: bool = False) -> bytes:
    """Change headers of a tar; their checksums are made `right` again if that is asked for."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        places = [place for member in tar for place in range(member.offset, member.offset_data, 512)]
    changed = bytearray(data)
    for place in rng.sample(places, rng.choice((1, 1, 2))):
        header, kind = bytearray(changed[place : place + 512]), rng.randrange(5)
        if kind == 0:
            header[rng.randrange(512)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            header[124:136] = rng.choice(SIZES)
        elif kind == 2:
            header[156:157] = rng.choice(KINDS)
        elif kind == 3:
            start = rng.randrange(500)
            header[start : start + 8] = rng.randbytes(8)
        else:
            name = rng.choice(NAMES)
            header[: len(name)] = name
        if right:
            header[148:156] = b" " * 8
            header[148:156] = b"%06o\0 " % sum(header)
        changed[place : place + 512] = header
    return bytes(changed)


def check_pairs(file: Path) -> None:
    """What decodes is a caption with its own picture."""
    reader, texts = TarReader(), [row["text"] for row in ROWS]
    for number in range(len(reader.read_index(file).samples)):
        try:
            sample = decode_sample(reader.read(file, number))
        except CorruptSampleError:
            continue
        assert sample.target is not None
        assert sample.target.tobytes() == make_noise_image(texts.index(sample.text), (16, 12)).tobytes()
    reader.close()


def check_shards(file: Path) -> None:
    """The manifest names what isn't as it was, and all tools get along with it."""
    good = make_tar()
    entry = {"samples": 6, "bytes": len(good), "sha256": hashlib.sha256(good).hexdigest()}
    Path("manifest.json").write_text(json.dumps({"schema_version": 1, "shards": {file.name: entry}}))
    facts = verify(Path(), None, 1)
    assert facts.faults or file.read_bytes() == good
    assert facts.good <= facts.samples
    Path("manifest.json").unlink()
    examine_tar(file, None, len)
    with suppress(DataError):
        SourceShards(Source("."))
    load_target_sizes(file)


def check_manifest(file: Path) -> None:
    try:
        manifest = parse_manifest(file.read_bytes(), file)
    except DataError as error:
        check_message(error, file.name)
        return
    for entry in manifest["shards"].values():
        assert type(entry["samples"]) is type(entry["bytes"]) is int
        assert 0 <= entry["samples"] <= entry["bytes"]


def check_message(error: Exception, name: str) -> None:
    text = str(error)
    assert name in text, text
    assert "\n" not in text, text
    assert len(text) < 600, text


def check_picture(file: Path) -> None:
    try:
        picture = decode_picture(file.read_bytes(), "x")
    except PictureError:
        return
    assert picture.mode == "RGB"
    np.asarray(picture)


def check_latents(file: Path) -> None:
    try:
        latents = decode_latents(file.read_bytes())
    except CorruptSampleError:
        return
    assert latents.ndim == 3
    assert latents.isfinite().all()
    assert latents.dtype == torch.float32


def check_table(file: Path) -> None:
    """Rows are rows or named, and a conversion counts each of them."""
    try:
        for row in read_rows(file):
            assert isinstance(row, BrokenRow | dict)
    except DataError as error:
        check_message(error, file.name)
    for number, picture in enumerate(PICTURES):
        Path(f"{number}.png").write_bytes(picture)
    try:
        counts = convert(Table(str(file)), Path("out"), ConversionOptions(val_samples=0))
    except DataError:
        return
    assert counts.read == counts.total + sum(counts.rejected.values())
    reader = TarReader()
    for tar in SourceShards(Source("out")).tars:
        for number in range(len(reader.read_index(tar).samples)):
            sample = decode_sample(reader.read(tar, number))
            assert sample.target is not None
            assert any(sample.target.tobytes() == make_noise_image(i, (16, 12)).tobytes() for i in range(6))
    reader.close()


def check_prompts(file: Path) -> None:
    try:
        prompts = read_prompts(file.name, "prompt_file")
    except ValueError as error:
        check_message(error, file.name)
        return
    assert prompts
    for prompt in prompts:
        prompt.encode()


def make_sizes() -> bytes:
    write_sizes_shard()
    write_sizes(Path("s/train-000000.tar"))
    return name_sizes_file(Path("s/train-000000.tar")).read_bytes()


def write_sizes_shard() -> None:
    samples = [(f"s{i}", {"png": picture, "txt": "x"}) for i, picture in enumerate(PICTURES)]
    write_shards(Path("s"), "train", samples, 10)


def check_sizes(file: Path) -> None:
    write_sizes_shard()
    tar = Path("s/train-000000.tar")
    shutil.copy(file, name_sizes_file(tar))
    assert np.array_equal(load_target_sizes(tar), read_sizes(tar))


def make_archive(mode: str) -> bytes:
    rows = [{"input": f"t/in/{i}.png", "output": f"t/out/{i}.png", "instruction": f"{i}"} for i in range(3)]
    members = {"t/metadata/all.json": json.dumps(rows).encode()}
    members |= {f"t/{side}/{i}.png": PICTURES[i] for side in ("in", "out") for i in range(3)}
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode=mode) as tar:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return content.getvalue()


def check_archive(file: Path) -> None:
    Path("scratch").mkdir()
    for record in GPTImageEdit(".").read(file.name, Path("scratch")):
        if hasattr(record, "fields"):
            raw = {"__key__": "k", **record.fields}
            try:
                sample = decode_sample(raw)
            except CorruptSampleError:
                continue
            assert sample.target is not None
            assert any(sample.target.tobytes() == make_noise_image(i, (16, 12)).tobytes() for i in range(3))


STOPPED: dict[str, bytes] = {}


def make_state() -> bytes:
    """State of a conversion that was stopped after its first part."""
    csv = "text,image\n" + "".join(f"{row['text']},{row['image']}\n" for row in ROWS)
    write_table_folder(csv)
    dataset = Table("raw")
    real = type(dataset).read

    def fail(self: Table, unit: str, scratch: Path) -> Iterator[Any]:
        if unit == "1":
            raise KeyboardInterrupt
        return real(self, unit, scratch)

    convert(dataset, Path("whole"), ConversionOptions(val_samples=0))
    STOPPED["whole"] = Path("whole/train-000000.tar").read_bytes()
    type(dataset).read = fail  # type: ignore[method-assign]
    with suppress(KeyboardInterrupt):
        convert(dataset, Path("cut"), ConversionOptions(val_samples=0))
    type(dataset).read = real  # type: ignore[method-assign]
    STOPPED.update({file.name: file.read_bytes() for file in Path("cut", f".{NAME}").iterdir() if file.is_file()})
    return STOPPED["unit-000000.json"]


def write_table_folder(csv: str) -> None:
    Path("raw").mkdir()
    for name in ("a.csv", "b.csv"):
        Path("raw", name).write_text(csv)
    for number, picture in enumerate(PICTURES):
        Path(f"raw/{number}.png").write_bytes(picture)


def check_state(file: Path) -> None:
    csv = "text,image\n" + "".join(f"{row['text']},{row['image']}\n" for row in ROWS)
    write_table_folder(csv)
    folder = Path("cut", f".{NAME}")
    folder.mkdir(parents=True)
    for name, content in STOPPED.items():
        if name != "whole":
            (folder / name).write_bytes(content)
    shutil.copy(file, folder / "unit-000000.json")
    convert(Table("raw"), Path("cut"), ConversionOptions(val_samples=0))
    assert Path("cut/train-000000.tar").read_bytes() == STOPPED["whole"]


def check_list(file: Path) -> None:
    try:
        assert all(isinstance(row, BrokenRow | dict) for row in read_rows(file))
    except DataError as error:
        check_message(error, file.name)


def make_csv() -> bytes:
    return ("text,image\r\n" + "".join(f'"{row["text"]}",{row["image"]}\r\n' for row in ROWS)).encode()


def make_parquet() -> bytes:
    content = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), content, row_group_size=2)
    return content.getvalue()


def make_arrow() -> bytes:
    content, table = io.BytesIO(), pa.Table.from_pylist(ROWS)
    with pa.ipc.new_stream(content, table.schema) as out:
        out.write_table(table)
    return content.getvalue()


def make_manifest() -> bytes:
    entries = {f"train-{i:06d}.tar": {"samples": i, "bytes": 10240 * (i + 1), "sha256": "0" * 64} for i in range(3)}
    facts = {"image_size": 24, "buckets": [[24, 24], [16, 32]], "autoencoder_digest": "0" * 64}
    return json.dumps({"schema_version": 1, "shards": entries, **facts}, indent=1).encode()


def make_photo(kind: str) -> bytes:
    image = make_noise_image(3, (64, 48)).resize((32, 24), Image.Resampling.BICUBIC)
    if kind == "PNG":
        image = image.convert("RGBA").quantize(32)
    return encode_image(image, kind, exif=make_orientation_exif(6))


def make_latents() -> bytes:
    return save_safetensors({"latents": torch.ones(4, 3, 3)})


PROMPTS = "a cat\n\xe9\u2028x\r\na dog\n".encode()
PARSERS: dict[str, tuple[str, int, Callable[[], bytes], Callable[[Path], None], Callable[..., bytes]]] = {
    "damaged headers": ("train-000000.tar", 400, make_tar, check_pairs, mutate_header),
    "hostile headers": ("train-000000.tar", 200, make_tar, check_shards, partial(mutate_header, right=True)),
    "tar": ("train-000000.tar", 150, make_tar, check_shards, mutate),
    "manifest": ("manifest.json", 250, make_manifest, check_manifest, mutate),
    "JPEG": ("x.jpg", 150, lambda: make_photo("JPEG"), check_picture, mutate),
    "PNG": ("x.png", 150, lambda: make_photo("PNG"), check_picture, mutate),
    "WebP": ("x.webp", 150, lambda: make_photo("WEBP"), check_picture, mutate),
    "latents": ("x.safetensors", 200, make_latents, check_latents, mutate),
    "CSV": ("x.csv", 120, make_csv, check_table, mutate),
    "JSON lines": ("x.jsonl", 120, lambda: b"\n".join(json.dumps(r).encode() for r in ROWS), check_table, mutate),
    "JSON list": ("x.json", 100, lambda: json.dumps(ROWS).encode(), check_list, mutate),
    "Parquet": ("x.parquet", 150, make_parquet, check_table, mutate),
    "Arrow": ("x.arrow", 100, make_arrow, check_table, mutate),
    "prompts": ("x.txt", 100, lambda: PROMPTS, check_prompts, mutate),
    "prompts in JSON": ("x.jsonl", 150, lambda: b'{"prompt": "a cat"}\n{"prompt": "x"}', check_prompts, mutate),
    "sizes": ("x.npz", 100, make_sizes, check_sizes, mutate),
    "archive": ("t.tar", 80, lambda: make_archive("w"), check_archive, mutate),
    "packed archive": ("t.tar.gz", 80, lambda: make_archive("w:gz"), check_archive, mutate),
    "state of a conversion": ("x.json", 80, make_state, check_state, mutate),
}  # fmt: skip


# --- watching

WATCHED: dict[str, Any] = {"folder": None, "seen": []}


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Note each file that is opened outside of the folder of the test, and each program that is started."""
    if WATCHED["folder"] is None:
        return
    if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect"):
        WATCHED["seen"].append(f"{event} {arguments[0]}")
    if event == "open" and isinstance(arguments[0], str | bytes):
        path = os.path.realpath(os.fsdecode(arguments[0]))
        allowed = (WATCHED["folder"], sys.prefix, sys.base_prefix, str(Path(__file__).parents[2]), "/proc/self")
        if not path.startswith(allowed) and path != "/dev/null":
            WATCHED["seen"].append(f"open {path}")


@contextmanager
def watching(folder: Path) -> Iterator[list[str]]:
    if not WATCHED.get("hooked"):
        sys.addaudithook(watch)
        WATCHED["hooked"] = True
    WATCHED.update(folder=str(folder.resolve()), seen=[])
    try:
        yield WATCHED["seen"]
    finally:
        WATCHED["folder"] = None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("parser", PARSERS)
def test_every_input_ends_in_what_was_written_or_in_a_named_rejection(
    parser: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, count, make, check, change = PARSERS[parser]
    (tmp_path / "made").mkdir()
    monkeypatch.chdir(tmp_path / "made")
    good = make()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(-1, count):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        monkeypatch.chdir(folder)
        data = good if number < 0 else change(good, random.Random(f"{parser}/{number}"))
        Path(name).write_bytes(data)
        started = time.monotonic()
        with watching(folder) as seen:
            try:
                check(Path(name))
            except Exception as error:
                raise AssertionError(f"input {number} of {parser}: {data[:200]!r}") from error
        assert time.monotonic() - started < 10, number
        assert seen == [], number
        shutil.rmtree(folder, ignore_errors=True)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 2**20  # in KiB


def test_there_are_enough_inputs() -> None:
    assert sum(count for _, count, *_ in PARSERS.values()) >= 2500


def test_what_happens_outside_of_the_folder_is_seen(tmp_path: Path) -> None:
    outside = tmp_path.parent / "outside.txt"
    outside.write_text("x")
    inside = tmp_path / "inside.txt"
    inside.symlink_to(outside)
    with watching(tmp_path) as seen:
        outside.read_text()
        os.close(os.open(inside, os.O_RDONLY))
        os.system("true")
    assert [entry.split()[0] for entry in seen] == ["open", "open", "os.system"]
