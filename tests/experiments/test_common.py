"""A user's mistake ends in a message; an error of ours stays one."""

import pytest
from hydra.errors import InstantiationException
from omegaconf import DictConfig

from experiments.common import user_errors


def failing(cause: Exception) -> None:
    @user_errors
    def main(cfg: DictConfig) -> None:
        raise InstantiationException("Error in call to target") from cause

    main(DictConfig({}))


def test_a_wrapped_mistake_is_told_in_its_own_words(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        failing(ValueError("stage.lr must be positive, got -1"))
    assert end.value.code == 1
    assert capfd.readouterr().err == "error: stage.lr must be positive, got -1\n"


def test_a_wrapped_error_of_ours_is_not_shown_as_the_user_s() -> None:
    with pytest.raises(InstantiationException):
        failing(RuntimeError("a view was modified"))
