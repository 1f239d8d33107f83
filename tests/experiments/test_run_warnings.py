"""What a run is warned of before it begins."""

import logging

import pytest

from experiments.train import warn_of_other_validation
from tests.helpers.configs import compose_config

OWN = "stage.sources=[{path: mine}]"


@pytest.mark.parametrize(
    ("overrides", "warned"),
    [
        ([OWN], True),
        ([f"+{OWN}"], True),
        ([OWN, "stage.val_sources=[{path: mine, split: val}]"], False),
        (["stage.lr=1e-3"], False),
    ],
)
def test_sources_of_one_s_own_with_the_world_s_validation(
    overrides: list[str], warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = compose_config("train", "run_dir=.")
    with caplog.at_level(logging.WARNING):
        warn_of_other_validation(cfg, overrides)
    assert ("the validation loss is of" in caplog.text) == warned
    assert (str(cfg.stage.val_sources[0].path) in caplog.text) == warned
