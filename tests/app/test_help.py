"""What a command says of its options, and of what isn't there yet."""

from pathlib import Path

import pytest

from tbac.app.errors import list_hints
from tbac.app.help import describe_options, read_with_bases
from tests.helpers.configs import ROOT

CONF = ROOT / "conf"


def test_help_shows_a_command_s_own_options_with_their_comments() -> None:
    text = describe_options(CONF, "train", "experiments/train.py", ["stage=finetune", "optim=adamw8bit"])
    assert "init: null                # checkpoint, run folder or exported folder" in text
    assert "usage: python experiments/train.py NAME=VALUE" in text
    assert "weight_decay: 0.05" in text
    assert "== stage=finetune   (of finetune, " in text
    assert "== optim=adamw8bit" in text
    assert "== world@stage=shapes/finetune" in text
    assert "seconds: 30             # between plain lines" in text  # of a file that callbacks/default names
    for other in ("benchmark:", "dataset:", "hydra:", "defaults:", "transformer:"):
        assert not [line for line in text.splitlines() if line.startswith(other)]


def test_the_world_chooses_the_model_that_help_shows() -> None:
    assert "== model=shapes" in describe_options(CONF, "train", "x.py")
    real = describe_options(CONF, "train", "x.py", ["world=real"])
    assert "== model=qwen2_5_vl_3b_sana_1600m" in real
    assert "== world@stage=real/t2i_pretrain" in real


def test_a_group_that_is_not_needed_is_named_with_its_files() -> None:
    text = describe_options(CONF, "convert", "data_prep/convert.py")
    assert "val_share: 0.05         # of the samples, at most" in text
    assert "dataset: blip3o_60k, " in text
    base, own = read_with_bases(CONF / "stage" / "ti2i_pretrain.yaml")
    assert "name: t2i_pretrain" in base
    assert "name: ti2i_pretrain" in own


@pytest.mark.parametrize(
    ("message", "made_by"),
    [
        ("model.mllm=outputs/shapes/backbones/mllm: no such folder", "data_prep/shapes/build.py"),
        ("shard folder outputs/words/data/t2i doesn't exist", "make words"),
        ("checkpoint outputs/demo/model doesn't exist", "make demo"),
        ("checkpoint outputs/demonstration doesn't exist", None),
        ("checkpoint other/outputs/demo doesn't exist", None),
    ],
)
def test_what_is_missing_is_named_with_the_command_that_makes_it(
    message: str, made_by: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("TBAC_SHAPES", "TBAC_WORDS"):
        monkeypatch.delenv(variable, raising=False)
    hints = list_hints(message)
    assert [made_by in hint for hint in hints if made_by] == ([True] if made_by else [])
    for folder in ("shapes", "words", "demo"):
        Path("outputs", folder).mkdir(parents=True)
    assert list_hints(message) == []
