"""Starts commands in separate processes without the seconds that imports take.

One process has imported what training needs, and each command is forked from it (multiprocessing's forkserver). A
command has a separate environment, process group and exit status, and can be signalled and killed like any other
process.
"""

import importlib
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

IMPORTED = ["experiments.train", "experiments.training_run", "experiments.evaluate", "tests.helpers.processes"]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(IMPORTED)


@dataclass
class Command:
    """A command that was started; `text` is what it has written so far."""

    process: multiprocessing.process.BaseProcess
    output: Path

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def text(self) -> str:
        return self.output.read_text()

    def poll(self) -> int | None:
        """The exit status, minus the signal that ended it; None while it runs."""
        return self.process.exitcode

    def wait(self, timeout: float = 300) -> int:
        """Wait until it ends; returns the exit status."""
        self.process.join(timeout)
        status = self.process.exitcode
        if status is None:
            self.kill()
            raise TimeoutError(f"still running after {timeout} s: {self.text[-2000:]}")
        return status

    def kill(self) -> None:
        """Kill it and the processes that it has started."""
        os.killpg(self.pid, signal.SIGKILL)
        self.process.join()


def start_command(module: str, arguments: list[str], output: Path, environment: Mapping[str, str]) -> Command:
    """Start a command in the present folder.

    Args:
        module: its module, whose `main` is called.
        arguments: what would follow its name on a command line.
        output: a file that receives what is written, to both streams.
        environment: variables besides those of this process.
    """
    variables = dict(os.environ) | dict(environment)
    target = (module, arguments, output.absolute(), variables, Path.cwd())
    output.parent.mkdir(parents=True, exist_ok=True)
    output.touch()
    process = _context.Process(target=_run_in_child, args=target)
    process.start()
    return Command(process, output)


def _run_in_child(module: str, arguments: list[str], output: Path, variables: dict[str, str], folder: Path) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if "LOCAL_RANK" in variables:
        from lightning.pytorch.utilities import rank_zero_only

        # Lightning reads the rank when it is imported, which was before the fork.
        rank_zero_only.rank = int(variables["LOCAL_RANK"])
    sys.argv = [f"{module}.py", *arguments]
    importlib.import_module(module).main()


def make_rank_variables(count: int) -> list[dict[str, str]]:
    """Make the variables that a launcher sets for each of `count` processes that train together on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [
        {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0", "LOCAL_RANK": str(rank)}
        for rank in range(count)
    ]
