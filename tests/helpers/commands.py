"""Runs the commands in the process of the test."""

import importlib
import logging
import sys

import pytest
from hydra.core.global_hydra import GlobalHydra

FEW = ["world=shapes", "debug=few_steps", "stage.steps=2"]  # a training of two small steps


def run_app(name: str, capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Run a command in this process.

    Args:
        name: its module, in `experiments` unless the name begins with `data_prep.`.
        capfd: captures what it prints.
        arguments: its overrides.

    Returns:
        its exit status, and all that it printed.
    """
    forget_closed_streams()
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


def forget_closed_streams() -> None:
    """Remove the logging handlers that commands of earlier tests have left, whose captured streams are closed now."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        if getattr(getattr(handler, "stream", None), "closed", False):
            root.removeHandler(handler)


def run_to_message(name: str, capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must fail with a message, not a traceback; returns what it printed."""
    status, text = run_app(name, capfd, *arguments)
    assert status != 0, text
    assert "Traceback" not in text
    return text


def run_to_success(name: str, capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must succeed; returns what it printed."""
    status, text = run_app(name, capfd, *arguments)
    assert status == 0, text
    return text
