"""A tap rule and a connector defined outside the package, used by name from YAML alone."""

import json
import sys
from pathlib import Path

import pytest
import torch

from tbac.models import UniImage
from tbac.models.saved import read_checkpoint
from tests.helpers.commands import FEW, run_to_message, run_to_success

MODULE = """
import torch
from tbac.models.taps import TapPlan


def every_second(num_layers, num_blocks, start):
    return TapPlan.per_block([start + 2 * (block // 2) for block in range(num_blocks)])


class Bottleneck(torch.nn.Module):
    per_token = True

    def __init__(self, num_taps, hidden_size, channels, width):
        super().__init__()
        assert num_taps == 2
        self.down, self.up = torch.nn.Linear(hidden_size, width), torch.nn.Linear(width, channels)

    def forward(self, states):
        return self.up(self.down(states))


class Mixing(Bottleneck):
    per_token = False
"""
TAPS = "_target_: outside_models.every_second\n_partial_: true\nstart: 1\n"
LADDER = """
defaults:
  - base/options@_here_
  - _self_
connector:
  _target_: outside_models.Bottleneck
  _partial_: true
  width: 8
"""
OWN = ["--config-dir=own", *FEW, "taps=every_second"]
BOTTLENECK = ["ladder=bottleneck", "ladder.prompt_context=true"]
CONNECTOR = "connector={_target_: outside_models.Bottleneck, _partial_: true, width: 8}"


@pytest.fixture(autouse=True)
def _outside(in_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module and its YAMLs somewhere on this machine."""
    (tmp_path / "outside_models.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    for file, text in (("taps/every_second.yaml", TAPS), ("ladder/bottleneck.yaml", LADDER)):
        (tmp_path / "own" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "own" / file).write_text(text)


def forget_module() -> None:
    """As in a process on a machine that doesn't have it."""
    sys.modules.pop("outside_models", None)
    Path("outside_models.py").unlink()
    sys.path_importer_cache.clear()


def test_a_rule_s_plan_is_all_that_a_checkpoint_keeps_of_it(capfd: pytest.CaptureFixture[str]) -> None:
    run_to_success("train", capfd, *OWN, "hydra.run.dir=run")
    config = read_checkpoint("run")["tbac"]["config"]["model"]
    assert config["taps"] == {"layers": [1, 3], "assignment": [0, 0, 1, 1], "mixed": False, "num_blocks": 4}
    assert "outside_models" not in json.dumps(config)
    forget_module()
    run_to_success("generate", capfd, "checkpoint=run", "prompts=[a red circle]", "num_inference_steps=1", "out=made")
    assert Path("made/00000.png").is_file()
    assert UniImage.from_checkpoint("run").ladder.plan.list_block_layers() == [1, 1, 3, 3]


def test_a_rule_s_mistakes_are_named_as_ours_are(capfd: pytest.CaptureFixture[str]) -> None:
    assert "tap index 8 is out of range" in run_to_message("train", capfd, *OWN, "taps.start=6")
    text = run_to_message("train", capfd, *OWN, "~taps.start")
    assert "the tap rule every_second can't be called with what it is given: missing a required argument" in text


def test_a_connector_trains_is_exported_and_opened_where_it_is_given(capfd: pytest.CaptureFixture[str]) -> None:
    # It reads each token apart, so the prompt's tokens may join the queries.
    run_to_success("train", capfd, *OWN, *BOTTLENECK, "hydra.run.dir=run")
    checkpoint = read_checkpoint("run")
    assert checkpoint["tbac"]["config"]["model"]["ladder"]["connector"] == "outside_models.Bottleneck"
    assert checkpoint["state_dict"]["ladder.connector.down.weight"].shape == (8, 96)
    # Whoever opens it gives the class; what the file names is not imported.
    text = run_to_message("export", capfd, "checkpoint=run", "out=out")
    assert "error: run: ladder.connector is outside_models.Bottleneck, which isn't one of tbac's" in text
    text = run_to_message("export", capfd, "checkpoint=run", "out=out", CONNECTOR.replace("width: 8", "width: 9"))
    assert "error: run doesn't fit this model: ladder.connector.down.weight has shape (8, 96), expected (9, 96)" in text
    run_to_success("export", capfd, "checkpoint=run", "out=out", CONNECTOR)
    run_to_success(
        "generate", capfd, "checkpoint=out", "prompts=[a red circle]", "num_inference_steps=1", "out=made", CONNECTOR
    )
    with pytest.raises(ValueError, match=r"out/config\.json: ladder\.connector is outside_models\.Bottleneck"):
        UniImage.from_pretrained("out")

    def build(num_taps: int, hidden_size: int, channels: int) -> torch.nn.Module:
        return sys.modules["outside_models"].Bottleneck(num_taps, hidden_size, channels, 8)

    model = UniImage.from_pretrained("out", connector=build)
    state = model.get_trained_state()
    assert all(torch.equal(tensor, state[name]) for name, tensor in checkpoint["state_dict"].items())
    # Training goes on from it by the user's own config.
    run_to_success("train", capfd, *OWN, *BOTTLENECK, "stage.steps=3", "hydra.run.dir=next", "resume=run")
    run_to_success("train", capfd, *OWN, *BOTTLENECK, "hydra.run.dir=tuned", "init=out")
    assert "ladder.connector is outside_models.Bottleneck" in run_to_message("train", capfd, *OWN, "init=out")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("~ladder.connector.width", "ladder.connector Bottleneck can't be called with what it is given: missing"),
        ("ladder.connector=outside_models.Bottleneck", "ladder.connector must be one of shared_mlp"),
        ("ladder.connector._target_=outside_models.every_second", "can't be called with what it is given"),
    ],
)
def test_a_connector_s_mistakes_are_named(override: str, words: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert words in run_to_message("train", capfd, *OWN, "ladder=bottleneck", override)


def test_the_prompt_joins_only_where_tokens_are_read_apart(capfd: pytest.CaptureFixture[str]) -> None:
    text = run_to_message("train", capfd, *OWN, *BOTTLENECK, "ladder.connector._target_=outside_models.Mixing")
    assert "ladder.prompt_context needs ladder.connector=shared_mlp or per_tap_mlp, or a connector of your own" in text
