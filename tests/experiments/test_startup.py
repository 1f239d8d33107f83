"""Commands answer at once: nothing heavy is imported before the config is known to be good."""

import json
import resource
import subprocess
import sys

import pytest

from tests.helpers.configs import ROOT

HEAVY = ("torch", "lightning", "transformers", "diffusers", "mlflow", "webdataset", "submitit", "numpy")
COMMANDS = sorted(
    file.relative_to(ROOT).as_posix()
    for top in ("experiments", "data_prep")
    for file in (ROOT / top).rglob("*.py")
    if "@command(" in file.read_text()
)
# Runs command lines one after the other; prints exit status, heavy modules that were imported, and the text of each.
RUN = """
import contextlib, io, json, runpy, sys
from hydra.core.global_hydra import GlobalHydra

lines, heavy, found = json.loads(sys.argv[1]), json.loads(sys.argv[2]), []
for file, *arguments in lines:
    sys.argv, text, status = [file, *arguments], io.StringIO(), 0
    try:
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            runpy.run_path(file, run_name="__main__")
    except SystemExit as end:
        status = end.code or 0
    GlobalHydra.instance().clear()
    found.append([status, [name for name in heavy if name in sys.modules], text.getvalue()])
    heavy = [name for name in heavy if name not in sys.modules]  # what one has imported isn't held against the next
print(json.dumps(found))
"""


def run_all(lines: list[list[str]]) -> list[tuple[int, list[str], str]]:
    """Exit status, heavy modules and text of each command line, run one after the other in one fresh process."""
    command = [sys.executable, "-c", RUN, json.dumps(lines), json.dumps(HEAVY)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_no_command_imports_anything_heavy_at_its_top() -> None:
    modules = [file.removesuffix(".py").replace("/", ".") for file in COMMANDS]
    assert "experiments.train" in modules
    script = f"import sys, {', '.join(modules)}; print(*[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


@pytest.mark.slow
def test_help_of_every_command_imports_nothing_heavy() -> None:
    shown = run_all([[file, "--help"] for file in COMMANDS])
    assert [status for status, _, _ in shown] == [0] * len(COMMANDS)
    assert all("usage: python " in text for _, _, text in shown)
    assert all(f"usage: python {file} " in text for file, (_, _, text) in zip(COMMANDS, shown, strict=True))
    assert {file: imported for file, (_, imported, _) in zip(COMMANDS, shown, strict=True) if imported} == {}


def test_a_mistake_in_the_config_is_told_before_anything_heavy_is_imported() -> None:
    mistakes = {
        "stage.lrr=1": "Key 'lrr' is not in struct",
        "taps=deep": "Could not find 'taps/deep'",
        "x=1": "Key 'x'",
    }
    told = run_all([["experiments/train.py", "world=shapes", mistake] for mistake in mistakes])
    for words, (status, imported, text) in zip(mistakes.values(), told, strict=True):
        assert (status, imported) == (1, [])
        assert words in text
        assert "Traceback" not in text


def test_help_takes_little_of_a_processor_s_time() -> None:
    """At most 2 s by the clock where nothing else runs; processor time is counted, as other work doesn't change it."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "experiments/train.py", "--help"], cwd=ROOT, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 4.0
