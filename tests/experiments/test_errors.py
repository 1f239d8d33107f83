"""Bad input ends in one clear message, a non-zero exit and no traceback, before anything heavy is loaded."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.commands import run_app, run_to_message
from tests.helpers.configs import ROOT
from tests.helpers.weights import refuse_weights

SHAPES = ["world=shapes", "stage.steps=2", "stage.warmup_steps=0", "logger=csv", "machine.num_workers=0"]


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading any weight is an error."""
    refuse_weights(monkeypatch)


@pytest.mark.usefixtures("in_world", "no_weights")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["taps=explicit", "taps.layers=[1,2,3,99]"], ["99", "out of range", "0 (embeddings) to 6"]),
        (["taps=explicit", "taps.layers=[1,2,3]"], ["3 taps", "4 denoiser blocks"]),
        (["taps=explicit", "taps.layers=[1,2]", "taps.assignment=[0,1,5,0]"], ["[0, 1, 5, 0]", "between 0 and 1"]),
        (["taps=deepest"], ["'taps/deepest'", "Available options", "last_n"]),
        (["stage.leraning_rate=1"], ["leraning_rate"]),
        (["no_such_key=1"], ["no_such_key"]),
        (["stage=pretrain"], ["stage/pretrain", "t2i_pretrain"]),
        (["stage.dropout.caption_drop_prob=1.5"], ["caption_drop_prob", "1.5"]),
        (["flow.scheme=cosine"], ["cosine", "logit_normal"]),
        (["stage.sources=[{path: /no/such/folder, split: train}]"], ["/no/such/folder", "exist"]),
        (["stage.batch_size=0"], ["batch_size", "0"]),
        (["stage.warmup_steps=3"], ["stage.warmup_steps=3", "stage.steps=2"]),
        (["model.query_phrases=[one]"], ["1 phrases", "model.num_queries=9"]),
        (["model.mllm=/no/such/mllm"], ["model.mllm=/no/such/mllm", "no such folder"]),
        (["model.dtype=float8"], ["float8", "bfloat16"]),
        (["ladder.connector=linear"], ["linear", "shared_mlp"]),
        (["stage=ti2i_pretrain"], ["t2i_pretrain", "make stage1", "init=PATH"]),
        (["init=/no/such/run"], ["/no/such/run", "exist"]),
        (["resume=/no/such.ckpt"], ["/no/such.ckpt", "exist"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and "=" in value[0] else "",
)
def test_train_refuses(arguments: list[str], expected: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    text = run_to_message("train", capfd, *SHAPES, *arguments)
    for part in expected:
        assert part in text


@pytest.mark.usefixtures("in_world", "no_weights")
def test_an_empty_shard_folder_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    source = f"stage.sources=[{{path: {tmp_path / 'empty'}, split: train}}]"
    text = run_to_message("train", capfd, *SHAPES, source)
    assert str(tmp_path / "empty") in text
    assert "train-" in text


def damaged(world: Path, folder: Path, damage: str) -> str:
    """A copy of the training shards with a fault, as an override."""
    shutil.copytree(world / "data" / "t2i", folder)
    shard = next(iter(sorted(folder.glob("train-*.tar"))))
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2 + 100])
    return f"stage.sources=[{{path: {folder}, split: train}}]"


@pytest.mark.usefixtures("no_weights")
def test_a_truncated_tar_is_named(in_world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = damaged(in_world, tmp_path / "cut", "truncated")
    text = run_to_message("train", capfd, *SHAPES, source)
    assert "train-000000.tar" in text
    assert "bytes" in text


@pytest.mark.usefixtures("no_weights")
def test_a_truncated_tar_without_manifest_is_named(
    in_world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = damaged(in_world, tmp_path / "cut", "truncated")
    (tmp_path / "cut" / "manifest.json").unlink()
    text = run_to_message("train", capfd, *SHAPES, source)
    assert "train-000000.tar is truncated" in text
    assert "data.check_manifest=false" in text


def test_the_whole_samples_of_a_truncated_tar_can_still_be_read(
    in_world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = damaged(in_world, tmp_path / "cut", "truncated")
    options = ["data.check_manifest=false", "stage.batch_size=8", "stage.steps=20", "stage.val_every=20"]
    status, text = run_app("train", capfd, *SHAPES, *options, source)
    assert status == 0, text
    assert f"skipped the end of {tmp_path / 'cut' / 'train-000000.tar'}" in text


def test_garbage_images_are_counted_and_end_training_when_they_are_many(
    in_world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from data_prep.shards.writer import write_shards

    rows = [(f"bad_{i:03d}", {"jpg": b"\xff\xd8 not a picture", "txt": "a red circle"}) for i in range(32)]
    write_shards(tmp_path / "garbage", "train", iter(rows), 32, {"provenance": {}})
    source = f"stage.sources=[{{path: {tmp_path / 'garbage'}, split: train}}]"
    text = run_to_message("train", capfd, *SHAPES, source)
    assert "bad_0" in text
    assert "max_bad_share" in text


@pytest.mark.usefixtures("no_weights")
def test_a_checkpoint_of_something_else_is_refused(
    in_world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, content in (("empty.ckpt", b""), ("text.ckpt", b"not a checkpoint")):
        (tmp_path / name).write_bytes(content)
        assert name in run_to_message("train", capfd, *SHAPES, f"init={tmp_path / name}")


def test_real_models_without_weights_say_what_is_missing(capfd: pytest.CaptureFixture[str]) -> None:
    text = run_to_message("train", capfd, "world=real", "stage=t2i_pretrain")  # its data aren't there either
    assert "model.mllm=Qwen/Qwen2.5-VL-3B-Instruct" in text
    assert "model.denoiser=Efficient-Large-Model/Sana_1600M_512px_diffusers" in text
    assert "model.mllm=/path/to/folder" in text


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "holds no row"),
        ("not json\n", "geneval.jsonl:1 isn't JSON"),
        ('{"tag": "colors"}\n', "needs 'prompt'"),
        ('{"tag": "colors", "prompt": "x", "include": [{"count": 1}]}\n', "needs a 'class'"),
        ('{"tag": "t", "prompt": "x", "include": [{"class": "a", "count": 1, "position": ["near", 0]}]}\n', "'near'"),
        (b"\xff\xfe\x00", "isn't UTF-8"),
    ],
)
@pytest.mark.usefixtures("in_world", "no_weights")
def test_prompt_files_of_the_wrong_form(
    content: str | bytes, expected: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "geneval.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    text = run_to_message("evaluate", capfd, "checkpoint=x", f"benchmark.file={file}")
    assert expected in text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "nothing to draw"),
        (["prompt_file=missing.txt"], "missing.txt"),
        (["prompts=[a]", "images=[missing.png]"], "missing.png"),
        (["prompts=[a,b,c]", "images=[one.png,two.png]"], "images has 2 entries for 3 prompts"),
        (["prompts=[a]"], "nowhere"),
    ],
)
@pytest.mark.usefixtures("no_weights")
def test_generate_refuses(arguments: list[str], expected: str, capfd: pytest.CaptureFixture[str]) -> None:
    from tests.helpers.pictures import make_noise_image

    for name in ("one.png", "two.png"):
        make_noise_image(0).save(name)
    assert expected in run_to_message("generate", capfd, "checkpoint=nowhere", *arguments)


def test_a_missing_value_is_named_by_a_real_command(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, str(ROOT / "experiments" / "answer.py"), "question=hello"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert run.returncode != 0
    assert "checkpoint" in run.stderr
    assert "Traceback" not in run.stderr
