from pathlib import Path

import pytest

from tests.helpers.shared import build_once


@pytest.fixture(scope="session")
def whole_run(world_folder: Path, session_folder: Path) -> Path:
    """The run folder of the training `RUN` in a process of its own, which nothing stopped."""
    from tests.helpers.training import start_training

    def train(folder: Path) -> None:
        command = start_training(world_folder, folder)
        assert command.wait() == 0, command.text

    return build_once(session_folder / "whole_run", train)
