"""What is told to MLflow."""

import contextlib
import os
import shutil
import signal
import sqlite3
import time
from pathlib import Path
from typing import Any

import mlflow
import pytest
from lightning.pytorch.loggers.logger import DummyLogger
from PIL import Image

from tbac.models import UniImage
from tbac.training.callbacks.throughput import Throughput
from tbac.training.interruptions import INTERRUPTION
from tbac.training.run_logger import RunLogger
from tbac.training.system_metrics import SystemMetrics
from tbac.training.tracking import (
    RUN_ID,
    ParentRun,
    add_to_run,
    describe_end,
    find_run_id,
    list_links,
    make_mlflow_logger,
    make_tag_name,
    open_parent_run,
    open_store,
)
from tests.helpers.pictures import make_noise_image
from tests.helpers.training import make_data, make_module, make_trainer


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("data/outputs/shapes/t2i", "data/outputs/shapes/t2i"),
        ("data//mnt/shards", "data/mnt/shards"),
        ("data/../shards/./a b", "data/shards/a b"),
        ("data/~/Bilder-ü/x@y", "data/_/Bilder-ü/x_y"),
        ("git_revision", "git_revision"),
    ],
)
def test_paths_become_names_that_mlflow_takes(path: str, name: str) -> None:
    assert make_tag_name(path) == name


@pytest.mark.parametrize("fails", [False, True])
def test_a_parent_run_ends_as_its_block_does(fails: bool, tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path}/x.db"
    with contextlib.suppress(RuntimeError), open_parent_run(store, "tbac", "demo") as parent:
        parent.log_metrics({"a": 1.0})
        if fails:
            raise RuntimeError("half-way")
    client = mlflow.MlflowClient(store)
    (experiment,) = [e for e in client.search_experiments() if e.name == "tbac"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == ("FAILED" if fails else "FINISHED")
    assert run.data.metrics == {"a": 1.0}


@pytest.mark.parametrize(
    ("end", "word"),
    [
        (KeyboardInterrupt(), "killed"),
        (SystemExit(130), "killed"),
        (SystemExit(1), "failed"),
        (RuntimeError(), "failed"),
    ],
)
def test_an_interrupted_run_was_killed_and_others_failed(end: BaseException, word: str) -> None:
    assert describe_end(end) == word


def log_sweep(store: str, name: str) -> ParentRun:
    """Log a run that has a child."""
    parent = ParentRun(store, "tbac", name)
    child = make_mlflow_logger(store, parent_run_id=parent.run_id)
    child.log_metrics({"val/loss": 0.5}, 0)
    child.finalize("success")
    parent.finish()
    return parent


@pytest.mark.parametrize("damage", ["experiment", "parent", "file"])
def test_pages_are_listed_as_far_as_they_can_be(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store, address = f"sqlite:///{tmp_path}/{damage}.db", "http://127.0.0.1:5000"
    parent = log_sweep(store, "sweep")
    assert "runs of sweep" in list_links(store, address)
    client = mlflow.MlflowClient(store)
    if damage == "experiment":
        client.delete_experiment(client.get_experiment_by_name("tbac").experiment_id)
    elif damage == "parent":  # removed for good, as `mlflow gc` does
        client.delete_run(parent.run_id)
        with contextlib.closing(sqlite3.connect(tmp_path / f"{damage}.db")) as database:
            for table in ("tags", "params", "metrics", "latest_metrics", "runs"):
                database.execute(f"DELETE FROM {table} WHERE run_uuid = ?", (parent.run_id,))
            database.commit()
    else:
        (tmp_path / f"{damage}.db").write_text("no database")
    links = list_links(store, address)
    assert links["the first page"] == address
    assert not [name for name in links if name.startswith("runs of")]
    if damage == "experiment":  # what is logged now is listed again
        log_sweep(store, "again")
        assert "runs of again" in list_links(store, address)


def test_a_moved_folder_keeps_its_artifacts_and_later_scores_leave_the_run_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "before").mkdir()
    monkeypatch.chdir(tmp_path / "before")
    store = "sqlite:///outputs/moved.db"
    make_noise_image(1).save("picture.png")
    logger = make_mlflow_logger(store, run_id_file=str(Path("outputs/run") / RUN_ID))
    logger.log_metrics({"val/loss": 0.5}, 0)
    logger.log_picture(Path("picture.png"), "val/samples", 7)
    logger.finalize("killed")
    run_id = find_run_id(Path("outputs/run/checkpoints/x.ckpt"))
    assert run_id == logger.version
    assert find_run_id(Path("elsewhere/checkpoints/x.ckpt")) is None

    (tmp_path / "before").rename(tmp_path / "after")
    monkeypatch.chdir(tmp_path / "after")
    shutil.copy("outputs/moved.db", "outputs/copied.db")  # MLflow keeps the connection to an address
    store = "sqlite:///outputs/copied.db"
    client = mlflow.MlflowClient(store)
    ended = client.get_run(run_id)
    assert ended.info.status == "KILLED"
    (picture,) = [f.path for f in client.list_artifacts(run_id, "images") if f.path.endswith(".png")]
    with Image.open(client.download_artifacts(run_id, picture)) as kept, Image.open("picture.png") as drawn:
        assert kept.tobytes() == drawn.tobytes()
    for _ in range(2):
        assert add_to_run(store, run_id, {"geneval/overall": 0.25}, 60, [Path("picture.png")])
    scored = client.get_run(run_id)
    assert scored.info.end_time == ended.info.end_time
    assert scored.info.status == "KILLED"
    assert [m.step for m in client.get_metric_history(run_id, "geneval/overall")] == [60]
    assert not add_to_run(store, "0" * 32, {"geneval/overall": 0.25})


def test_a_machine_is_measured_until_that_fails_and_training_never_hears_of_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Monitor:
        left = 3

        def collect_metrics(self) -> None:
            self.left -= 1
            if not self.left:
                raise RuntimeError("the driver is gone")

        def aggregate_metrics(self) -> dict[str, float]:
            return {"left": float(self.left)}

        def clear_metrics(self) -> None:
            pass

    sent: list[tuple[Any, int]] = []
    system = SystemMetrics([Monitor()], lambda metrics, number: sent.append((metrics, number)), every=0.01)
    for _ in range(200):
        if "the driver is gone" in caplog.text:
            break
        time.sleep(0.02)
    system.stop()
    assert sent == [({"system/left": 2.0}, 0), ({"system/left": 1.0}, 1)]
    assert "the machine isn't measured any more (RuntimeError: the driver is gone)" in caplog.text


def test_the_samples_taken_of_each_source_are_logged(model: UniImage) -> None:
    world = os.environ["TBAC_SHAPES"]
    sources = ",".join(
        f"{{path: {world}/data/{name}, split: train, weight: {w}}}" for name, w in (("t2i", 3), ("edit", 1))
    )
    data = make_data(model, "stage=ti2i_pretrain", f"stage.sources=[{sources}]")
    trainer = make_trainer(8, callbacks=[Throughput(every=4)])
    trainer.fit(make_module(model, steps=8), datamodule=data)
    logged = {k.removeprefix("train/drawn/"): v.item() for k, v in trainer.logged_metrics.items() if "drawn" in k}
    assert logged == data.drawn
    assert set(logged) == {"t2i-train", "edit-train"}
    assert sum(logged.values()) == 32
    assert logged["t2i-train"] > logged["edit-train"] > 0


def test_a_store_whose_maker_is_killed_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file with some of its tables could never be opened again, by MLflow's own account: table already exists."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"

    def kill(*_: object) -> None:
        assert not (tmp_path / "mlflow.db").exists()  # whatever is being made has another name
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tbac.training.tracking.store.os.replace", kill)
        with pytest.raises(KeyboardInterrupt):
            open_store(uri)
    (unfinished,) = tmp_path.glob("mlflow.db.*.unfinished")
    unfinished.write_bytes(unfinished.read_bytes()[:4096])
    assert open_store(uri).create_experiment("made") == "1"
    assert not list(tmp_path.glob("*.unfinished"))
    assert [e.name for e in open_store(uri).search_experiments(filter_string="name = 'made'")] == ["made"]


@pytest.mark.parametrize(("received", "status"), [(signal.SIGINT, "killed"), (None, "failed")])
def test_a_fit_that_a_signal_ends_was_killed(
    received: signal.Signals | None, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ends(DummyLogger):
        said = ""

        def finalize(self, status: str) -> None:
            self.said = status

    monkeypatch.setattr(INTERRUPTION, "received", received)
    own = Ends()
    RunLogger(own).finalize("failed")  # what Lightning says of every exception
    assert own.said == status
