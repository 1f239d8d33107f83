"""A spike rule, a callback and a reward that the package doesn't know are used by the name of their YAML alone."""

from pathlib import Path

import pytest

from tbac.models.saved import read_checkpoint
from tests.helpers.commands import FEW, run_to_message, run_to_success

MODULE = """
import lightning as L

from tbac.training.spikes import Verdict
from tbac.types import PicturePrompt


class EverySecond:
    def __init__(self, reason):
        self.reason = reason
        self.seen = 0

    def judge(self, norm, loss):
        self.seen += 1
        return Verdict(None if self.seen % 2 else self.reason, 1.0)

    def reset(self):
        self.seen = 0

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


class Tally(L.Callback):
    def __init__(self, file):
        self.file = file
        self.rejected = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.rejected += pl_module.rejected

    def on_train_end(self, trainer, pl_module):
        open(self.file, "w").write(str(self.rejected))

    def state_dict(self):
        return {"rejected": self.rejected}

    def load_state_dict(self, state_dict):
        self.rejected = state_dict["rejected"]


class Darkness:
    def __init__(self, texts):
        self.texts = texts

    def list_prompts(self):
        return [PicturePrompt(text) for text in self.texts]

    def score(self, prompts, pictures):
        assert {prompt.text for prompt in prompts} <= set(self.texts)
        return [-sum(picture.convert("L").tobytes()) for picture in pictures]


class Nothing:
    pass
"""
CALLBACKS = """
defaults: [default]
tally:
  _target_: outside_training.Tally
  file: ${run_dir}/tally.txt
"""
OWN = ["--config-dir=own", *FEW, "guard=every_second", "callbacks=with_tally", "hydra.run.dir=run"]


@pytest.fixture(autouse=True)
def _outside(in_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module and its YAMLs somewhere on this machine."""
    (tmp_path / "outside_training.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    for file, text in (
        ("guard/every_second.yaml", "_target_: outside_training.EverySecond\nreason: it was its turn"),
        ("guard/nothing.yaml", "_target_: outside_training.Nothing"),
        ("callbacks/with_tally.yaml", CALLBACKS),
        ("reward/night.yaml", "dark:\n  _target_: outside_training.Darkness\n  texts: [a red circle, three squares]"),
        ("reward/nothing.yaml", "none:\n  _target_: outside_training.Nothing"),
        ("callbacks/nothing.yaml", "nothing:\n  _target_: outside_training.Nothing"),
    ):
        (tmp_path / "own" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "own" / file).write_text(text)


def test_they_decide_count_and_go_on_as_ours_do(capfd: pytest.CaptureFixture[str]) -> None:
    text = run_to_success("train", capfd, *OWN)
    assert "rejected the step after 1 of stage t2i_pretrain: it was its turn" in text
    assert Path("run/tally.txt").read_text() == "1"
    states = read_checkpoint("run/checkpoints/t2i_pretrain-step=2.ckpt")["callbacks"]
    assert states["Guard"]["rule"] == {"seen": 3}  # one taken, one rejected, one taken
    assert states["Tally"] == {"rejected": 1}
    run_to_success("train", capfd, *OWN, "stage.steps=4")
    states = read_checkpoint("run/checkpoints/t2i_pretrain-step=4.ckpt")["callbacks"]
    assert states["Guard"]["rule"] == {"seen": 7}
    assert states["Tally"] == {"rejected": 3}
    assert Path("run/tally.txt").read_text() == "3"


def test_a_model_learns_from_a_reward_by_its_name(capfd: pytest.CaptureFixture[str]) -> None:
    learn = ["--config-dir=own", *FEW, "stage=reinforce", "stage.previous=null", "stage.batch_size=1", "reward=night"]
    run_to_success("train", capfd, *learn, "stage.reinforce.drawing.group_size=2", "hydra.run.dir=dark")
    before, after = read_checkpoint("dark")["policies"].values()
    assert any(not before[name].equal(after[name]) for name in before)


def test_what_is_neither_is_named_before_a_model_is_read(capfd: pytest.CaptureFixture[str]) -> None:
    text = run_to_message("train", capfd, *OWN, "guard=nothing")
    assert "guard: Nothing isn't a spike rule, it has no judge, reset, state_dict, load_state_dict" in text
    learn = ["stage=reinforce", "stage.previous=null", "reward=nothing"]
    assert "reward.none: Nothing isn't a reward, it has no list_prompts, score" in run_to_message(
        "train", capfd, *OWN, *learn
    )
    assert "callbacks: Nothing isn't a callback of Lightning" in run_to_message(
        "train", capfd, *OWN, "callbacks=nothing"
    )
