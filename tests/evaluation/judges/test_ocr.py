"""The reader of text: rendered lines of known content, clean, small and slanted; and what benchmarks make of it."""

import re
from pathlib import Path
from random import Random

import matplotlib
import pytest
from PIL import Image, ImageDraw, ImageFont

from tbac.evaluation.judges.base import JudgeError
from tbac.evaluation.judges.ocr import OcrJudge, pad_narrow
from tbac.evaluation.words import compute_edit_distance
from tests.helpers.configs import ROOT

pytestmark = pytest.mark.xdist_group("ocr")  # the models are read once
FONTS = [
    Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf")
    for name in ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "DejaVuSans-Bold", "STIXGeneral")
]
SIDE = 640


@pytest.fixture(scope="module")
def reader() -> OcrJudge:
    return OcrJudge()


def make_lines(count: int, seed: int) -> list[str]:
    """Lines of one to four words out of this project's own words, some in capitals, some with a number."""
    words = sorted(set(re.findall(r"\b[A-Za-z]{3,10}\b", (ROOT / "README.md").read_text())))
    rng, lines = Random(seed), []
    for _ in range(count):
        line = " ".join(rng.sample(words, rng.randint(1, 4)))
        if rng.random() < 0.3:
            line = line.upper()
        lines.append(f"{line} {rng.randint(0, 2030)}" if rng.random() < 0.2 else line)
    return lines


def render(lines: list[str], rng: Random, size: int, slant: float = 0.0) -> Image.Image:
    """Render lines one below the other, in one of several fonts and pairs of colours."""
    ink, paper = rng.choice([("black", "white"), ("white", "navy"), ("darkred", "beige"), ("yellow", "black")])
    picture = Image.new("RGB", (SIDE, SIDE), paper)
    font = ImageFont.truetype(str(rng.choice(FONTS)), size)
    pen = ImageDraw.Draw(picture)
    for number, line in enumerate(lines):
        pen.text((80, 60 + number * (SIDE - 120) / len(lines)), line, font=font, fill=ink)
    return picture.rotate(slant, Image.Resampling.BICUBIC, fillcolor=paper) if slant else picture


def measure(reader: OcrJudge, count: int, per_picture: int, size: int, slant: float = 0.0) -> float:
    """Share of the characters of rendered lines that are read, spaces left out; lines in the order of the page."""
    rng, wrong, total = Random(size), 0, 0
    lines = make_lines(count, seed=size)
    for start in range(0, count, per_picture):
        part = lines[start : start + per_picture]
        read = reader.read_lines(render(part, rng, size, rng.choice((-slant, slant))))
        read.sort(key=lambda line: sum(y for _, y in line.corners))
        wanted, found = ("".join(texts).replace(" ", "") for texts in (part, [line.text for line in read]))
        wrong += compute_edit_distance(wanted, found)
        total += len(wanted)
    return 1 - wrong / total


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "slant", "least"), [(24, 0.0, 0.95), (12, 0.0, 0.8), (9, 0.0, 0.5), (24, 8.0, 0.8), (24, 20.0, 0.5)]
)
def test_rendered_lines_are_read(size: int, slant: float, least: float, reader: OcrJudge) -> None:
    share = measure(reader, 500 if not slant and size == 24 else 100, 10, size, slant)
    print(f"size {size}, slant {slant}: {share:.4f} of the characters")
    assert share >= least


def test_a_picture_s_lines_are_read_with_their_places(reader: OcrJudge) -> None:
    picture = render(["FRESH BREWS", "every day 1998"], Random(0), 40)
    first, second = reader.read_lines(picture)
    assert (first.text.replace(" ", ""), second.text.replace(" ", "")) == ("FRESHBREWS", "everyday1998")
    assert first.corners[0][1] < second.corners[0][1]
    assert reader.read_lines(Image.new("RGB", (300, 200), "gray")) == []
    assert reader.ask('does it say "fresh brews every day 1998"?\ndoes it say "tea"?', [picture]) == "yes\nno"
    with pytest.raises(JudgeError, match="can't answer 'is there a cat"):
        reader.ask("is there a cat?", [picture])
    with pytest.raises(ValueError, match="min_score must be from 0 to 1"):
        OcrJudge(min_score=2)


@pytest.mark.parametrize("size", [(1, 1000), (4000, 40)])
def test_pictures_of_any_shape_are_read_in_bounded_time(size: tuple[int, int], reader: OcrJudge) -> None:
    """Of a long picture the finder of lines made one a hundred times as large, and refused one of a single column."""
    assert reader.read_lines(Image.new("RGB", size, "white")) == []
    padded = pad_narrow(Image.new("RGB", size, "white"))
    assert max(padded.size) <= 4 * min(padded.size)


def test_a_line_in_a_very_wide_picture_keeps_its_place(reader: OcrJudge) -> None:
    picture = Image.new("RGB", (1600, 60), "white")
    font = ImageFont.truetype(str(FONTS[0]), 36)
    ImageDraw.Draw(picture).text((900, 8), "FRESH BREWS", font=font, fill="black")
    (line,) = reader.read_lines(picture)
    assert line.text.replace(" ", "") == "FRESHBREWS"
    assert line.corners[0] == pytest.approx((900, 13), abs=20)


def test_an_error_of_the_models_is_the_judge_s(reader: OcrJudge, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise KeyError("broken")

    monkeypatch.setitem(reader.__dict__, "_engine", fail)
    with pytest.raises(JudgeError, match=r"failed at a picture of 30 x 20 pixels .*broken"):
        reader.read_text_lines(Image.new("RGB", (30, 20)))
