"""A thousand damaged samples of many kinds among ten thousand good ones."""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save as save_safetensors

from data_prep.shards.verification import Facts, examine_tar
from tbac.data.order import Draw
from tbac.data.reader import ShardReader
from tests.helpers.pictures import FRAMES, encode_image, make_noise_image, make_png_of_size

PICTURE, SHARDS = encode_image(make_noise_image(1, (16, 16)), "PNG"), 11
LATENTS = torch.zeros(2, 2, 2)
DAMAGED: list[tuple[str, dict[str, bytes]]] = [
    ("unreadable image", {"jpg": b"\xff\xd8 not a jpeg", "txt": b"x"}),
    ("unreadable image", {"jpg": encode_image(make_noise_image(2), "JPEG")[:200], "txt": b"x"}),
    ("unreadable image", {"png": PICTURE[:-40], "txt": b"x"}),
    ("unreadable image", {"png": b"", "txt": b"x"}),
    ("unreadable image", {"png": encode_image(make_noise_image(2), "GIF"), "txt": b"x"}),
    ("unreadable image", {"jpg": encode_image(make_noise_image(2), "BMP"), "txt": b"x"}),
    ("unreadable image", {"webp": encode_image(make_noise_image(2), "TIFF"), "txt": b"x"}),
    ("unreadable image", {"png": b"<svg/>", "txt": b"x"}),
    ("unreadable image", {"png": make_png_of_size(64, 64), "txt": b"x"}),
    ("animated image", {"webp": encode_image(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]), "txt": b"x"}),
    ("animated image", {"png": encode_image(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]), "txt": b"x"}),
    ("absurd size", {"png": make_png_of_size(9000, 9000), "txt": b"x"}),
    ("absurd size", {"png": make_png_of_size(9000, 9), "txt": b"x"}),
    ("absurd size", {"png": encode_image(make_noise_image(2, (3, 3)), "PNG"), "txt": b"x"}),
    ("no target image", {"txt": b"x"}),
    ("no target image", {"source.png": PICTURE, "json": json.dumps({"instruction": "x"}).encode()}),
    ("no source image", {"target.png": PICTURE, "json": json.dumps({"instruction": "x"}).encode()}),
    ("unreadable image", {"source.png": PICTURE[:-40], "target.png": PICTURE, "txt": b"x"}),
    ("no caption", {"png": PICTURE}),
    ("no caption", {"png": PICTURE, "txt": b" \n"}),
    ("no caption", {"png": PICTURE, "json": b"{}"}),
    ("no caption", {"png": PICTURE, "json": b'{"caption": 3}'}),
    ("unreadable text", {"png": PICTURE, "txt": b"caf\xe9"}),
    ("unreadable text", {"png": PICTURE, "json": b"{"}),
    ("unreadable text", {"png": PICTURE, "json": b"[" * 50_000}),
    ("unreadable latents", {"latent.safetensors": b"garbage", "txt": b"x"}),
    ("unreadable latents", {"latent.safetensors": save_safetensors({"other": LATENTS}), "txt": b"x"}),
    ("unreadable latents", {"latent.safetensors": save_safetensors({"latents": LATENTS / 0}), "txt": b"x"}),
    ("unreadable latents", {"latent.safetensors": save_safetensors({"latents": LATENTS[0]}), "txt": b"x"}),
]


def write(folder: Path, good: int, damaged: int) -> Counter[str]:
    """Tars in which every so many samples is damaged; returns how many of each kind."""
    kinds: Counter[str] = Counter()
    each, every = (good + damaged) // SHARDS, (good + damaged) // damaged
    number = 0
    for shard in range(SHARDS):
        with tarfile.open(folder / f"train-{shard:06d}.tar", "w") as tar:
            for _ in range(each):
                fields = {"png": PICTURE, "txt": f"good {number}".encode()}
                if number % every == 0:
                    kind, fields = DAMAGED[(number // every) % len(DAMAGED)]
                    kinds[kind] += 1
                for name, data in fields.items():
                    info = tarfile.TarInfo(f"s{number:06d}.{name}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                number += 1
    return kinds


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_good_ones_are_trained_on_and_the_damaged_ones_counted_by_kind(tmp_path: Path) -> None:
    assert len(DAMAGED) >= 20
    kinds = write(tmp_path, 10_000, 1_000)
    tars = sorted(tmp_path.glob("*.tar"))
    sizes = [1000] * SHARDS
    reader = ShardReader([tars], [sizes], seed=0, collate=lambda samples, size: samples, size=(8, 8), max_bad_share=0.2)
    drawn = [reader.read_sample(Draw(n, 0, 0, *divmod(n, 1000))) for n in range(11_000)]
    texts = Counter(sample.text for sample in drawn)
    assert len(texts) == 10_000
    assert all(text.startswith("good ") for text in texts)
    assert set(reader.tally.kinds) == set(kinds)
    assert reader.tally.bad == sum(reader.tally.kinds.values()) >= 1_000  # a replacement may be damaged as well

    facts = Facts()
    for tar in tars:
        facts.add(examine_tar(tar, None, len))
    assert facts.faults == kinds
    assert (facts.samples, facts.good) == (11_000, 10_000)
