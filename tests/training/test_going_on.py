"""A run that goes on goes on with what is asked: each change is applied and said, or refused by its name."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tbac.models.saved import read_checkpoint
from tests.helpers.commands import FEW, run_app, run_to_message, run_to_success

MORE = [*FEW, "stage.steps=3", "callbacks.sample_grid.prompts=[]"]
AGAIN = [*MORE, "hydra.run.dir=run"]
pytestmark = pytest.mark.usefixtures("trained_run")

# What can be applied: the option, and where its value stands in the new checkpoint.
APPLIED = [
    ("stage.lr=1e-4", "optimizer_states.0.param_groups.0.initial_lr", 1e-4),
    ("stage.weight_decay=0.3", "optimizer_states.0.param_groups.0.weight_decay", 0.3),
    ("optim.betas=[0.5,0.6]", "optimizer_states.0.param_groups.0.betas", (0.5, 0.6)),
    ("optim.eps=1e-6", "optimizer_states.0.param_groups.0.eps", 1e-6),
    ("stage.batch_size=2", "tbac.config.data.batch_size", 2),
    ("stage.dropout.caption_drop_prob=0.7", "tbac.config.data.dropout.caption_drop_prob", 0.7),
    ("stage.noise_samples_per_prompt=2", "tbac.config.flow.noise_samples_per_prompt", 2),
    ("flow.shift=3.0", "tbac.config.flow.shift", 3.0),
    ("stage.accumulate=2", "tbac.config.stage.accumulate", 2),
    ("stage.ema_decay=0.5", "tbac.config.callbacks.ema.decay", 0.5),
    ("stage.clip=0.1", "tbac.config.stage.clip", 0.1),
    ("stage.min_lr=1e-5", "tbac.config.schedule.min_lr", 1e-5),
    ("machine.num_workers=1", "tbac.config.data.num_workers", 1),
    ("seed=7", "tbac.config.seed", 7),
    ("guard.window=64", "tbac.config.guard.window", 64),
    ("model.spell_words=true", "tbac.config.model.spell_words", True),
]
REFUSED = [
    ("taps=reversed", "model.taps"),
    ("taps=final", "model.taps"),
    ("ladder=per_tap_mlp", "model.ladder.connector"),
    ("ladder.query_std=0.5", "model.ladder.query_std"),
    ("ladder.prompt_context=true", "model.ladder.prompt_context"),
    ("ladder.tap_norm=rms", "model.ladder.tap_norm"),
    ("model.lora.rank=2", "model.lora"),
    ("model.num_queries=4 model.query_phrases=null", "model."),
    ("model.query_phrases=null", "model.query_phrases"),
    ("model.reference_latents=true", "model.reference_latents"),
    ("model.quantization=int8", "quanti"),
    ("model.seed=5", "model.seed"),
    ("stage.trainable=[denoiser]", "stage.trainable"),
    ("stage.trainable=[queries,connector]", "stage.trainable"),
    ("optim=adamw8bit", "optim._target_"),
    ("guard=running_mean", "guard._target_"),
    ("callbacks.checkpoint.monitor=train/loss", "callbacks.checkpoint.monitor"),
]


def look_up(value: Any, place: str) -> Any:
    for key in place.split("."):
        value = value[int(key)] if isinstance(value, list | tuple) else value[key]
    return value


@pytest.mark.parametrize(("change", "place", "value"), APPLIED, ids=[change for change, _, _ in APPLIED])
def test_what_can_change_is_applied_and_said(
    change: str, place: str, value: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    text = run_to_success("train", capfd, *AGAIN, change)
    option = change.partition("=")[0]
    (said,) = [line for line in text.splitlines() if "going on with other options than before" in line]
    assert option in said, said
    checkpoint = read_checkpoint("run/checkpoints/t2i_pretrain-step=3.ckpt")
    assert look_up(checkpoint, place) == value


WHEN_FINISHED = ("taps=reversed", "stage.trainable=[denoiser]", "ladder=per_tap_mlp")
CASES = [(False, *case) for case in REFUSED] + [(True, *case) for case in REFUSED if case[0] in WHEN_FINISHED]


@pytest.mark.parametrize(("finished", "change", "words"), CASES)
def test_what_can_t_change_is_refused_by_name_and_nothing_is_written(
    finished: bool, change: str, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    before = {file: file.read_bytes() for file in Path("run").rglob("*") if file.is_file() and file.name != ".lock"}
    options = [*FEW, "callbacks.sample_grid.prompts=[]", "hydra.run.dir=run"] if finished else AGAIN
    text = run_to_message("train", capfd, *options, *change.split())
    (error,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert words in error
    after = {file: file.read_bytes() for file in before}
    assert {file for file in before if before[file] != after[file] and file.suffix != ".log"} == set()


def test_a_rate_that_didn_t_change_goes_on_to_the_bit(capfd: pytest.CaptureFixture[str]) -> None:
    text = run_to_success("train", capfd, *AGAIN)
    run_to_success("train", capfd, *MORE, "hydra.run.dir=whole")
    one, other = (read_checkpoint(f"{run}/checkpoints/t2i_pretrain-step=3.ckpt") for run in ("run", "whole"))
    rates = [[group["lr"] for group in c["optimizer_states"][0]["param_groups"]] for c in (one, other)]
    assert rates[0] == rates[1]
    # The length is what differs.
    assert "stage.steps 2 -> 3" in text


def test_a_new_rate_is_that_of_a_run_that_began_with_it(capfd: pytest.CaptureFixture[str]) -> None:
    run_to_success("train", capfd, *AGAIN, "stage.lr=5e-4")
    run_to_success("train", capfd, *MORE, "stage.lr=5e-4", "hydra.run.dir=whole")
    groups = [
        read_checkpoint(f"{run}/checkpoints/t2i_pretrain-step=3.ckpt")["optimizer_states"][0]["param_groups"][0]
        for run in ("run", "whole")
    ]
    assert groups[0]["lr"] == groups[1]["lr"]
    assert groups[0]["initial_lr"] == groups[1]["initial_lr"] == 5e-4


def test_replaced_data_is_named(
    in_world: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(in_world, "world")
    monkeypatch.setenv("TBAC_SHAPES", "world")
    run_to_success("train", capfd, *FEW, "hydra.run.dir=mine")
    tar = next(Path("world/data/t2i").glob("train-*.tar"))
    content = bytearray(tar.read_bytes())
    position = content.index(b"a ", 512)
    content[position : position + 1] = b"o"
    tar.write_bytes(content)
    text = run_to_success("train", capfd, *MORE, "hydra.run.dir=mine")
    assert "world/data/t2i (train) holds other bytes than when this run began, under the same names" in text


def test_a_run_that_resumed_another_goes_on_from_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    command = [*MORE, "resume=run", "hydra.run.dir=next"]
    run_to_success("train", capfd, *command)
    again = run_to_success("train", capfd, *command)
    assert "finished before" in again
    longer = run_to_success("train", capfd, *command, "stage.steps=4")
    assert "going on from next/checkpoints/t2i_pretrain-step=3.ckpt" in re.sub(r"\S*/next/", "next/", longer)
    # An older file of the run's own is gone back to, and then the same command goes on after it.
    back = run_to_success("train", capfd, *MORE, "stage.steps=5", "hydra.run.dir=next",
                          "resume=next/checkpoints/t2i_pretrain-step=3.ckpt")  # fmt: skip
    assert "t2i_pretrain-step=3.ckpt" in back


def test_other_stages_than_before_are_named(capfd: pytest.CaptureFixture[str]) -> None:
    common = [*FEW, "callbacks.sample_grid.prompts=[]", "hydra.run.dir=both"]
    run_to_success("train", capfd, *common, "stages=[t2i_pretrain,ti2i_pretrain]")
    text = run_to_message("train", capfd, *common, "stages=[ti2i_pretrain,t2i_pretrain]", "stage.steps=3")
    assert "was trained after these stages" in text


@pytest.mark.parametrize("named", [True, False])
def test_what_is_printed_when_it_is_stopped_is_the_command_that_goes_on(
    named: bool, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import experiments.training_run as training_run

    def stop(*_: Any, **__: Any) -> None:
        raise SystemExit(143)

    folder = ["hydra.run.dir=a=b, c/it's"] if named else []
    with monkeypatch.context() as patch:
        patch.setattr(training_run, "train", stop)
        status, text = run_app("train", capfd, *MORE, *folder)
    assert status == 143
    (line,) = [line for line in text.splitlines() if line.startswith("to go on: ")]
    words = shlex.split(line.removeprefix("to go on: "))
    assert words[1] == "train.py"
    again = run_to_success("train", capfd, *words[2:])
    (report,) = Path("a=b, c/it's" if named else "outputs/debug").rglob("report.json")
    assert json.loads(report.read_text())["steps"] == 3
    assert "finished before" in run_to_success("train", capfd, *words[2:])
    assert str(report.parent) in again


def test_the_moments_go_on_whatever_changes(capfd: pytest.CaptureFixture[str]) -> None:
    before = read_checkpoint("run/checkpoints/t2i_pretrain-step=2.ckpt")["optimizer_states"][0]["state"]
    run_to_success("train", capfd, *AGAIN, "stage.lr=1e-9", "stage.min_lr=0", "optim.betas=[1e-9,1e-9]")
    after = read_checkpoint("run/checkpoints/t2i_pretrain-step=3.ckpt")["optimizer_states"][0]["state"]
    assert all(after[index]["step"] == values["step"] + 1 for index, values in before.items())
    assert not any(torch.equal(after[i]["exp_avg"], values["exp_avg"]) for i, values in list(before.items())[:3])
