"""One bad sample is one bad sample: training replaces it, verify names it, convert and caching leave it out."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save as save_safetensors

from data_prep.datasets.webdataset_tars import WebDatasetTars
from data_prep.shards.conversion import ConversionOptions, convert
from data_prep.shards.latents import CachingOptions, cache_latents
from data_prep.shards.verification import verify
from data_prep.shards.writer import write_shards
from tbac.data.collation import Collator
from tbac.data.datamodule import ShardDataModule
from tbac.data.order import BatchPlan, Draw
from tbac.data.reader import ShardReader
from tbac.data.shards import Source, SourceShards
from tests.helpers.pictures import encode_image, make_noise_image, make_png_of_size

PICTURE = encode_image(make_noise_image(1, (24, 24)), "PNG")
LATENTS = torch.randn(4, 3, 3, generator=torch.Generator().manual_seed(0))
FORM = (4, 8)  # channels, pixels a side


def pack(latents: torch.Tensor, name: str = "latents") -> bytes:
    return save_safetensors({name: latents.contiguous()})


def change_header(**entry: Any) -> bytes:
    """Latents whose header says something else of them."""
    packed = pack(LATENTS)
    length = int.from_bytes(packed[:8], "little")
    header = json.loads(packed[8 : 8 + length])
    header["latents"] |= entry
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + packed[8 + length :]


TEXTS: dict[str, dict[str, bytes]] = {
    "half a surrogate pair": {"json": b'{"caption": "a \\ud800 cat"}'},
    "the other half": {"json": b'{"instruction": "\\udc00"}'},
    "half a pair in another field": {"json": b'{"caption": "x", "y": "\\udead"}'},
    "bytes that are no Unicode": {"txt": b"caf\xe9"},
    "an encoded surrogate": {"txt": b"a \xed\xa0\x80 cat"},
    "UTF-16": {"txt": "a cat".encode("utf-16")},
    "half a character": {"txt": "a caf\xe9".encode()[:-1]},
    "a number of 5000 digits": {"json": b'{"caption": ' + b"9" * 5000 + b"}"},
    "another field of 5000 digits": {"json": b'{"caption": "x", "n": ' + b"9" * 5000 + b"}"},
    "nested without end": {"json": b'{"caption": ' + b"[" * 100_000},
    "objects without end": {"json": b'{"caption":' * 20_000},
    "a megabyte": {"txt": b"x" * 2**20},
    "many words": {"txt": b"word " * 50_000},
    "a list": {"json": b'["a cat"]'},
    "a caption that is a list": {"json": b'{"caption": ["a cat"]}'},
    "a caption that is null": {"json": b'{"caption": null}'},
    "a caption that is a number": {"json": b'{"caption": 1e400}'},
    "nothing": {"json": b""},
    "torn": {"json": b'{"caption": "a ca'},
    "space": {"txt": b" \r\n\t"},
    "a mark alone": {"txt": b"\xef\xbb\xbf"},
}
PICTURES: dict[str, dict[str, bytes]] = {
    "a bomb": {"png": make_png_of_size(60_000, 60_000)},
    "a sliver": {"png": make_png_of_size(8, 9000)},
    "a source that can't be named": {"sourcepng": b"x", "source_x.png": PICTURE},
    "a source without a target": {"source.png": PICTURE},
    "a source that is torn": {"source.png": PICTURE[:100], "target.png": PICTURE},
    "a target without a source": {"target.png": PICTURE},
}
CACHED: dict[str, bytes] = {
    "another number of channels": pack(torch.zeros(5, 3, 3)),
    "another height": pack(torch.zeros(4, 1, 3)),
    "another size": pack(torch.zeros(4, 12, 12)),
    "four axes": pack(torch.zeros(1, 4, 3, 3)),
    "one axis": pack(torch.zeros(36)),
    "no element": pack(torch.zeros(4, 0, 3)),
    "whole numbers": pack(torch.zeros(4, 3, 3, dtype=torch.int64)),
    "bytes": pack(torch.zeros(4, 3, 3, dtype=torch.uint8)),
    "truth values": pack(torch.zeros(4, 3, 3, dtype=torch.bool)),
    "numbers of 8 bits": pack(torch.zeros(4, 3, 3).to(torch.float8_e4m3fn)),
    "NaN": pack(torch.full((4, 3, 3), float("nan"))),
    "one NaN": pack(torch.where(torch.arange(36).reshape(4, 3, 3) == 7, torch.nan, LATENTS)),
    "infinity": pack(LATENTS / 0),
    "as large as float32 goes": pack(LATENTS * 1e38),
    "a hundred thousand": pack(LATENTS * 1e5),
    "another name": pack(LATENTS, "latent"),
    "empty": b"",
    "garbage": b"garbage" * 20,
    "a header of an exabyte": b"\xff" * 8 + pack(LATENTS)[8:],
    "torn": pack(LATENTS)[:-8],
    "a shape that says more": change_header(shape=[4, 3000, 3000]),
    "a type that doesn't exist": change_header(dtype="F99"),
    "offsets that lead out": change_header(data_offsets=[0, 10**12]),
    "negative offsets": change_header(data_offsets=[-8, 136]),
    "a shape of text": change_header(shape=["4", "3", "3"]),
}


def write(bad: dict[str, Any], latents: bool) -> None:
    """Twelve samples, of which the fifth is bad."""
    usual: dict[str, Any] = {"txt": b"a cat"} | ({"latent.safetensors": pack(LATENTS)} if latents else {"png": PICTURE})
    samples = []
    for i in range(12):
        fields = {**usual, "txt": f"caption {i}".encode()}
        samples.append((f"s{i:02d}", bad if i == 5 else fields))
    write_shards(Path("shards"), "train", samples, 6)


def train() -> tuple[list[str], ShardReader]:
    """Read all samples in batches of four, as training does, three times over."""
    shards = SourceShards(Source("shards"))
    collator = Collator(lambda texts, images, **_: {"texts": [text.encode() for text in texts]})
    reader = ShardReader(
        [shards.tars], [shards.samples], seed=0, collate=collator, size=(24, 24), max_bad_share=0.5, latent_form=FORM
    )
    texts = []
    for first in range(0, 36, 4):
        draws = [Draw(n, 0, n // 12, n % 12 // 6, n % 6) for n in range(first, first + 4)]
        texts += reader[BatchPlan(draws, {})].texts
    return texts, reader


def check(bad: dict[str, Any], latents: bool) -> None:
    write(bad, latents)
    texts, reader = train()
    assert len(texts) == 36
    assert set(texts) <= {f"caption {i}" for i in range(12) if i != 5}
    assert reader.tally.bad == sum(reader.tally.kinds.values()) >= 3
    facts = verify(Path("shards"), None, 1)
    assert (facts.samples, facts.faults.total()) == (12, 1), facts.faults
    (named,) = facts.named.values()
    assert named[0].startswith("train-000000.tar: s05")
    assert named[0].isprintable()


@pytest.mark.parametrize("what", TEXTS)
@pytest.mark.parametrize("latents", [False, True])
def test_a_bad_text(what: str, latents: bool) -> None:
    rest = {"latent.safetensors": pack(LATENTS)} if latents else {"png": PICTURE}
    check({**rest, **TEXTS[what]}, latents)


@pytest.mark.parametrize("what", PICTURES)
def test_a_bad_picture(what: str) -> None:
    check({"txt": b"bad", **PICTURES[what]}, latents=False)


@pytest.mark.parametrize("what", CACHED)
def test_bad_latents(what: str) -> None:
    check({"txt": b"bad", "latent.safetensors": CACHED[what]}, latents=True)


@pytest.mark.parametrize("what", [*TEXTS, *PICTURES])
def test_convert_rejects_it(what: str) -> None:
    bad = {"png": PICTURE, **TEXTS[what]} if what in TEXTS else {"txt": b"bad", **PICTURES[what]}
    write(bad, latents=False)
    counts = convert(WebDatasetTars("shards", "x"), Path("out"), ConversionOptions(val_samples=0))
    assert (counts.read, counts.total, sum(counts.rejected.values())) == (12, 11, 1)
    assert verify(Path("out"), None, 1).faults.total() == 0


class Encoder:
    """Stands for the autoencoder: latents of the mean colour of each square."""

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(pixels.float() / 127.5 - 1, 8)


@pytest.mark.parametrize("what", [*TEXTS, *PICTURES])
def test_caching_leaves_it_out(what: str) -> None:
    bad = {"png": PICTURE, **TEXTS[what]} if what in TEXTS else {"txt": b"bad", **PICTURES[what]}
    write(bad, latents=False)
    cache_latents(Path("shards"), Path("out"), Encoder(), "0" * 64, CachingOptions(24))  # type: ignore[arg-type]
    assert json.loads(Path("out/manifest.json").read_text())["left_out"] == 1
    facts = verify(Path("out"), None, 1)
    assert (facts.samples, facts.cached, facts.faults.total()) == (11, 11, 0)


def test_keys_with_folders_are_cached_under_keys_of_their_own() -> None:
    Path("shards").mkdir()
    with tarfile.open("shards/train-000000.tar", "w") as tar:
        for key in ("a/b", "a_b", "c"):
            for name, data in (("png", PICTURE), ("txt", key.encode())):
                info = tarfile.TarInfo(f"{key}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    cache_latents(Path("shards"), Path("out"), Encoder(), "0" * 64, CachingOptions(24))  # type: ignore[arg-type]
    facts = verify(Path("out"), None, 1)
    assert (facts.samples, facts.faults.total()) == (3, 0)


@pytest.mark.parametrize("form", [FORM, None])
def test_the_data_module_hands_the_shape_on(form: tuple[int, int] | None) -> None:
    write({"txt": b"bad", "latent.safetensors": pack(torch.zeros(4, 1, 3))}, latents=True)
    data = ShardDataModule([{"path": "shards"}], [], batch_size=4, image_size=24, max_bad_share=0.5)
    data.bind(lambda texts, images, **_: {"texts": texts}, None, 1, form)
    batches = iter(data.train_dataloader())
    if form is None:  # nobody has said what is right, so a batch that can't be joined ends it
        with pytest.raises(ValueError, match=r"latents of the shapes"):
            [next(batches) for _ in range(6)]
        return
    assert all(next(batches).latents.shape == (4, 4, 3, 3) for _ in range(9))
