"""Verification: faults that were planted are named, and what is repeated or suspicious is counted."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from data_prep.shards.geneval_captions import is_geneval_template
from data_prep.shards.sheet import draw_sheet
from data_prep.shards.writer import write_shards
from tbac.sampling.grid import encode_png
from tests.helpers.commands import run_app
from tests.helpers.pictures import make_noise_image
from tests.helpers.shards import break_members


def write(folder: Path, count: int = 12) -> None:
    samples = (
        (f"s{i:03d}", {"png": make_noise_image(i, (16, 8)), "txt": f"a caption of {i} words"}) for i in range(count)
    )
    write_shards(folder, "train", samples, 4)


def verified(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, dict]:
    status, text = run_app("data_prep.verify", capfd, *arguments, "processes=1", "hydra.run.dir=out")
    file = Path("out/report.json")
    return status, text, json.loads(file.read_text()) if file.is_file() else {}


def test_good_shards_pass(capfd: pytest.CaptureFixture[str]) -> None:
    write(Path("good"))
    status, text, report = verified(capfd, "path=good")
    assert status == 0, text
    assert (report["samples"], report["good"], report["faults"]) == (12, 12, {})
    assert "| caption length, words | median 5, longest 5 |" in text
    assert "1; most often 16 x 8 (12)" in text
    assert "| fields: image txt | 12 |" in text
    assert Image.open("out/histograms.png").width > 500
    # A sheet of all twelve, six in a row, each with its caption.
    sheet = Image.open("out/samples.png")
    assert sheet.width == 6 * 192 + 7 * 4
    assert sheet.height > 2 * 192
    assert "12 of the samples, sources beside targets" in text


def test_the_sheet_shows_sources_beside_targets_and_passes_over_what_is_bad(tmp_path: Path) -> None:
    def encode(color: str) -> bytes:
        return encode_png(Image.new("RGB", (40, 20), color))

    edits = (
        (f"e{i}", {"source.png": encode("red"), "target.png": encode("blue"), "json": b'{"instruction": "paint it"}'})
        for i in range(9)
    )
    write_shards(tmp_path, "train", edits, 4)
    break_members(tmp_path / "train-000000.tar", {"e0.target.png": b"garbage"})
    assert draw_sheet(tmp_path, tmp_path / "sheet.png", count=3) == 3
    sheet = Image.open(tmp_path / "sheet.png")
    middle = [sheet.getpixel((4 + 196 * column + 96, 4 + 96)) for column in range(6)]
    assert middle == 3 * [(255, 0, 0), (0, 0, 255)]


def test_planted_faults_are_each_named(capfd: pytest.CaptureFixture[str]) -> None:
    write(Path("bad"), 24)
    manifest = json.loads(Path("bad/manifest.json").read_text())
    small = Image.new("RGB", (4, 4))
    small.save("small.png")
    break_members(
        Path("bad/train-000000.tar"),
        {
            "s000.png": b"garbage",
            "s001.txt": b"",
            "s002.png": Path("small.png").read_bytes(),
            "s003.txt": b"caf\xe9",
        },
    )
    break_members(Path("bad/train-000001.tar"), {"s004.png": None, "s005.txt": None})
    whole = Path("bad/train-000002.tar").read_bytes()
    Path("bad/train-000002.tar").write_bytes(whole[: len(whole) // 2])
    flipped = bytearray(Path("bad/train-000003.tar").read_bytes())
    flipped[-1500] ^= 1  # in the padding of the last member: every sample still reads
    Path("bad/train-000003.tar").write_bytes(bytes(flipped))
    Path("bad/train-000004.tar").unlink()
    manifest["shards"]["train-000005.tar"]["samples"] = 5
    Path("bad/manifest.json").write_text(json.dumps(manifest))
    status, text, report = verified(capfd, "path=bad")
    assert status == 1
    faults, named = report["faults"], report["named"]
    for kind, name in {
        "unreadable image": "train-000000.tar: s000",
        "no caption": "train-000000.tar: s001",
        "absurd size": "train-000000.tar: s002",
        "unreadable text": "train-000000.tar: s003",
        "no target image": "train-000001.tar: s004",
        "a shard that breaks off": "train-000002.tar",
        "a shard whose bytes aren't those of its manifest": "train-000003.tar",
        "a shard that is in the manifest and absent": "train-000004.tar",
        "a shard with another number of samples than its manifest says": "train-000005.tar: 4 instead of 5",
    }.items():
        assert any(n.startswith(name) for n in named[kind]), (kind, named.get(kind))
        assert f"| {kind} | {faults[kind]} |" in text
    assert faults["no caption"] == 2
    assert report["samples"] == report["good"] + 6


def test_repetitions_and_genevals_templates_are_counted(capfd: pytest.CaptureFixture[str]) -> None:
    texts = ["a photo of a red car", "a photo of two dogs", "a long caption", "a long caption", "another"]
    samples = ((f"s{i}", {"png": make_noise_image(i // 4), "txt": text}) for i, text in enumerate(texts))
    write_shards(Path("shards"), "train", samples, 10)
    status, text, report = verified(capfd, "path=shards")
    assert status == 0
    assert (report["repeated_captions"], report["repeated_images"], report["geneval_templates"]) == (1, 3, 2)
    assert "A GenEval score after training on captions of its templates must say so" in text
    assert "s1: a photo of two dogs" in text


def test_edits_and_cached_latents_are_looked_at(capfd: pytest.CaptureFixture[str]) -> None:
    samples = [
        ("a", {"source.png": make_noise_image(0), "target.png": make_noise_image(1), "json": {"instruction": "go"}}),
        ("b", {"latent.safetensors": torch.zeros(8, 6, 6), "txt": "x"}),
        ("c", {"latent.safetensors": torch.full((8, 6, 6), float("nan")), "txt": "x"}),
    ]
    write_shards(Path("shards"), "train", samples, 10)
    status, _, report = verified(capfd, "path=shards")
    assert status == 1
    assert report["faults"] == {"unreadable latents": 1}
    assert (report["edits"], report["cached"], report["good"]) == (1, 1, 2)


def test_tokens_are_counted_by_a_tokenizer(in_world: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write(Path("good"), 2)
    _, text, _ = verified(capfd, "path=good", f"tokenizer={in_world}/tokenizer")
    assert "caption length, tokens" in text


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a photo of a bench", True),
        ("A photo of an orange.", True),
        ("a photo of four handbags", True),
        ("a photo of a dog right of a teddy bear", True),
        ("a photo of a purple wine glass and a black apple", True),
        ("a photo of a bench in a park at night", False),
        ("a painting of a bench", False),
        ("a photo of a circle", False),
        ("", False),
    ],
)
def test_genevals_templates(caption: str, expected: bool) -> None:
    assert is_geneval_template(caption) is expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["path=absent"], "path=absent isn't a folder"), (["path=."], "path=. holds no *.tar")],
)
def test_bad_input_is_named(arguments: list[str], words: str, capfd: pytest.CaptureFixture[str]) -> None:
    status, text, _ = verified(capfd, *arguments)
    assert status == 1
    assert words in text
