"""Tars from elsewhere: whatever a header says, a sample reads as it was written or is refused, and the rest is read."""

import io
import os
import random
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep.shards.verification import examine_tar
from tbac.data.decoding import CorruptSampleError
from tbac.data.order import Draw
from tbac.data.shards import DataError
from tbac.data.tars import MAX_FIELD_BYTES, Member, TarIndex, TarReader, iterate_members
from tests.helpers.pictures import encode_image, make_noise_image
from tests.helpers.shards import make_reader

COUNT = 12
Samples = dict[str, dict[str, bytes]]
WRITTEN: Samples = {
    f"s{i:03d}": {"png": encode_image(make_noise_image(i, (8, 8)), "PNG"), "txt": f"caption {i}".encode()}
    for i in range(COUNT)
}


def write(file: Path, samples: Samples = WRITTEN, form: int = tarfile.PAX_FORMAT, prefix: str = "") -> None:
    with tarfile.open(file, "w", format=form) as tar:
        for key, fields in samples.items():
            for name, data in fields.items():
                add(tar, f"{prefix}{key}.{name}", data)


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", **fields: Any) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data))


def read_all(file: Path) -> tuple[Samples, TarIndex]:
    """Read every sample that isn't refused; a second one of a key would be lost without a word."""
    started = time.monotonic()
    reader = TarReader()
    index, found = reader.read_index(file), {}
    for number in range(len(index.samples)):
        try:
            fields = reader.read(file, number)
        except CorruptSampleError:
            continue
        key = fields.pop("__key__")
        assert key not in found
        assert fields.pop("__url__") == str(file)
        found[key] = fields
    reader.close()
    assert time.monotonic() - started < 5
    return found, index


def list_headers(file: Path) -> list[int]:
    """Places of all blocks that aren't bytes of a member, the end mark left out."""
    with tarfile.open(file) as tar:
        places = []
        for member in tar:
            places += range(member.offset, member.offset_data, 512)
    return places


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("prefix", ["", "d" * 60 + "/" + "e" * 60 + "/", "猫/"])
def test_a_flipped_bit_in_any_header_costs_its_neighbours_only(form: int, prefix: str) -> None:
    file, rng = Path("x.tar"), random.Random(f"{form}{prefix}")
    write(file, form=form, prefix=prefix)
    whole = file.read_bytes()
    expected = {f"{prefix}{key}": fields for key, fields in WRITTEN.items()}
    assert read_all(file)[0] == expected
    for place in list_headers(file):
        damaged = bytearray(whole)
        damaged[place + rng.randrange(512)] ^= 1 << rng.randrange(8)
        file.write_bytes(bytes(damaged))
        found, index = read_all(file)
        lost = len(expected) - sum(found.get(key) == fields for key, fields in expected.items())
        assert lost <= 2, place
        # What decodes is what was written, under whatever key; an altered field makes an incomplete sample.
        for fields in found.values():
            assert fields in WRITTEN.values() or set(fields) != {"png", "txt"}, place
        altered = any(set(fields) != {"png", "txt"} for fields in found.values()) or set(found) - set(expected)
        assert not lost or index.damage or altered, place


@pytest.mark.parametrize("hole", [512, 2048, 4096])
def test_a_hole_of_zeros_is_noticed_and_what_follows_is_read(hole: int) -> None:
    file = Path("x.tar")
    write(file)
    whole = file.read_bytes()
    with tarfile.open(file) as tar:
        headers = [member.offset for member in tar]
    for place in headers[1:-8]:
        file.write_bytes(whole[:place] + bytes(hole) + whole[place + hole :])
        found, index = read_all(file)
        assert index.damage
        assert found.items() <= WRITTEN.items()
        assert len(found) >= COUNT - 2 - hole // 1024


def test_tars_that_were_joined_are_both_read() -> None:
    write(Path("a.tar"), dict(list(WRITTEN.items())[:6]))
    write(Path("b.tar"), dict(list(WRITTEN.items())[6:]))
    Path("x.tar").write_bytes(Path("a.tar").read_bytes() + Path("b.tar").read_bytes())
    found, index = read_all(Path("x.tar"))
    assert index.damage  # nobody can tell this from a hole, so the samples beside it are doubted
    assert found.items() <= WRITTEN.items()
    assert len(found) == COUNT - 2


def make_header(size: bytes, kind: bytes, name: str = "s999.txt", **values: Any) -> bytes:
    """Make a header with a right checksum, whatever the bytes of its size."""
    info = tarfile.TarInfo(name)
    info.type = kind
    header = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = size
    for place, value in values.items():
        start = int(place.removeprefix("at"))
        header[start : start + len(value)] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


NEGATIVE, HUGE = b"\xff" * 11 + b"\0", b"\x80\0\0\0\x7f" + b"\xff" * 7
SMALL = b"%011o\0" % 512


def pad(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def make_pax(text: bytes) -> bytes:
    return make_header(b"%011o\0" % len(text), tarfile.XHDTYPE) + pad(text)


HOSTILE: dict[str, bytes] = {
    "a negative size": make_header(NEGATIVE, b"0"),
    "a negative size of a long name": make_header(NEGATIVE, b"L"),
    "a negative size of an extended header": make_header(NEGATIVE, b"x"),
    "a negative size of a header for all": make_header(NEGATIVE, b"g"),
    "a huge size of a long name": make_header(HUGE, b"L"),
    "a huge size of an extended header": make_header(HUGE, b"x"),
    "a size that is no number": make_header(b"9 x 8 abc  \0", b"0"),
    "a negative size in an extended header": make_pax(b"12 size=-99\n") + make_header(SMALL, b"0") + bytes(512),
    "a record of no length": make_pax(b"0 path=x\n"),
    "a record of a negative length": make_pax(b"-9 path=x\n"),
    "a record that is longer than its header": make_pax(b"999 path=x\n"),
    "a record without a value": make_pax(b"9 pathxxx\n"),
    "garbage in an extended header": make_pax(os.urandom(100)),
    "a thousand long names in a row": (make_header(SMALL, b"L") + pad(b"x" * 512)) * 1000,
    "a thousand extended headers in a row": make_pax(b"10 path=x\n") * 1000,
    "a sparse file": make_header(b"%011o\0" % 0, b"S"),
    "a sparse file whose map has no end": make_header(b"%011o\0" % 0, b"S", at482=b"\1") + b"\1" * 512 * 3,
    "a sparse file of the newer form, without a map": make_pax(
        b"22 GNU.sparse.major=1\n" + b"22 GNU.sparse.minor=0\n" + b"29 GNU.sparse.realsize=99999\n")
        + make_header(SMALL, b"0") + bytes(512),
    "a device": make_header(b"%011o\0" % 0, tarfile.CHRTYPE),
    "a pipe": make_header(b"%011o\0" % 0, tarfile.FIFOTYPE),
    "a kind that nobody knows": make_header(SMALL, b"Q") + b"q" * 512,
    "a name of 100,000 bytes": make_pax(b"100013 path=" + b"x" * 100_000 + b"\n")
        + make_header(SMALL, b"0") + bytes(512),
    "a name that only looks like a number": make_header(SMALL, b"0", "9.9") + bytes(512),
    "a field of our own": make_header(SMALL, b"0", "s999.__key__") + b"x" * 512,
    "garbage": os.urandom(2048),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
@pytest.mark.parametrize("where", [0, 5, COUNT])
def test_a_hostile_header_neither_hangs_nor_costs_more_than_its_neighbours(what: str, where: int) -> None:
    file, samples = Path("x.tar"), list(WRITTEN.items())
    write(Path("a.tar"), dict(samples[:where]), tarfile.USTAR_FORMAT)
    write(Path("b.tar"), dict(samples[where:]), tarfile.USTAR_FORMAT)
    before, after = (Path(name).read_bytes() for name in ("a.tar", "b.tar"))
    with tarfile.open("a.tar") as tar:
        tar.getmembers()
        end = tar.offset if where else 0
    file.write_bytes(before[: end - end % 512] + HOSTILE[what] + after)
    found, _ = read_all(file)
    kept = {key: fields for key, fields in found.items() if key in WRITTEN}
    assert kept.items() <= WRITTEN.items()
    assert len(kept) >= COUNT - 2
    facts = examine_tar(file, None, len)
    assert facts.good == len(kept)


@pytest.mark.parametrize("size", [MAX_FIELD_BYTES + 1, 2**33])
def test_a_field_that_is_too_large_is_refused_unread(size: int) -> None:
    file = Path("x.tar")
    write(file, dict(list(WRITTEN.items())[:2]))
    with tarfile.open(file, "a") as tar:
        add(tar, "big.txt", b"a caption")
        start = tar.fileobj.tell() if tar.fileobj else 0
    header = make_header(b"\x80" + size.to_bytes(11, "big"), b"0", "big.png")
    with file.open("r+b") as opened:  # a hole in the file, which takes no room on the disk
        opened.seek(start)
        opened.write(header)
        opened.truncate(start + 512 + -(-size // 512) * 512 + 1024)
    found, index = read_all(file)
    assert index.refused == {"a field that is too large": 1}
    assert found["big"]["png"] == b""


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_of_tarfile(form: int) -> None:
    with tarfile.open("x.tar", "w", format=form) as tar:
        for number, name in enumerate(("a/b.txt", "x" * 90 + ".txt", "y" * 90 + "/" + "z" * 60 + ".c", "猫.png")):
            add(tar, name, b"q" * 700 * number)
        add(tar, "d/", type=tarfile.DIRTYPE)
        add(tar, "link", type=tarfile.SYMTYPE, linkname="w" * 90)
        if form != tarfile.USTAR_FORMAT:
            add(tar, "far", type=tarfile.SYMTYPE, linkname="w" * 190)
            add(tar, "hard", type=tarfile.LNKTYPE, linkname="v" * 200)
            add(tar, "n" * 300 + "/" + "m" * 300, b"long")
        add(tar, "last.txt", b"the last one")
    with tarfile.open("x.tar") as tar:
        expected = [(m.name, m.offset_data, m.size if m.isreg() else 0, m.isreg(), m.isdir()) for m in tar]
    with Path("x.tar").open("rb") as file:
        found = list(iterate_members(file, Path("x.tar").stat().st_size))
    assert [(m.name, m.offset, m.size, m.is_file, m.is_folder) for m in found if isinstance(m, Member)] == expected


# --- shards that change while they are read


def overwrite(file: Path, samples: Samples) -> None:
    """Write over a file in place, as `cp` does, with a time that differs."""
    write(Path("other.tar"), samples)
    with file.open("r+b") as opened:
        opened.truncate(0)
        opened.write(Path("other.tar").read_bytes())
    os.utime(file, ns=(1, 1))


def replace(file: Path, samples: Samples) -> None:
    write(Path("other.tar"), samples)
    os.replace("other.tar", file)


OTHER: Samples = {f"t{i:03d}": fields for i, fields in enumerate(WRITTEN.values())}


@pytest.mark.parametrize("change", [overwrite, replace])
@pytest.mark.parametrize("keep", [64, 1])
def test_a_shard_that_is_written_over_never_pairs_old_keys_with_new_bytes(
    change: Callable[[Path, Samples], None], keep: int
) -> None:
    folder = Path("shards")
    folder.mkdir()
    files = [folder / f"train-{i:06d}.tar" for i in range(2)]
    for file in files:
        write(file)
    from tbac.data.shards import Source

    reader = make_reader(Source(str(folder)))
    reader.tars.keep = keep
    assert reader.read_sample(Draw(0, 0, 0, 0, 3)).text == "caption 3"
    assert reader.read_sample(Draw(1, 0, 0, 1, 3)).text == "caption 3"
    change(files[0], OTHER)
    if change is replace and keep == 64:  # the file that is open has its old bytes
        assert reader.read_sample(Draw(2, 0, 0, 0, 4)).key == "s004"
        return
    with pytest.raises(DataError, match=r"train-000000\.tar was there when training began and was written over"):
        reader.read_sample(Draw(2, 0, 0, 0, 4))


def test_a_shard_that_is_touched_or_copied_anew_is_read_on() -> None:
    from tbac.data.shards import Source

    Path("shards").mkdir()
    file = Path("shards/train-000000.tar")
    write(file)
    reader = make_reader(Source("shards"))
    for number in range(COUNT):
        assert reader.read_sample(Draw(number, 0, 0, 0, number)).text == f"caption {number}"
        os.utime(file, ns=(number, number))
        if number % 4 == 2:
            overwrite(file, WRITTEN)
    assert reader.tally.bad == 0


def test_a_shard_that_is_cut_while_it_is_open_gives_no_cut_caption() -> None:
    from tbac.data.shards import Source

    Path("shards").mkdir()
    file = Path("shards/train-000000.tar")
    long = {f"s{i}": {"txt": b"a caption of many words " * 40, "png": WRITTEN["s001"]["png"]} for i in range(3)}
    write(file, long)
    reader = make_reader(Source("shards"))
    assert reader.read_sample(Draw(0, 0, 0, 0, 0)).text.endswith("words")
    offset, size = reader.tars.read_index(file).samples[2][1]["txt"]
    os.truncate(file, offset + size // 2)
    with pytest.raises(DataError, match="was written over"):
        reader.read_sample(Draw(1, 0, 0, 0, 2))


@pytest.mark.parametrize("make", [os.mkfifo, lambda file: os.symlink("/dev/zero", file), os.mkdir])
def test_what_is_no_file_is_never_waited_for(make: Callable[[Path], Any]) -> None:
    make(Path("x.tar"))
    with pytest.raises(OSError, match=r"isn't a regular file|Is a directory"):
        TarIndex(Path("x.tar"))
