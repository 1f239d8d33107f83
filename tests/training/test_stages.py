"""Stages in one process equal jobs of their own, to the bit; each ends when it says so."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.studies.faults.runs import are_identical
from tbac.models.saved import read_checkpoint
from tbac.training.callbacks.stage_transition import StageTransition
from tbac.training.stages import TRAINABLE, Stage
from tests.helpers.commands import run_app, run_to_success
from tests.helpers.training import make_stage

pytestmark = pytest.mark.usefixtures("in_world")
STAGES = ("t2i_pretrain", "ti2i_pretrain", "finetune")
COMMON = ["world=shapes", "debug=few_steps", "stage.steps=3", "stage.ema_decay=0.5", "callbacks.sample_grid.prompts=[]"]
OWN = {
    "t2i_pretrain": ["stage.trainable=[queries,connector]"],
    "ti2i_pretrain": ["stage.keep_optimizer=true", "stage.lr=1e-2", "stage.accumulate=2"],
    "finetune": ["stage.batch_size=2", "flow.scheme=logit_normal", "stage.dropout.caption_drop_prob=0.5"],
}
OVERRIDES = "stage_overrides={" + ",".join(f"{k}:[{','.join(map(repr, v))}]" for k, v in OWN.items()) + "}"
TOGETHER = [*COMMON, f"stages=[{','.join(STAGES)}]", OVERRIDES, "hydra.run.dir=together"]
PARTS = ("state_dict", "current_model_state", "optimizer_states", "lr_schedulers", "StagedDataModule")


def last(folder: str, stage: str) -> dict[str, Any]:
    return read_checkpoint(f"{folder}/checkpoints/{stage}-step=3.ckpt")


def assert_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    for part in PARTS:
        assert are_identical(one[part], other[part]), part
    guards = [next(v for k, v in c["callbacks"].items() if "Guard" in k) for c in (one, other)]
    assert are_identical(*guards)


def test_stages_in_one_process_equal_separate_jobs_and_resume_anywhere(capfd: pytest.CaptureFixture[str]) -> None:
    init: list[str] = []
    for stage in STAGES:
        run_to_success("train", capfd, *COMMON, f"stage={stage}", *OWN[stage], *init, f"hydra.run.dir={stage}")
        init = [f"init={stage}"]
    run_to_success("train", capfd, *TOGETHER)
    for stage in STAGES:
        assert_equal(last("together", stage), last(stage, stage))
    together = json.loads(Path("together/report.json").read_text())["stages"]
    for stage, report in zip(STAGES, together, strict=True):
        alone = json.loads(Path(stage, "report.json").read_text())
        assert {k: v for k, v in report.items() if k != "checkpoint"} == {
            k: v for k, v in alone.items() if k != "checkpoint"
        }
    frozen, start = last("together", "t2i_pretrain")["current_model_state"], last("together", "ti2i_pretrain")
    moved = start["current_model_state"]
    assert any(not torch.equal(frozen[k], moved[k]) for k in frozen if k.startswith("denoiser."))

    # a run that died after some checkpoint: every later one is missing
    saved = sorted(Path("together/checkpoints").glob("*-step=*.ckpt"), key=lambda p: p.stat().st_mtime_ns)
    assert len(saved) >= 5
    for count in range(1, len(saved)):
        shutil.rmtree("again", ignore_errors=True)
        Path("again/checkpoints").mkdir(parents=True)
        for file in saved[:count]:
            shutil.copy2(file, "again/checkpoints")
        run_to_success("train", capfd, *TOGETHER[:-1], "hydra.run.dir=again")
        assert_equal(last("again", STAGES[-1]), last("together", STAGES[-1]))
        resumed = json.loads(Path("again/report.json").read_text())["stages"]
        assert [{k: v for k, v in r.items() if k != "checkpoint"} for r in resumed] == [
            {k: v for k, v in r.items() if k != "checkpoint"} for r in together
        ]


def test_what_a_stage_freezes_doesnt_move(capfd: pytest.CaptureFixture[str]) -> None:
    run_to_success("train", capfd, *COMMON, "hydra.run.dir=one", "stage.steps=1")
    start = read_checkpoint("one/checkpoints/t2i_pretrain-step=1.ckpt")["state_dict"]
    run_to_success("train", capfd, *COMMON, "init=one", "stage.trainable=[queries]", "hydra.run.dir=two")
    after = last("two", "t2i_pretrain")["current_model_state"]
    assert [k for k in start if not torch.equal(start[k], after[k])] == ["ladder.queries"]


def test_a_stage_ends_by_samples(capfd: pytest.CaptureFixture[str]) -> None:
    run_to_success(
        "train", capfd, *COMMON, "stage.steps=null", "stage.samples=17", "stage.batch_size=4", "hydra.run.dir=one"
    )
    assert json.loads(Path("one/report.json").read_text())["steps"] == 5


def test_a_stage_ends_when_validation_gets_no_better(capfd: pytest.CaptureFixture[str]) -> None:
    slow = ["stage.lr=1e-9", "stage.min_lr=0", "stage.min_delta=0.01", "stage.val_every=2"]
    run_to_success("train", capfd, *COMMON, "stage.steps=100", "stage.patience=2", *slow, "hydra.run.dir=one")
    assert json.loads(Path("one/report.json").read_text())["steps"] == 6  # the first is the best, two are no better


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("stage_overrides.finetune=['model.num_queries=3']", "stage_overrides.finetune changes model"),
        ("stage.trainable=[queries,vae]", "['queries', 'connector', 'denoiser'], got ['queries', 'vae']"),
        ("stage.steps=0", "stage.steps must be at least 1, got 0"),
        ("stage.steps=null", "give stage.steps or stage.samples"),
        ("stage.patience=0", "stage.patience must be at least 1"),
        ("stage.clip=-1", "stage.clip must be positive, got -1"),
    ],
)
def test_bad_stages_are_named(argument: str, words: str, capfd: pytest.CaptureFixture[str]) -> None:
    status, text = run_app("train", capfd, *COMMON, "stages=[t2i_pretrain,finetune]", argument)
    assert status == 1
    assert words in text
    assert "Traceback" not in text


def test_a_checkpoint_of_another_stage_isnt_gone_on_from(capfd: pytest.CaptureFixture[str]) -> None:
    run_to_success("train", capfd, *COMMON, "hydra.run.dir=one")
    status, text = run_app("train", capfd, *COMMON, "stage=finetune", "resume=one", "hydra.run.dir=two")
    assert status == 1
    assert "is a checkpoint of stage t2i_pretrain, and this run has finetune" in text


def test_the_shorter_of_steps_and_samples_is_the_length_of_the_schedule() -> None:
    assert make_stage(steps=10, samples=64).count_steps(16) == 4
    assert make_stage(steps=3, samples=64).count_steps(16) == 3
    assert make_stage(steps=None, samples=65).count_steps(16) == 5
    assert make_stage(steps=10).count_steps(16) == 10


def test_every_parameter_belongs_to_one_trainable_part(model: Any) -> None:
    from tbac.training.stages import find_trainable_part
    from tests.helpers.training import make_module

    parts = {find_trainable_part(name) for name, _ in make_module(model).named_parameters()}
    assert parts == set(TRAINABLE)
    assert isinstance(make_module(model).stage, Stage)


def test_processes_that_would_begin_differently_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tbac.training.callbacks.stage_transition.gather_objects", lambda own: [own, "b.ckpt"])
    transition = StageTransition([make_stage()], origin="a.ckpt")
    with pytest.raises(ValueError, match=r"rank 0: a.ckpt, rank 1: b.ckpt"):
        transition.setup(None, None, "fit")  # type: ignore[arg-type]
