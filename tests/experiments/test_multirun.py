"""Points of a multirun have folders of their own, and one that fails is one; two processes never share a folder."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tbac.app import claim_folder, name_point
from tbac.app.folders import make_new_folder
from tests.helpers.commands import FEW, run_app, run_to_message, run_to_success
from tests.helpers.configs import ROOT

SMALL = [*FEW, "callbacks.sample_grid.prompts=[]"]

# Keys that a sweep may vary, each with values that look alike.
KEYS = [
    "callbacks.guard.patience", "callbacks.guard.then", "callbacks", "machine.num_workers", "machine",
    "trainer.log_every_n_steps", "logger", "logger.name", "debug", "resume", "init", "stage.lr", "taps", "seed",
    "model.system_prompt", "+callbacks.x", "~callbacks.ema", "optim/schedule@schedule", "world@stage", "sweep",
]  # fmt: skip
VALUES = [
    "a/b",
    "a_b",
    "a b",
    "a\tb",
    "a//b",
    "A_b",
    "a,b",
    "[a,b]",
    "{a:b}",
    "1e-3",
    "0.001",
    "",
    "x" * 200,
    "猫",
    "犬",
]


@pytest.mark.parametrize("key", KEYS)
def test_points_with_other_values_have_other_folders_whichever_key_they_turn(key: str) -> None:
    names = [name_point([f"{key}={value}", "stage.steps=2"], [key.lstrip("+~")]) for value in VALUES]
    assert len(set(names)) == len(VALUES)
    assert all(len(name.encode()) <= 120 and "/" not in name and not name.startswith(".") for name in names)
    # What isn't varied of those that don't belong to the experiment is left out.
    others = ["debug.x=1", "trainer.y=2", "parent_run_id=3"]
    assert name_point([*others, f"{key}=1"], [key.lstrip("+~")]) == name_point([f"{key}=1"], [key.lstrip("+~")])


def test_a_long_name_begins_with_what_is_varied() -> None:
    long = f"stage.sources=[{{path: {'x' * 200}}}]"
    name = name_point([long, "taps=final", "seed=1", "stage.lr=1e-3"], ["taps", "seed"])
    assert name.startswith("seed=1,taps=final,stage.lr=1e-3,stage.sources=")
    assert len(name.encode()) <= 120


def test_points_over_two_keys_have_different_folders() -> None:
    pairs = list(itertools.product(VALUES, VALUES))
    names = {name_point([f"init={one}", f"machine.x={other}"], ["machine.x"]) for one, other in pairs}
    assert len(names) == len(pairs)


@pytest.mark.usefixtures("in_world")
def test_each_point_trains_in_a_folder_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    sweep = ["callbacks.guard.patience=3,4", "machine.num_workers=0,1"]
    told = run_to_success("train", capfd, "-m", *SMALL, *sweep, "hydra.sweep.dir=sweep")
    for choices in itertools.product(("patience=3", "patience=4"), ("num_workers=0", "num_workers=1")):
        assert f"| {' '.join(choices)} | 1 | " in told
    reports = sorted(Path("sweep").glob("*/report.json"))
    assert len(reports) == 4
    overrides = [yaml.safe_load((file.parent / ".hydra/overrides.yaml").read_text()) for file in reports]
    assert len({tuple(sorted(given)) for given in overrides}) == 4
    # Given again it finds all of them finished, and another one beside them is trained.
    text = run_to_success("train", capfd, "-m", *SMALL, *sweep[:1], "machine.num_workers=0,2", "hydra.sweep.dir=sweep")
    assert text.count("finished before") == 2
    assert len(list(Path("sweep").glob("*/report.json"))) == 6


@pytest.mark.usefixtures("in_world")
def test_a_point_that_fails_is_one_and_a_repeat_tries_it_again(capfd: pytest.CaptureFixture[str]) -> None:
    values = "stage.lr=1e-3,fast,1e38,2e-3"
    quick = ["stage.steps=4", "callbacks.guard.max_rejects=1", "callbacks.guard.over=1"]
    command = ["-m", *SMALL, *quick, values, "hydra.sweep.dir=sweep"]
    text = run_to_message("train", capfd, *command)
    assert "2 of 4 points finished; these failed" in text
    assert "stage.lr must be a number, positive, got 'fast'" in text
    assert "steps were rejected" in text
    assert len(list(Path("sweep").glob("*/report.json"))) == 2
    failed = {file.parent.name: file.read_text() for file in Path("sweep").glob("*/failed.txt")}
    assert {"stage.lr=fast" in name or "stage.lr=1e38" in name or "stage.lr=1e+38" in name for name in failed} == {True}
    assert len(failed) == 2
    again = run_to_message("train", capfd, *command)
    assert again.count("finished before") == 2
    assert "2 of 4 points finished" in again


@pytest.mark.usefixtures("in_world")
def test_a_point_that_can_t_be_composed_is_one_too(capfd: pytest.CaptureFixture[str]) -> None:
    text = run_to_message("train", capfd, "-m", *SMALL, "taps=deepest,final", "hydra.sweep.dir=sweep")
    assert "1 of 2 points finished; these failed" in text
    assert "Could not find 'taps/deepest'" in text
    (report,) = Path("sweep").glob("*/report.json")
    assert "taps=final" in report.parent.name


def test_an_error_of_ours_in_a_point_is_one_too(
    in_world: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import experiments.training_run as training_run

    train = training_run.train

    def fail_once(configs: Any, folder: Path, *rest: Any) -> Any:
        if "seed=1" in folder.name:
            raise RuntimeError("out of memory")
        return train(configs, folder, *rest)

    monkeypatch.setattr(training_run, "train", fail_once)
    status, text = run_app("train", capfd, "-m", *SMALL, "seed=0,1,2", "hydra.sweep.dir=sweep")
    assert status == 1
    assert "2 of 3 points finished" in text
    assert "RuntimeError: out of memory" in text
    assert len(list(Path("sweep").glob("*/report.json"))) == 2


def test_a_signal_ends_the_whole_multirun(
    in_world: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import experiments.training_run as training_run

    def stop(*_: Any, **__: Any) -> None:
        raise SystemExit(143)

    monkeypatch.setattr(training_run, "train", stop)
    status, text = run_app("train", capfd, "-m", *SMALL, "seed=0,1", "hydra.sweep.dir=sweep")
    assert status == 143
    assert text.count("to go on: ") == 1
    assert " -m " in text
    assert "hydra.sweep.dir=sweep" in text


def test_runs_of_the_same_second_have_folders_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [make_new_folder("outputs/train") for _ in range(5)]
    assert len(set(folders)) == 5
    assert all(Path(folder).is_dir() for folder in folders)
    # Processes that one launcher has started share theirs.
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert len({make_new_folder("outputs/other") for _ in range(2)}) <= 2
    assert not Path("outputs/other").exists()


HOLD = """
import sys, time
from pathlib import Path
from tbac.app import claim_folder
with claim_folder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_second_process_in_a_folder_says_so(
    in_world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    assert first.stdout.readline() == "held\n"
    try:
        text = run_to_message("train", capfd, *SMALL, f"hydra.run.dir={folder}")
        assert f"run is in use by process {first.pid} on " in text
        assert not (folder / "checkpoints").exists()
        # Further processes of the same job aren't a second one.
        monkeypatch.setenv("LOCAL_RANK", "1")
        with claim_folder(folder):
            pass
        monkeypatch.delenv("LOCAL_RANK")
    finally:
        first.kill()
        first.wait()
    with claim_folder(folder):  # the system has let go of it
        assert str(os.getpid()) in (folder / ".lock").read_text()


@pytest.mark.usefixtures("in_world")
@pytest.mark.slow
def test_a_sweep_reports_what_finished_and_what_failed(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    small = ["stage.steps=2", "stage.warmup_steps=0", "stage.val_every=1", "stage.val_samples=8", "stage.batch_size=4"]
    overrides = [*small, "callbacks.sample_grid.prompts=[]", "taps=last_n,deepest", "seed=0"]
    arguments = [
        "name=layer_selection_mini",
        f"out={tmp_path}/sweep",
        f"tracking_uri=sqlite:///{tmp_path}/mlflow.db",
        "geneval.num_inference_steps=2",
        f"overrides={json.dumps(overrides)}",
    ]
    status, text = run_app("sweep", capfd, *arguments)
    assert status == 1
    report = (tmp_path / "sweep" / "report.md").read_text()
    assert "1 of 12 points are finished" in report
    assert "These points failed" in report
    assert "Could not find 'taps/deepest'" in report
    assert "error: 1 of 12 points are finished" in text
    assert len(json.loads((tmp_path / "sweep" / "report.json").read_text())) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("in_world")
def test_points_side_by_side_are_those_of_one_after_the_other() -> None:
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    for name, options in (("plain", []), ("beside", launcher)):
        done = subprocess.run(
            [sys.executable, str(ROOT / "experiments" / "train.py"), "-m", *SMALL, *options, "stage.lr=1e-3,2e-3,-1",
             "logger=csv", f"hydra.sweep.dir={name}"],
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 1, done.stderr
        assert "2 of 3 points finished" in done.stderr
        assert "stage.lr must be positive, got -1" in done.stderr
    for file in Path("plain").glob("*/report.json"):
        losses = [json.loads(path.read_text()) for path in (file, "beside" / file.relative_to("plain"))]
        assert losses[0]["val_loss_last"] == losses[1]["val_loss_last"]
    assert len(list(Path("beside").glob("*/report.json"))) == 2
