"""Datasets in exactly the layouts that they are published in: converted, counted, gone on with, trained on."""

import csv
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hydra.utils import instantiate
from PIL import Image

from data_prep.datasets.image_folder import ImageFolder
from data_prep.shards.conversion import (
    NAME,
    ConversionOptions,
    Dataset,
    Record,
    Rejected,
    clean_key,
    convert,
    format_counts,
)
from tbac.data.decoding import decode_sample
from tbac.data.shards import DataError, Source, SourceShards
from tbac.data.tars import TarReader
from tbac.types import Sample
from tests.helpers.commands import run_app, run_to_success
from tests.helpers.configs import ROOT, compose_config
from tests.helpers.pictures import make_noise_image
from tests.helpers.worlds import load_small_model

FEW = ConversionOptions(samples_per_shard=3, val_samples=2, val_share=0.5)


def encoded(seed: int, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    make_noise_image(seed, (24, 16)).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path.read_bytes()


def blip3o(folder: Path, shards: int = 2, each: int = 4) -> None:
    """Tars `sa_000000.tar` of `<key>.jpg` and `<key>.txt`."""
    for shard in range(shards):
        members = {}
        for i in range(each):
            members[f"sa_{shard}{i}.jpg"] = encoded(1000 * shard + i)
            members[f"sa_{shard}{i}.txt"] = f"a long caption {shard}{i}".encode()
        write_tar(folder / f"sa_{shard:06d}.tar", members)


def sharegpt(folder: Path) -> None:
    """Two JSON files, pictures in tars under the names that the JSON files give them."""
    t2i = [
        {"input_prompt": f"draw {i}", "output_image": f"text_to_image/{i}.png", "output_image_resolution": [24, 16]}
        for i in range(5)
    ]
    edits = [
        {
            "input_prompt": f"change {i}",
            "input_image": [f"text_and_image_to_image/input_{i}.png"],
            "output_image": f"text_and_image_to_image/output_{i}.png",
        }
        for i in range(4)
    ]
    edits[3]["input_image"] = [f"text_and_image_to_image/input_{i}.png" for i in (3, 0, 1)]
    folder.mkdir(exist_ok=True)
    (folder / "text_to_image.json").write_text(json.dumps(t2i))
    (folder / "text_and_image_to_image.json").write_text(json.dumps(edits))
    pictures = {f"text_to_image/{i}.png": encoded(i, "PNG") for i in range(5)}
    write_tar(folder / "text_to_image_part_0.tar", dict(list(pictures.items())[:3]))
    write_tar(folder / "text_to_image_part_1.tar", dict(list(pictures.items())[3:]))
    sides = {
        f"text_and_image_to_image/{side}_{i}.png": encoded(i, "PNG") for side in ("input", "output") for i in range(4)
    }
    write_tar(folder / "text_and_image_to_image_part_0.tar", sides)


def gpt_edit(folder: Path, mode: str = "w:gz", suffix: str = ".tar.gz") -> None:
    """Archives cut into parts; each holds its pictures and `<task>/metadata/*.json`."""
    folder.mkdir(exist_ok=True)
    for task in ("hqedit", "omniedit"):
        rows = [
            {
                "input": f"{task}/input/{i}.jpg", "output": f"{task}/output/{i}.jpg", "instruction": f"{task} {i}",
                "instruction_type": "edit",
            }
            for i in range(5)
        ]  # fmt: skip
        members = {f"gpt-edit/{task}/metadata/all.json": json.dumps(rows).encode()}
        for i in range(5):
            members[f"gpt-edit/{task}/input/{i}.jpg"] = encoded(i)
            members[f"gpt-edit/{task}/output/{i}.jpg"] = encoded(50 + i)
        whole = write_tar(folder / "whole", members, mode)
        (folder / "whole").unlink()
        cut = len(whole) // 3
        for number, name in enumerate(("aa", "ab", "ac")):
            part = whole[number * cut : (number + 1) * cut if number < 2 else None]
            (folder / f"{task}{suffix}.part{name}").write_bytes(part)


def gpt_edit_training(folder: Path) -> None:
    """Unpacked pictures and the training form of the metadata."""
    rows = []
    for i in range(5):
        for side in ("input", "output"):
            path = folder / "images" / side / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(i if side == "input" else 50 + i))
        said = [{"from": "human", "value": f"<image>\nhqedit {i}"}, {"from": "gpt", "value": "<image>"}]
        rows.append({"image": [f"images/input/{i}.jpg", f"images/output/{i}.jpg"], "conversations": said})
    (folder / "train.json").write_text(json.dumps(rows))


def image_folder(folder: Path) -> None:
    for i in range(4):
        path = folder / f"part.{i % 2}" / f"picture.{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(i))
        path.with_suffix(".txt").write_text(f"caption {i}")


def csv_table(folder: Path) -> None:
    image_folder(folder)
    with (folder / "rows.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "image"])
        rows.writerows([f"caption, {i}", f"part.{i % 2}/picture.{i}.jpg"] for i in range(4))


def parquet_table(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    column = [{"bytes": encoded(i), "path": None} for i in range(4)]
    pq.write_table(pa.table({"text": [f"caption {i}" for i in range(4)], "image": column}), folder / "x.parquet")


def saved_dataset(folder: Path) -> None:
    """What `datasets.Dataset.save_to_disk` writes: Arrow streams and JSON files."""
    folder.mkdir(exist_ok=True)
    column = [{"bytes": encoded(i), "path": None} for i in range(4)]
    rows = pa.table({"text": [f"caption {i}" for i in range(4)], "image": column})
    with (
        pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as file,
        pa.ipc.new_stream(file, rows.schema) as out,
    ):
        out.write_table(rows)
    (folder / "dataset_info.json").write_text("{}")


LAYOUTS: dict[str, tuple[Callable[[Path], None], str, list[str], int]] = {
    "BLIP3o": (blip3o, "blip3o_long_caption", [], 8),
    "BLIP3o-60k": (blip3o, "blip3o_60k", [], 8),
    "JourneyDB": (blip3o, "blip3o_journeydb", [], 8),
    "ShareGPT-4o-Image": (sharegpt, "sharegpt4o_t2i", [], 5),
    "ShareGPT-4o-Image, edits": (sharegpt, "sharegpt4o_edit", [], 4),
    "GPT-Image-Edit": (gpt_edit, "gpt_image_edit", [], 10),
    "GPT-Image-Edit, plain tar": (lambda f: gpt_edit(f, "w", ".tar"), "gpt_image_edit", [], 10),
    "GPT-Image-Edit, xz": (lambda f: gpt_edit(f, "w:xz", ".tar.xz"), "gpt_image_edit", [], 10),
    "GPT-Image-Edit, training": (gpt_edit_training, "gpt_image_edit", ["dataset.metadata=[train.json]"], 5),
    "folder": (image_folder, "folder", [], 4),
    "CSV": (csv_table, "table", [], 4),
    "Parquet": (parquet_table, "table", [], 4),
    "datasets": (saved_dataset, "table", [], 4),
}


def made(layout: str, folder: Path) -> tuple[Dataset, int]:
    make, name, options, count = LAYOUTS[layout]
    make(folder)
    config = compose_config("convert", f"dataset={name}", f"dataset.path={folder}", "out=x", *options)
    return instantiate(config.dataset, _convert_="all"), count


def samples(out: Path, split: str) -> list[Sample]:
    reader = TarReader()
    return [
        decode_sample(reader.read(tar, i))
        for tar in SourceShards(Source(str(out), split)).tars
        for i in range(len(reader.read_index(tar).samples))
    ]


def content(out: Path) -> dict[str, bytes]:
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_converts_and_trains(layout: str, tmp_path: Path, in_world: Path) -> None:
    dataset, count = made(layout, tmp_path / "raw")
    counts = convert(dataset, tmp_path / "out", FEW)
    assert (counts.read, counts.total, counts.rejected) == (count, count, {})
    found = samples(tmp_path / "out", "train") + samples(tmp_path / "out", "val")
    assert len({sample.key for sample in found}) == count
    assert all(sample.text.strip() for sample in found)
    assert {bool(sample.sources) for sample in found} == {"edit" in layout.lower()}
    assert not (tmp_path / "out" / f".{NAME}").exists()
    data = instantiate(
        compose_config(
            "train", "run_dir=.", f"stage.sources=[{{path: {tmp_path}/out, split: train}}]",
            f"stage.val_sources=[{{path: {tmp_path}/out, split: val}}]", "stage.batch_size=2", "data.num_workers=0",
        ).data
    )  # fmt: skip
    data.bind(load_small_model(in_world).prompt)
    assert len(next(iter(data.train_dataloader()))) == 2


@pytest.mark.parametrize(("count", "val"), [(1, 0), (2, 1), (19, 1), (300, 15)])
def test_a_twentieth_is_for_validation(count: int, val: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    picture = encoded(1)
    (tmp_path / "mine").mkdir()
    for number in range(count):
        (tmp_path / "mine" / f"{number}.jpg").write_bytes(picture)
        (tmp_path / "mine" / f"{number}.txt").write_text(f"caption {number}")
    options = ["dataset=folder", "dataset.path=mine", "out=out", "processes=1", "options.check_images=false"]
    text = run_to_success("data_prep.convert", capfd, *options)
    assert len(samples(Path("out"), "val") if val else list(Path("out").glob("val-*"))) == val
    assert len(samples(Path("out"), "train")) == count - val
    words = "'stage.sources=[{path: out}]' 'stage.val_sources=[{path: out, split: val}]'"
    assert (words in text) == bool(val)
    assert ("5.0% of them are for validation" in text) == (count == 300)


def test_original_bytes_are_kept(tmp_path: Path) -> None:
    dataset, _ = made("GPT-Image-Edit", tmp_path / "raw")
    convert(dataset, tmp_path / "out", ConversionOptions(val_samples=0))
    reader = TarReader()
    raw = reader.read(tmp_path / "out" / "train-000001.tar", 3)
    assert raw["source.jpg"] == encoded(3)
    assert raw["target.jpg"] == encoded(53)
    assert json.loads(raw["json"]) == {"instruction": "omniedit 3", "kind": "edit"}
    assert raw["__key__"] == "gpt-edit_omniedit_metadata_all_0000003"


def test_several_inputs_are_several_sources(tmp_path: Path) -> None:
    dataset, _ = made("ShareGPT-4o-Image, edits", tmp_path / "raw")
    convert(dataset, tmp_path / "out", ConversionOptions(val_samples=0))
    last = samples(tmp_path / "out", "train")[3]
    assert [s.tobytes() for s in last.sources] == [make_noise_image(i, (24, 16)).tobytes() for i in (3, 0, 1)]


@pytest.mark.parametrize("layout", ["BLIP3o", "GPT-Image-Edit"])
def test_shards_dont_depend_on_the_number_of_processes(layout: str, tmp_path: Path) -> None:
    dataset, _ = made(layout, tmp_path / "raw")
    convert(dataset, tmp_path / "one", FEW)
    convert(dataset, tmp_path / "two", FEW, processes=2)
    assert content(tmp_path / "one") == content(tmp_path / "two")


@pytest.mark.slow
def test_kills_at_random_moments_leave_the_same_bytes(tmp_path: Path) -> None:
    blip3o(tmp_path / "raw", shards=6, each=150)
    rng = random.Random(0)

    def command(out: str) -> list[str]:
        return [
            sys.executable, str(ROOT / "data_prep" / "convert.py"), "dataset=blip3o_60k",
            f"dataset.path={tmp_path}/raw", f"out={tmp_path}/{out}", "processes=2", "options.samples_per_shard=40",
            "options.val_samples=20", "options.val_share=0.5", f"hydra.run.dir={tmp_path}/hydra",
        ]  # fmt: skip

    started = time.monotonic()
    subprocess.run(command("whole"), check=True, capture_output=True)
    whole = time.monotonic() - started
    for _ in range(10):
        process = subprocess.Popen(
            command("cut"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        time.sleep(rng.uniform(0.3, 1.0) * whole)
        os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started
        process.wait()
    subprocess.run(command("cut"), check=True, capture_output=True)
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


def test_a_conversion_goes_on_unit_by_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, _ = made("BLIP3o", tmp_path / "raw")
    convert(dataset, tmp_path / "whole", FEW)
    read = type(dataset).read
    seen: list[str] = []

    def failing(self: Any, unit: str, scratch: Path) -> Any:
        seen.append(unit)
        for number, record in enumerate(read(self, unit, scratch)):
            if len(seen) == 2 and number == 2:
                raise KeyboardInterrupt
            yield record

    monkeypatch.setattr(type(dataset), "read", failing)
    with pytest.raises(KeyboardInterrupt):
        convert(dataset, tmp_path / "cut", FEW)
    assert convert(dataset, tmp_path / "cut", FEW).total == 8
    assert seen == ["sa_000000.tar", "sa_000001.tar", "sa_000001.tar"]
    assert content(tmp_path / "cut") == content(tmp_path / "whole")
    assert convert(dataset, tmp_path / "cut", FEW).total == 8  # it is there already
    assert len(seen) == 3
    with pytest.raises(DataError, match="made otherwise"):
        convert(dataset, tmp_path / "cut", ConversionOptions(samples_per_shard=2))


def test_what_is_wrong_is_counted_by_reason_and_named(tmp_path: Path) -> None:
    members = {
        "good.jpg": encoded(1), "good.txt": b"a cat",
        "garbage.jpg": b"garbage", "garbage.txt": b"a cat",
        "torn.jpg": encoded(2)[:150], "torn.txt": b"a cat",
        "silent.jpg": encoded(3), "silent.txt": b"  ",
        "mute.jpg": encoded(3),
        "latin.jpg": encoded(4), "latin.txt": b"caf\xe9",
        "blind.txt": b"a cat",
        "good!.jpg": encoded(5), "good!.txt": b"the same key",
        "../../trick.txt": b"root",
        "\u732b.jpg": encoded(6), "\u732b.txt": b"a key of other letters",
    }  # fmt: skip
    write_tar(tmp_path / "raw" / "a.tar", members)
    whole = write_tar(tmp_path / "raw" / "b.tar", {f"{i}.{e}": encoded(i) for i in range(3) for e in ("jpg",)})
    (tmp_path / "raw" / "b.tar").write_bytes(whole[:1800])
    config = compose_config("convert", "dataset=blip3o_60k", f"dataset.path={tmp_path}/raw", "out=x")
    counts = convert(instantiate(config.dataset), tmp_path / "out", FEW)
    assert (
        counts.rejected
        == {
            "no caption": 3,
            "unreadable image": 2,
            "unreadable text": 1,
            "no target image": 1,
            "a member that is a name that leads out of the archive": 1,
            "an archive that breaks off": 1,
        }
        | counts.rejected
    )
    assert counts.read == counts.total + sum(counts.rejected.values())
    text = format_counts(counts)
    assert "unreadable text, such as a_latin" in text
    assert all(f"written   {n:>12,}  {split}" in text for split, n in counts.written.items())
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["conversion"]["counts"]["rejected"]


def test_pictures_that_arent_found_are_rejected(tmp_path: Path) -> None:
    sharegpt(tmp_path / "raw")
    rows = json.loads((tmp_path / "raw" / "text_to_image.json").read_text())
    rows[0]["output_image"] = "text_to_image/absent.png"
    rows[1]["output_image"] = None
    rows[2]["input_prompt"] = ""
    (tmp_path / "raw" / "text_to_image.json").write_text(json.dumps(rows))
    config = compose_config("convert", "dataset=sharegpt4o_t2i", f"dataset.path={tmp_path}/raw", "out=x")
    counts = convert(instantiate(config.dataset), tmp_path / "out", ConversionOptions(val_samples=0))
    assert counts.rejected == {
        "a picture that isn't found: the file isn't there": 1, "no target image": 1, "no caption": 1,
    }  # fmt: skip
    assert "45,717  samples are in the whole dataset" in format_counts(counts)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a.b/c", "a_b_c"), ("../x", "x"), ("caf\xe9", "caf"), ("\u732b", ""), ("A-1_b", "A-1_b"), ("a  b", "a_b")],
)
def test_keys_hold_nothing_that_splits_them(text: str, expected: str) -> None:
    assert clean_key(text) == expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["dataset=blip3o_60k", "dataset.path=absent"], "dataset.path=absent holds no *.tar"),
        (["dataset=sharegpt4o_t2i", "dataset.path=absent"], "dataset.path=absent has no text_to_image.json"),
        (["dataset=sharegpt4o_t2i", "dataset.path=.", "dataset.half=video"], "dataset.half must be one of edit, t2i"),
        (["dataset=gpt_image_edit", "dataset.path=absent"], "holds neither archives nor */metadata/*.json"),
        (["dataset=gpt_image_edit", "dataset.path=.", "dataset.metadata=[x.json]"], "x.json doesn't exist"),
        (
            ["dataset=folder", "dataset.path=absent"],
            "dataset.path=absent must be a folder of pictures, and doesn't exist",
        ),
        (["dataset=table", "dataset.path=absent"], "dataset.path=absent holds no table"),
        (["dataset=folder", "dataset.path=raw", "options.samples_per_shard=0"], "samples_per_shard must be at least 1"),
        (["dataset=folder", "dataset.path=raw", "processes=0"], "processes must be at least 1, got 0"),
    ],
)
def test_bad_input_is_named(arguments: list[str], words: str, capfd: pytest.CaptureFixture[str]) -> None:
    image_folder(Path("raw"))
    status, text = run_app("data_prep.convert", capfd, "out=out", *arguments)
    assert status == 1
    assert words in text
    assert "Traceback" not in text


def test_the_application_prints_the_counts(capfd: pytest.CaptureFixture[str]) -> None:
    image_folder(Path("raw"))
    Image.new("RGB", (8, 8)).save("raw/alone.png")
    status, text = run_app("data_prep.convert", capfd, "dataset=folder", "dataset.path=raw", "out=out", "processes=1")
    assert status == 0, text
    assert "rejected             1  no caption, such as alone.png" in text
    assert "written              1  val" in text


def test_the_layout_must_be_named_and_help_needs_none(capfd: pytest.CaptureFixture[str]) -> None:
    status, text = run_app("data_prep.convert", capfd, "out=out")
    assert status == 1
    assert "name the layout of the dataset, dataset=blip3o_60k|" in text
    status, text = run_app("data_prep.convert", capfd, "--help")
    assert status == 0, text
    assert "sharegpt4o_edit" in text


def test_captions_and_formats_are_found_as_people_name_them(tmp_path: Path) -> None:
    picture = io.BytesIO()
    make_noise_image(1).save(picture, "PNG")
    for name, caption in (("a.PNG", "a.TXT"), ("b.png", "b.png.txt"), ("c.png", "c.txt"), ("d.png", None)):
        (tmp_path / name).write_bytes(picture.getvalue())
        if caption:
            (tmp_path / caption).write_text(f"caption of {name}")
    make_noise_image(1).save(tmp_path / "e.gif")
    (tmp_path / "e.txt").write_text("moves")
    found = list(ImageFolder(str(tmp_path)).read("0:5", tmp_path))
    captions = {str(record.fields["txt"]) for record in found if isinstance(record, Record)}
    assert len(captions) == 3
    assert all(f"caption of {name}" in " ".join(captions) for name in ("a.PNG", "b.png", "c.png"))
    reasons = {str(other.name): other.reason for other in found if isinstance(other, Rejected)}
    assert reasons == {"d.png": "no caption", "e.gif": "a format that isn't one of jpg, jpeg, png, webp"}
    with pytest.raises(DataError, match="must be a folder of pictures, and is a file"):
        ImageFolder(str(tmp_path / "c.png"))
