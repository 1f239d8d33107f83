"""A user's mistake ends in a message; an error of ours stays one."""

import pytest
from hydra.errors import InstantiationException
from omegaconf import DictConfig

from tbac.app import name_point, report_user_errors


def failing(cause: Exception) -> None:
    @report_user_errors
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


def test_the_folder_of_a_point_names_its_overrides_and_not_those_of_the_machine() -> None:
    overrides = ["taps=last_n", "stage.lr=0.001", "machine=cuda", "+callbacks.x={a:1,b:2}", "logger=csv"]
    assert name_point(overrides) == "stage.lr=0.001,taps=last_n"
    assert name_point(["machine=cuda"]) == "default"
    assert name_point(["taps.layers=[1,2,3]"]) == "taps.layers=[1,2,3]"
    assert name_point(overrides, ["machine"]) == "machine=cuda,stage.lr=0.001,taps=last_n"


def test_long_names_stay_short_and_distinct() -> None:
    names = {name_point([f"init=/a/{letter * 300}", f"stage.lr={lr}"]) for lr in (1, 2) for letter in ("b", "猫")}
    assert len(names) == 4
    assert all(len(name.encode()) <= 120 and "/" not in name for name in names)
