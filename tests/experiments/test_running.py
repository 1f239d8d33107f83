"""The parts of a benchmark run one by one, keep what they have, and go on."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.speed.running import run_parts

CPU = torch.device("cpu")


def count_up(cfg: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Says how often it ran."""
    count = len(list(Path(cfg["counts"]).iterdir()))
    (Path(cfg["counts"]) / str(count)).touch()
    return {"table": f"| {count} |", "line": f"ran {count + 1} times"}


def stop_half_way(cfg: dict[str, Any], device: torch.device) -> Iterator[dict[str, Any]]:
    """Finds one thing, then ends as a killed process does."""
    yield {"table": "| one |", "cases": {"one": 1}}
    os.kill(os.getpid(), signal.SIGKILL)


def take_forever(cfg: dict[str, Any], device: torch.device) -> Iterator[dict[str, Any]]:
    """Finds one thing, starts a process, and never comes to an end."""
    child = subprocess.Popen(["sleep", "600"])
    yield {"cases": {"child": child.pid}, "table": "| one |"}
    time.sleep(600)


def fail(cfg: dict[str, Any], device: torch.device) -> dict[str, Any]:
    raise OSError("no such device")


def settings(tmp_path: Path, **limits: float) -> dict[str, Any]:
    (tmp_path / "counts").mkdir(exist_ok=True)
    return {"counts": str(tmp_path / "counts"), "limits_s": limits}


@pytest.mark.parametrize(
    ("part", "problem", "kept"),
    [
        (stop_half_way, "it ended without a result", {"one": 1}),
        (fail, "OSError: no such device", None),
    ],
)
def test_a_part_that_fails_leaves_the_others_results(tmp_path: Path, part: Any, problem: str, kept: Any) -> None:
    parts = {"before": count_up, "bad": part, "after": count_up}
    found = run_parts(parts, settings(tmp_path, bad=100.0), CPU, tmp_path / "out")
    assert problem in found["bad"]["error"]
    assert found["bad"].get("cases") == kept
    assert [found[name]["line"] for name in ("before", "after")] == ["ran 1 times", "ran 2 times"]
    for name in parts:
        assert json.loads((tmp_path / f"out/{name}.json").read_text()).items() >= found[name].items()
    assert problem in (tmp_path / "out/bad.md").read_text()


@pytest.mark.slow
def test_a_part_that_is_too_slow_ends_with_all_that_it_started(tmp_path: Path) -> None:
    found = run_parts({"slow": take_forever}, settings(tmp_path, slow=20.0), CPU, tmp_path / "out")
    assert "it took more than its 20.0 s" in found["slow"]["error"]
    assert not _is_running(found["slow"]["cases"]["child"])


def test_what_is_there_of_the_same_config_is_kept_and_failures_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = settings(tmp_path)
    parts = {"one": count_up, "bad": fail}
    first = run_parts(parts, cfg, CPU, tmp_path / "out")
    again = run_parts(parts | {"bad": count_up}, cfg, CPU, tmp_path / "out")
    assert again["one"]["line"] == first["one"]["line"] == "ran 1 times"
    assert again["bad"]["line"] == "ran 2 times"
    assert "one: kept from" in capsys.readouterr().out
    other = run_parts({"one": count_up}, cfg | {"repeats": 3}, CPU, tmp_path / "out")
    assert other["one"]["line"] == "ran 3 times"
    (tmp_path / "out/one.json").write_text("{half")
    assert run_parts({"one": count_up}, cfg, CPU, tmp_path / "out")["one"]["line"] == "ran 4 times"


def test_a_benchmark_that_is_ended_ends_its_part(tmp_path: Path) -> None:
    code = (
        "import sys, torch, pathlib; from experiments.speed.running import run_parts;"
        "from tests.experiments.test_running import take_forever, settings; folder = pathlib.Path(sys.argv[1]);"
        "run_parts({'slow': take_forever}, settings(folder, slow=300.0), torch.device('cpu'), folder / 'out')"
    )
    root = Path(__file__).resolve().parents[2]
    running = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=root)
    deadline = time.monotonic() + 120
    while not _descendants(running.pid) and time.monotonic() < deadline:
        time.sleep(0.2)
    sleeping = _descendants(running.pid)
    assert sleeping
    running.send_signal(signal.SIGTERM)
    assert running.wait(60) == 143
    deadline = time.monotonic() + 30
    while any(map(_is_running, sleeping)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(map(_is_running, sleeping))


def _is_running(pid: int) -> bool:
    """Whether a process is there and hasn't ended."""
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def _descendants(pid: int) -> list[int]:
    """Processes named sleep that descend from a process."""
    found, parents = [], {pid}
    for status in sorted(Path("/proc").glob("[0-9]*/stat"), key=lambda file: int(file.parent.name)):
        try:
            name, rest = status.read_text().split("(", 1)[1].rsplit(")", 1)
        except OSError:
            continue
        if int(rest.split()[1]) in parents:
            parents.add(int(status.parent.name))
            if name == "sleep":
                found.append(int(status.parent.name))
    return found
