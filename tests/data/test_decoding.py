"""Untrusted bytes: every kind of picture comes out right, or is refused by name."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tbac.data.decoding import CorruptSampleError, decode_image, decode_sample, decode_text
from tbac.data.tars import TarIndex, TarReader
from tbac.data.transforms import crop_to
from tests.helpers.pictures import FRAMES, encode_image, make_noise_image, make_orientation_exif, make_png_of_size


def halves(mode: str, left: Any, right: Any) -> Image.Image:
    image = Image.new(mode, (32, 16), left)
    image.paste(right, (16, 0, 32, 16))
    return image


def seen(data: bytes) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    image = decode_image(data, "png")
    assert image.mode == "RGB"
    pixels = np.asarray(image).astype(int)
    return tuple(pixels[8, 4]), tuple(pixels[8, -4])


def palette(transparent: bool) -> bytes:
    image = halves("P", 0, 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    return encode_image(image, "PNG", **({"transparency": 1} if transparent else {}))


def test_every_mode_comes_out_as_it_looks() -> None:
    red, blue, white = (255, 0, 0), (0, 0, 255), (255, 255, 255)
    assert seen(encode_image(halves("RGB", red, blue), "PNG")) == (red, blue)
    assert seen(encode_image(halves("L", 7, 200), "PNG")) == ((7,) * 3, (200,) * 3)
    assert seen(encode_image(halves("1", 0, 1), "PNG")) == ((0,) * 3, white)
    assert seen(encode_image(halves("LA", (7, 255), (7, 0)), "PNG")) == ((7,) * 3, white)
    assert seen(encode_image(halves("RGBA", (*red, 255), (*blue, 0)), "PNG")) == (red, white)
    assert seen(palette(False)) == (red, blue)
    assert seen(palette(True)) == (red, white)
    assert seen(encode_image(halves("RGBA", (*red, 255), (*blue, 0)), "WEBP", lossless=True)) == (red, white)
    deep = Image.fromarray(np.repeat(np.array([[257 * 7] * 16 + [257 * 200] * 16], np.uint16), 16, 0))
    assert seen(encode_image(deep, "PNG")) == ((7,) * 3, (200,) * 3)
    cyan, yellow = seen(encode_image(halves("CMYK", (255, 0, 0, 0), (0, 0, 255, 0)), "JPEG", quality=95))
    assert np.abs(np.subtract(cyan, (0, 255, 255))).max() < 8
    assert np.abs(np.subtract(yellow, (255, 255, 0))).max() < 8


def test_pictures_are_turned_upright() -> None:
    image, exif = make_noise_image(1, (24, 16)), Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    made = decode_image(encode_image(image, "PNG", exif=exif.tobytes()), "png")
    assert made.size == (16, 24)
    assert np.array_equal(np.asarray(made), np.rot90(np.asarray(image), -1))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not a readable image"),
        (b"\xff\xd8 not a jpeg", "not a readable image"),
        (encode_image(make_noise_image(0), "JPEG")[:200], "not a readable image"),
        (encode_image(make_noise_image(0), "PNG")[:-60], "not a readable image"),
        (encode_image(make_noise_image(0), "GIF"), "not a readable image"),
        (encode_image(make_noise_image(0), "BMP"), "not a readable image"),
        (encode_image(make_noise_image(0), "TIFF"), "not a readable image"),
        (encode_image(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]), "is animated"),
        (encode_image(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]), "is animated"),
        (make_png_of_size(100_000, 100_000), "not a readable image"),
        (make_png_of_size(12_000, 12_000), "has 12000 x 12000 pixels"),
        (make_png_of_size(10_000, 10), "aspect ratio up to 200"),
        (make_png_of_size(7, 7), "sides from 8"),
        (make_png_of_size(64, 64), "not a readable image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a readable image"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_isnt_a_sensible_picture_is_refused_by_name(data: bytes, words: str) -> None:
    with pytest.raises(CorruptSampleError, match=f"source.png.*{words}"):
        decode_image(data, "source.png")


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"txt": b"caf\xe9"}, "text can't be read"),
        ({"txt": b" \n"}, "missing or empty"),
        ({"json": b"{"}, "text can't be read"),
        ({"json": b"[" * 100_000}, "text can't be read"),
        ({"json": b'{"instruction": 3}'}, "missing or empty"),
        ({}, "neither txt nor json"),
    ],
)
def test_captions_that_cant_be_read_are_refused(raw: dict, words: str) -> None:
    with pytest.raises(CorruptSampleError, match=words):
        decode_text(raw)


def test_a_byte_order_mark_isnt_part_of_the_caption() -> None:
    assert decode_text({"txt": "\ufeffa cat".encode()}) == "a cat"


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", **fields: Any) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data))


def test_tricks_in_archives_are_passed_over_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    picture = encode_image(make_noise_image(0), "PNG")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add(tar, "good.png", picture)
        add(tar, "good.txt", b"a cat")
        add(tar, "../../etc/passwd.txt", b"root")
        add(tar, "/etc/shadow.txt", b"root")
        add(tar, "link.txt", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(tar, "hard.txt", type=tarfile.LNKTYPE, linkname="good.txt")
        add(tar, "device.txt", type=tarfile.CHRTYPE)
        add(tar, "twice.png", picture)
        add(tar, "twice.txt", b"a cat")
        add(tar, "twice.txt", b"a dog")
    index = TarIndex(tmp_path / "x.tar")
    assert [key for key, _ in index.samples] == ["good", "twice"]
    assert index.refused == {
        "a name that leads out of the archive": 2,
        "not a plain file": 3,
        "a second field of the same name": 1,
    }
    assert "passed over 3 members" in caplog.text
    reader = TarReader()
    assert decode_sample(reader.read(tmp_path / "x.tar", 0)).text == "a cat"
    with pytest.raises(CorruptSampleError, match="missing or empty"):
        decode_sample(reader.read(tmp_path / "x.tar", 1))


def photo(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Smooth, as photographs are: noise enlarged, with some detail."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
    detail = rng.normal(0, 4, (size[1], size[0], 3))
    return Image.fromarray(np.clip(np.asarray(coarse) + detail, 0, 255).astype(np.uint8))


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(
    ("size", "wanted", "gap", "fraction"),
    [
        ((1200, 904), (64, 64), 2.0, 4),  # an eighth would be 1.8 times what is needed
        ((1200, 1104), (64, 64), 2.0, 8),
        ((1200, 1104), (64, 64), 4.0, 4),
        ((1200, 904), (256, 256), 2.0, 1),
        ((1200, 904), (256, 256), 1.0, 2),
        ((1200, 904), (64, 128), 2.0, 4),
        ((1200, 904), (64, 64), None, 1),
        ((1202, 906), (64, 64), 2.0, 2),  # what doesn't divide the sides would shift the picture
        ((1201, 904), (64, 64), 2.0, 1),
        ((50, 40), (64, 64), 2.0, 1),
    ],
)
def test_jpegs_are_decoded_no_larger_than_needed(
    size: tuple[int, int], wanted: tuple[int, int], gap: float | None, fraction: int, orientation: int
) -> None:
    upright = wanted if orientation == 1 else wanted[::-1]
    image = decode_image(
        encode_image(photo(size), "JPEG", exif=make_orientation_exif(orientation)), "jpg", upright, gap
    )
    found = image.size if orientation == 1 else image.size[::-1]
    assert found == (size[0] // fraction, size[1] // fraction)


def test_a_smaller_decoding_changes_pixels_by_less_than_the_jpeg_itself() -> None:
    image = photo((1600, 1200), 3)
    data = encode_image(image, "JPEG")
    plain, reduced = (crop_to(decode_image(data, "jpg", (128, 128), gap), (128, 128)) for gap in (None, 2.0))
    original = crop_to(image, (128, 128))

    def rms(a: torch.Tensor, b: torch.Tensor) -> float:
        return (a.float() - b.float()).square().mean().sqrt().item()

    assert 0 < rms(plain, reduced) < 1.0  # of 255
    assert rms(reduced, original) < 2.0


def test_formats_other_than_jpeg_are_decoded_in_full() -> None:
    for kind in ("PNG", "WEBP"):
        assert decode_image(encode_image(photo((400, 300)), kind), kind.lower(), (24, 24), 2.0).size == (400, 300)
