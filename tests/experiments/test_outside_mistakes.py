"""A part from elsewhere that can't be used is one message that names it, before a weight of the MLLM is read."""

from pathlib import Path

import pytest

from tests.helpers.commands import FEW, run_to_message
from tests.helpers.weights import refuse_weights

MODULE = """
from dataclasses import dataclass

import torch
from tbac.models.taps import TapPlan
from tbac.evaluation.benchmarks.base import PictureBenchmark


def rule(num_layers, num_blocks, start):
    return TapPlan.per_block([start] * num_blocks)


def odd_rule(num_layers, num_blocks):
    return [1, 2, 3, 4]


def failing_rule(num_layers, num_blocks):
    raise KeyError("start")


class Wide(torch.nn.Module):
    def __init__(self, num_taps, hidden_size, channels):
        super().__init__()
        self.up = torch.nn.Linear(hidden_size, channels + 1)

    def forward(self, states):
        return self.up(states)


class Broken(Wide):
    def forward(self, states):
        return self.up(states.transpose(2, 3))


class NoModule:
    def __init__(self, num_taps, hidden_size, channels):
        pass


class Failing:
    def __init__(self, **options):
        raise KeyError("no such colour")


class Plain:
    pass


@dataclass(kw_only=True, eq=False)
class NoNeeds(PictureBenchmark):
    def read_files(self): pass
    def list_targets(self): return []
    def judge_picture(self, target, picture, judge): pass
    def summarize(self, rows, judge_name): pass


@dataclass(kw_only=True, eq=False)
class Empty(NoNeeds):
    needs = "questions"


class HalfJudge:
    identity = "half"

    def ask(self, question, images):
        return "yes"


class HalfLayout:
    name, expected = "half", 1

    def __init__(self, path):
        pass
"""
PARTIAL = "\n_partial_: true"
LADDER = "defaults: [base/options@_here_, _self_]\nconnector: {{_target_: outside_mistakes.{}, _partial_: true}}"
# Command, group, text of the YAML `mine`, words of the message.
CASES = [
    ("train", "taps", "_target_: no_such_module.rule" + PARTIAL, "taps._target_=no_such_module.rule can't be found"),
    ("train", "taps", "_target_: outside_mistakes.rul" + PARTIAL, "taps._target_=outside_mistakes.rul can't be found"),
    ("train", "taps", "_target_: outside_mistakes.rule\nstart: 1", "without _partial_: true"),
    ("train", "taps", "_target_: outside_mistakes.rule" + PARTIAL, "missing a required argument: 'start'"),
    ("train", "taps", "_target_: outside_mistakes.rule\nbegin: 1" + PARTIAL, "rule can't be called"),
    ("train", "taps", "_target_: outside_mistakes.odd_rule" + PARTIAL, "must return a TapPlan"),
    ("train", "taps", "_target_: outside_mistakes.failing_rule" + PARTIAL, "failing_rule"),
    ("train", "taps", "start: 1", "taps"),
    ("train", "taps", "{ not: [yaml", "isn't YAML"),
    ("train", "taps", "- a\n- b", "taps must be a mapping"),
    ("train", "ladder", LADDER.format("Wide"), "it must be (4, 1, 2, 128), (tap, batch, token, channel)"),
    ("train", "ladder", LADDER.format("Broken"), "can't be run on states of shape (4, 1, 2, 96)"),
    ("train", "ladder", LADDER.format("NoModule"), "must make a torch module"),
    ("train", "ladder", LADDER.format("Plain"), "Plain can't be called"),
    ("train", "ladder", LADDER.format("Missing"), "outside_mistakes.Missing can't be found"),
    ("train", "guard", "_target_: outside_mistakes.Plain", "Plain isn't a spike rule"),
    ("train", "guard", "_target_: outside_mistakes.Nothing", "outside_mistakes.Nothing can't be found"),
    ("train", "guard", "_target_: outside_mistakes.Failing", "KeyError: 'no such colour'"),
    ("train", "guard", "_target_: outside_mistakes.Plain\nx: 1", "can't be called with these options"),
    ("train", "callbacks", "defaults: [default]\nx: {_target_: outside_mistakes.Plain}", "Plain isn't a callback"),
    ("train", "callbacks", "defaults: [default]\nx: {_target_: nowhere.X}", "callbacks.x._target_=nowhere.X"),
    ("train", "optim", "_target_: torch.optim.SGD\nlr: 0.1", "optim names torch.optim.SGD without _partial_: true"),
    ("train", "optim", "_target_: torch.optim.SDG\n_partial_: true", "optim._target_=torch.optim.SDG can't be found"),
    ("train", "flow", "_target_: outside_mistakes.Plain", "flow must be made by FlowOptions"),
    ("train", "logger", "_target_: nowhere.Logger", "logger._target_=nowhere.Logger can't be found"),
    ("evaluate", "benchmark", "_target_: outside_mistakes.NoNeeds\nname: x", "must define needs"),
    ("evaluate", "benchmark", "_target_: outside_mistakes.Empty\nname: x", "the benchmark x lists no picture"),
    ("evaluate", "benchmark", "_target_: outside_mistakes.Empty\nname: ../up", "benchmark.name must be a name"),
    ("evaluate", "benchmark", "_target_: outside_mistakes.Empty", "name"),
    ("evaluate", "benchmark", "_target_: outside_mistakes.Plain", "isn't derived from PictureBenchmark"),
    ("evaluate", "benchmark", "_target_: nowhere.X", "benchmark._target_=nowhere.X can't be found"),
    ("evaluate", "benchmark", "name: x", "benchmark._target_ must name a class"),
    ("evaluate", "judge", "_target_: outside_mistakes.HalfJudge", "judge: HalfJudge lacks slow"),
    ("evaluate", "judge", "_target_: nowhere.X", "judge._target_=nowhere.X can't be found"),
    ("evaluate", "judge", "_target_: outside_mistakes.Failing", "Failing failed with KeyError"),
    ("data_prep.convert", "dataset", "_target_: outside_mistakes.HalfLayout\npath: x", "lacks list_units, read"),
    ("data_prep.convert", "dataset", "_target_: nowhere.X\npath: x", "dataset._target_=nowhere.X can't be found"),
    ("data_prep.convert", "dataset", "_target_: outside_mistakes.HalfLayout", "can't be called with these options"),
]
ARGUMENTS = {
    "train": FEW,
    "evaluate": ["checkpoint=nowhere", "benchmark=dpg", "device=cpu"],
    "data_prep.convert": ["out=out"],
}


@pytest.fixture(autouse=True)
def _outside(in_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outside_mistakes.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "outside_mistakes", raising=False)
    refuse_weights(monkeypatch)


@pytest.mark.parametrize(("command", "group", "text", "words"), CASES, ids=[f"{c[1]}: {c[3][:40]}" for c in CASES])
def test_it_is_named(command: str, group: str, text: str, words: str, capfd: pytest.CaptureFixture[str]) -> None:
    file = Path("own") / group / "mine.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    shown = run_to_message(command, capfd, "--config-dir=own", *ARGUMENTS[command], f"{group}=mine")
    errors = [line for line in shown.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, shown
    assert words in shown[shown.index("error: ") :]
    assert "HYDRA_FULL_ERROR" not in shown
