"""A picture is the same picture everywhere: one function reads it for training, commands, evaluation and Python."""

import ast
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tbac.data.decoding import CorruptSampleError, decode_sample
from tbac.data.transforms import crop_to
from tbac.evaluation.benchmarks.base import make_picture_finder
from tbac.evaluation.judges.endpoint import encode_png
from tbac.evaluation.picture_tree import Target, is_readable
from tbac.models import UniImage
from tbac.models.prompt import make_references
from tbac.pictures import PictureError, decode_picture, open_picture, to_upright_rgb
from tbac.sampling.inputs import group_images, read_image
from tests.helpers.configs import ROOT
from tests.helpers.pictures import encode_image, make_noise_image, make_orientation_exif, make_png
from tests.helpers.source import CODE, list_files, parse

SIZE = (24, 16)
RGB = np.asarray(make_noise_image(7, SIZE))
GRAY = RGB[:, :, 0]
ALPHA = np.where(np.arange(24)[None] < 12, 255, 0).repeat(16, 0).astype(np.uint8)
WIDE = GRAY.astype(np.uint16) * 257
TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1), 7: lambda x: np.rot90(x, 2).swapaxes(0, 1), 8: lambda x: np.rot90(x),
}  # fmt: skip


def as_rgb(gray: np.ndarray) -> np.ndarray:
    return np.repeat(gray[:, :, None], 3, 2)


def whiten(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return np.where(alpha[:, :, None] == 255, pixels, 255)


def png(array: np.ndarray, *mode: str, **options: Any) -> bytes:
    return encode_image(Image.fromarray(array, *mode), "PNG", **options)


def list_cases() -> dict[str, tuple[bytes, np.ndarray | None]]:
    """File of each kind, and its pixels computed the plain way; None where the format loses some."""
    rgba, la = np.dstack([RGB, ALPHA]), np.dstack([GRAY, ALPHA])
    palette = Image.fromarray(RGB).quantize(16)
    seen = np.asarray(palette.convert("RGB"))
    index = np.asarray(palette)
    key = tuple(int(v) for v in RGB[3, 3])
    is_key, is_gray_key = (key == RGB).all(2), GRAY[3, 3] == GRAY
    deep_rows = RGB.astype(np.uint16) * 256 + 77
    return {
        "RGB": (png(RGB), RGB),
        "L": (png(GRAY), as_rgb(GRAY)),
        "1": (encode_image(Image.fromarray(GRAY).convert("1"), "PNG"),
              as_rgb(np.asarray(Image.fromarray(GRAY).convert("1")).astype(np.uint8) * 255)),
        "RGBA": (png(rgba), whiten(RGB, ALPHA)),
        "LA": (png(la), whiten(as_rgb(GRAY), ALPHA)),
        "P": (encode_image(palette, "PNG"), seen),
        "P, a transparent entry": (
            encode_image(palette, "PNG", transparency=3), np.where((index == 3)[:, :, None], 255, seen)),
        "P, alpha for each entry": (
            encode_image(palette, "PNG", transparency=bytes([255] * 8 + [0] * 8)),
            np.where((index >= 8)[:, :, None], 255, seen)),
        "RGB, a transparent colour": (
            encode_image(Image.fromarray(RGB), "PNG", transparency=key), np.where(is_key[:, :, None], 255, RGB)),
        "L, a transparent value": (
            encode_image(Image.fromarray(GRAY), "PNG", transparency=int(GRAY[3, 3])),
            as_rgb(np.where(is_gray_key, 255, GRAY))),
        "16 bit gray": (png(WIDE), as_rgb(GRAY)),
        "16 bit gray, a transparent value": (
            make_png(16, 0, WIDE, tRNS=WIDE[3, 3].astype(">u2").tobytes()),
            as_rgb(np.where(is_gray_key, 255, GRAY))),
        "16 bit RGB": (make_png(16, 2, deep_rows), RGB),
        "16 bit RGBA": (
            make_png(16, 6, np.dstack([deep_rows, ALPHA.astype(np.uint16) * 257])), whiten(RGB, ALPHA)),
        "CMYK": (encode_image(Image.fromarray(RGB).convert("CMYK"), "JPEG"), None),
        "gray JPEG": (encode_image(Image.fromarray(GRAY), "JPEG"), None),
        "RGBA WebP": (encode_image(Image.fromarray(rgba), "WEBP", lossless=True, exact=True), whiten(RGB, ALPHA)),
        **{f"turned {i}": (png(RGB, exif=make_orientation_exif(i)), turn(RGB)) for i, turn in TURNS.items()},
        **{f"turned JPEG {i}": (encode_image(Image.fromarray(RGB), "JPEG", exif=make_orientation_exif(i)), None)
           for i in (3, 6)},
        "turned WebP with alpha": (
            encode_image(Image.fromarray(rgba), "WEBP", lossless=True, exact=True, exif=make_orientation_exif(8)),
            np.rot90(whiten(RGB, ALPHA))),
        "a PNG named by another format": (png(RGB), RGB),
    }  # fmt: skip


CASES = list_cases()


def read_by_training(file: Path) -> Image.Image | None:
    return decode_sample({"__key__": "k", "png": file.read_bytes(), "txt": b"x"}).target


def read_as_source(file: Path) -> Image.Image | None:
    raw = {"__key__": "k", "source.jpg": file.read_bytes(), "target.png": png(RGB), "txt": b"x"}
    return decode_sample(raw).sources[0]


def read_by_evaluation(file: Path) -> Image.Image | None:
    assert is_readable(file)
    return make_picture_finder(file.parent)(Target(file.name, "x", "x"))


def read_by_pipeline(file: Path) -> Image.Image | None:
    (group,) = group_images([Image.open(file)], 1)
    return group[0] if group else None


READERS: dict[str, Callable[[Path], Image.Image | None]] = {
    "training": read_by_training,
    "training, input image": read_as_source,
    "commands": open_picture,
    "evaluation": read_by_evaluation,
    "Python": lambda file: to_upright_rgb(Image.open(file)),
    "Python, pipeline": read_by_pipeline,
    "Python, path": lambda file: read_image(str(file)),
    "Python, copied": lambda file: to_upright_rgb(Image.open(file).copy()),
    "Python, read twice": lambda file: to_upright_rgb(to_upright_rgb(Image.open(file))),
    "judge at an endpoint": lambda file: Image.open(io.BytesIO(encode_png(Image.open(file)))),
}


@pytest.mark.parametrize("case", CASES)
def test_every_reader_sees_the_same_pixels(case: str) -> None:
    data, expected = CASES[case]
    file = Path("picture.jpg")  # a name says nothing about what a file holds
    file.write_bytes(data)
    for name, read in READERS.items():
        picture = read(file)
        assert picture is not None
        assert picture.mode == "RGB", name
        if expected is None:
            expected = np.asarray(picture)
        assert np.array_equal(np.asarray(picture), expected), name
    assert expected is not None
    upright = Image.fromarray(np.ascontiguousarray(expected))
    assert torch.equal(crop_to(Image.open(file), (16, 16)), crop_to(upright, (16, 16)))
    ours, plain = (make_references([picture], (16, 16)) for picture in (Image.open(file), upright))
    assert torch.equal(ours["reference_pixels"], plain["reference_pixels"])


@pytest.mark.parametrize("case", ["RGBA", "16 bit gray", "turned 6", "P, a transparent entry", "CMYK"])
def test_the_model_reads_what_training_read(case: str, model: UniImage) -> None:
    Path("x.png").write_bytes(CASES[case][0])
    opened, decoded = (model.prompt(["x"], [[image]]) for image in (Image.open("x.png"), open_picture("x.png")))
    assert torch.equal(opened["pixel_values"], decoded["pixel_values"])
    assert torch.equal(opened["image_grid_thw"], decoded["image_grid_thw"])


@pytest.mark.parametrize("mode", ["La", "RGBa", "LAB", "HSV", "YCbCr", "I;16B", "RGBX", "PA"])
def test_modes_that_only_programs_make_become_rgb_and_are_left_alone(mode: str) -> None:
    image = Image.new(mode, (8, 8))
    assert to_upright_rgb(image).mode == "RGB"
    assert image.mode == mode


@pytest.mark.parametrize(("value", "words"), [
    (Image.new("I", (8, 8)), "pixels of mode I have no known range"),
    (Image.new("F", (8, 8)), "pixels of mode F have no known range"),
    ("x.png", "an input image must be a PIL image, got str"),
    (None, "an input image must be a PIL image, got NoneType"),
    (RGB, "an input image must be a PIL image, got ndarray"),
])  # fmt: skip
def test_what_has_no_pixels_of_known_range_is_refused_by_name(value: Any, words: str) -> None:
    with pytest.raises(PictureError, match=words):
        to_upright_rgb(value)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\n(trap) run\n%%EOF\n"
FOREIGN = {
    "EPS": EPS,
    "GIF": encode_image(make_noise_image(1), "GIF"),
    "TIFF": encode_image(make_noise_image(1), "TIFF"),
    "BMP": encode_image(make_noise_image(1), "BMP"),
    "PPM": encode_image(make_noise_image(1), "PPM"),
    "ICO": encode_image(make_noise_image(1), "ICO"),
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "PDF": b"%PDF-1.4\n%%EOF",
    "nothing": b"",
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_another_format_is_refused_whatever_its_name_and_starts_nothing(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for program in ("gs", "gswin32c"):
        trap = tmp_path / "bin" / program
        trap.parent.mkdir(exist_ok=True)
        trap.write_text(f"#!/bin/sh\ntouch {tmp_path}/trap\n")
        trap.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    Path("x.png").write_bytes(FOREIGN[kind])
    with pytest.raises(PictureError, match=r"x\.png is not a readable image"):
        open_picture("x.png")
    with pytest.raises(CorruptSampleError, match="not a readable image"):
        read_by_training(Path("x.png"))
    assert not is_readable(Path("x.png"))
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize(("make", "words"), [
    (lambda file: None, "can't be opened .No such file"),
    (lambda file: file.mkdir(), "isn't a regular file"),
    (lambda file: os.mkfifo(file), "isn't a regular file"),
    (lambda file: file.symlink_to("/dev/zero"), "isn't a regular file"),
    (lambda file: os.truncate(os.open(file, os.O_CREAT | os.O_RDWR), 2**30), "at most 268435456 are accepted"),
])  # fmt: skip
def test_what_is_no_picture_file_is_named_and_never_waited_for(make: Callable[[Path], Any], words: str) -> None:
    make(Path("x.png"))
    with pytest.raises(PictureError, match=rf"x\.png.*{words}"):
        open_picture("x.png")


# --- every place where a picture is opened

# Calls in these files that aren't `tbac.pictures`, and why.
ALLOWED = {
    ("tbac/data/buckets.py", "Image.open"): "reads the size from the header and never a pixel",
    ("tbac/sampling/recipe.py", "Image.open"): "reads the text in a picture of ours, whose pixels nobody sees",
    ("experiments/speed/loader.py", "Image.open"): "the plain way that the loader is compared with",
    ("experiments/speed/loader.py", "convert RGB"): "the plain way that the loader is compared with",
}


def list_openings(root: Path) -> set[tuple[str, str]]:
    """List (file, call) for all that opens a picture, turns it by its EXIF, or converts it to RGB."""
    found = set()
    for file in list_files(*CODE, root=root):
        for node in ast.walk(parse(file)):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            path, call = file.relative_to(root).as_posix(), ast.unparse(node.func)
            if call.endswith(("Image.open", "exif_transpose")):
                found.add((path, call))
            elif node.func.attr == "convert" and node.args and ast.unparse(node.args[0]) in ("'RGB'", "'RGBA'"):
                found.add((path, "convert RGB"))
    return found


def test_pictures_are_opened_in_one_place() -> None:
    elsewhere = {place for place in list_openings(ROOT) if place[0] != "tbac/pictures.py"}
    assert elsewhere == set(ALLOWED)


@pytest.mark.parametrize(
    "text", ["Image.open(x)", "PIL.Image.open(x)", "ImageOps.exif_transpose(x)", "image.convert('RGB')"]
)
def test_another_place_would_be_found(text: str, tmp_path: Path) -> None:
    (tmp_path / "tbac").mkdir()
    (tmp_path / "tbac" / "x.py").write_text(text)
    assert len(list_openings(tmp_path)) == 1


def test_a_picture_at_the_limit_stays_under_a_gigabyte() -> None:
    import resource

    palette = Image.new("P", (8192, 8192))
    data = encode_image(palette, "PNG", transparency=0, compress_level=1)
    del palette
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert decode_picture(data, "x").size == (8192, 8192)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # in KiB
