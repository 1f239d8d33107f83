"""The commands, run in the process of the test."""

import importlib
import sys

import pytest
from hydra.core.global_hydra import GlobalHydra

FEW = ["world=shapes", "debug=few_steps", "stage.steps=2"]  # a training of two small steps


def run_app(name: str, capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Run an application in this process; returns exit status and what it printed.

    `name` is that of its module, in `experiments` unless it begins with `data_prep.`.
    """
    module = importlib.import_module(name if name.startswith("data_prep.") else f"experiments.{name}")
    GlobalHydra.instance().clear()
    argv, sys.argv = sys.argv, [f"{name}.py", *arguments]
    try:
        module.main()
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        sys.argv = argv
        GlobalHydra.instance().clear()
    captured = capfd.readouterr()
    return status, captured.out + captured.err


def run_to_message(name: str, capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The text of a failing run, checked to be a message instead of a traceback."""
    status, text = run_app(name, capfd, *arguments)
    assert status != 0, text
    assert "Traceback" not in text
    return text


def run_to_success(name: str, capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The text of a run that succeeds."""
    status, text = run_app(name, capfd, *arguments)
    assert status == 0, text
    return text
