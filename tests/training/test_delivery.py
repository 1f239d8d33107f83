"""Whatever befalls MLflow, logging neither raises nor waits, and nothing is lost without a word."""

import json
import logging
import os
import shutil
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from tbac.training import delivery
from tbac.training.run_logger import RunLogger
from tbac.training.tracking import UNSENT, RunDescription, log_run, make_mlflow_logger
from tbac.training.tracking.store import make_tables
from tests.helpers.shared import build_once

LOGGED = 12  # steps that are logged, half of them after the fault
LONGEST_CALL = 0.5  # seconds that a call may take; the next step of training waits for it


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "FIRST_WAIT", 0.05)
    monkeypatch.setattr(delivery, "SLOWEST", 20.0)
    monkeypatch.setattr(delivery, "PATIENCE", 1.5)
    for name, value in (("MAX_RETRIES", "0"), ("TIMEOUT", "2")):
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{name}", value)


@pytest.fixture
def store(session_folder: Path, tmp_path: Path) -> str:
    """A store with its tables, which take seconds to make."""
    ready = build_once(session_folder / "mlflow_store", lambda folder: make_tables(folder / "store.db"))
    shutil.copy(ready / "store.db", tmp_path / "x.db")
    return f"sqlite:///{tmp_path}/x.db"


@pytest.fixture
def port() -> Iterator[int]:
    """A port that accepts connections and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(50)
        yield listening.getsockname()[1]


def file_of(store: str) -> Path:
    return Path(store.removeprefix("sqlite:///"))


def client_of(store: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(store)


def lock(store: str, stack: ExitStack) -> None:
    held = stack.enter_context(closing(sqlite3.connect(file_of(store), check_same_thread=False)))
    held.execute("BEGIN EXCLUSIVE")


def lock_for_a_while(store: str, stack: ExitStack) -> None:
    held = sqlite3.connect(file_of(store), check_same_thread=False)
    held.execute("BEGIN EXCLUSIVE")
    timer = threading.Timer(1.0, held.rollback)
    timer.start()
    stack.callback(timer.join)


def delete_store(store: str, stack: ExitStack) -> None:
    file_of(store).unlink()


def spoil_store(store: str, stack: ExitStack) -> None:
    file_of(store).write_bytes(b"not a database" * 5000)


def empty_store(store: str, stack: ExitStack) -> None:
    os.truncate(file_of(store), 0)


def make_store_old(store: str, stack: ExitStack) -> None:
    with closing(sqlite3.connect(file_of(store))) as db:
        db.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
        db.commit()


def fill_store(store: str, stack: ExitStack) -> None:
    """No page can be added, as on a full disk."""
    file = file_of(store)
    file.unlink()
    file.mkdir()


def delete_run(store: str, stack: ExitStack) -> None:
    client = client_of(store)
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    client.delete_run(run.info.run_id)


def delete_experiment(store: str, stack: ExitStack) -> None:
    client = client_of(store)
    client.delete_experiment(client.get_experiment_by_name("tbac").experiment_id)


def remove_run_for_good(store: str, stack: ExitStack) -> None:
    with closing(sqlite3.connect(file_of(store))) as db:
        for table in ("metrics", "latest_metrics", "tags", "params", "runs"):
            db.execute(f"DELETE FROM {table}")
        db.commit()


FAULTS: dict[str, Callable[[str, ExitStack], None]] = {
    f.__name__: f
    for f in (
        lock, lock_for_a_while, delete_store, spoil_store, empty_store, make_store_old, fill_store, delete_run,
        delete_experiment, remove_run_for_good,
    )
}  # fmt: skip


# After these a run goes on in the store, where a deleted one is made anew.
RECOVERS = ("delete_store", "empty_store", "lock_for_a_while", "delete_run", "delete_experiment")


def wait_until_delivered(logger: RunLogger) -> bool:
    """Whether all is delivered, for which it waits for as long as making a store may take."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if logger.logger.delivery.flush(1.0):
            return True
    return False


def list_steps(store: str) -> set[int]:
    """The steps that are in any run of a store; none where it can't be read."""
    try:
        with closing(sqlite3.connect(f"file:{file_of(store)}?mode=ro", uri=True, timeout=0.1)) as db:
            return {step for (step,) in db.execute("SELECT step FROM metrics WHERE key = 'x'")}
    except sqlite3.Error:
        return set()


def list_kept(folder: Path) -> set[int]:
    file = folder / UNSENT
    rows = [json.loads(line) for line in file.read_text().splitlines() if line] if file.exists() else []
    return {row["step"] for row in rows if row["kind"] == "metrics"}


def log_steps(logger: RunLogger, steps: range) -> None:
    for step in steps:
        start = time.monotonic()
        logger.log_metrics({"x": 1.0 + step, "nan": float("nan")}, step)
        logger.save()
        assert time.monotonic() - start < LONGEST_CALL


def open_logger(uri: str, folder: Path) -> RunLogger:
    logger = RunLogger(make_mlflow_logger(uri, run_id_file=str(folder / "mlflow_run_id")))
    config = {"a": {"b": 1, "c": [1, 2]}}
    log_run(logger, RunDescription("a run", config, {"lr": "0.1", "taps": "last_n"}, {"git_revision": "x"}))
    return logger


def close(logger: RunLogger) -> None:
    logger.close()


SLOW = pytest.mark.slow
WHEN = [pytest.param("at the start", marks=SLOW), "in the middle", pytest.param("after a restart", marks=SLOW)]


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("name", FAULTS)
def test_a_local_store_that_fails_ends_nothing_and_loses_nothing(
    name: str, when: str, store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if when == "at the start" and ("run" in name or name == "delete_experiment"):
        pytest.skip("there is none yet")
    caplog.set_level(logging.INFO)
    half = LOGGED // 2
    with ExitStack() as stack:
        if when == "at the start":
            FAULTS[name](store, stack)
        logger = open_logger(store, tmp_path)
        if when != "at the start":
            log_steps(logger, range(half))
            assert logger.logger.delivery.flush(20.0)
            if when == "after a restart":
                close(logger)
            FAULTS[name](store, stack)
        if when == "after a restart":
            logger = open_logger(store, tmp_path)
        log_steps(logger, range(0 if when == "at the start" else half, LOGGED))
        if name in RECOVERS:
            assert wait_until_delivered(logger), caplog.text
        close(logger)
        here = list_steps(store) | list_kept(tmp_path)
    expected = set(range(LOGGED)) if when == "at the start" else set(range(half, LOGGED))
    assert here >= expected, caplog.text
    # What the store didn't take is kept, and said to be.
    if not list_steps(store) >= expected:
        assert f"they are in {tmp_path / UNSENT}" in caplog.text


def test_what_was_kept_is_sent_after_the_next_start(store: str, port: int, tmp_path: Path) -> None:
    logger = open_logger("http://127.0.0.1:9", tmp_path)
    log_steps(logger, range(LOGGED))
    close(logger)
    assert list_kept(tmp_path) == set(range(LOGGED))
    with (tmp_path / UNSENT).open("ab") as file:
        file.write(b'{"kind": "metr')  # a process that was killed while it wrote
    logger = open_logger(store, tmp_path)
    close(logger)
    assert list_steps(store) == set(range(LOGGED))
    assert not (tmp_path / UNSENT).exists()
    (run,) = client_of(store).search_runs(["1"])
    assert run.data.params == {"lr": "0.1", "taps": "last_n"}
    assert run.info.run_name == "a run"
    assert run.data.tags["git_revision"] == "x"


@pytest.mark.parametrize("server", ["down", "silent", "broken"])
def test_a_server_that_doesn_t_answer_is_waited_for_by_nobody(
    server: str, port: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    address = {"down": "127.0.0.1:9", "silent": f"127.0.0.1:{port}", "broken": "127.0.0.1:9/nonsense?x"}[server]
    begun = time.monotonic()
    logger = open_logger(f"http://me:geheim@{address}", tmp_path)
    log_steps(logger, range(LOGGED))
    assert time.monotonic() - begun < 5
    close(logger)
    assert time.monotonic() - begun < 30
    assert list_kept(tmp_path) == set(range(LOGGED))
    assert "geheim" not in caplog.text


@pytest.mark.parametrize("content", [b"", b"\0\0\0", b"abc", b"\xff\xfe", b"x" * 10**6, b"0" * 32, b"../../x\n"])
def test_a_damaged_file_of_the_run_s_id_begins_a_new_run(content: bytes, store: str, tmp_path: Path) -> None:
    (tmp_path / "mlflow_run_id").write_bytes(content)
    logger = open_logger(store, tmp_path)
    log_steps(logger, range(2))
    close(logger)
    assert list_steps(store) == {0, 1}
    run_id = (tmp_path / "mlflow_run_id").read_text().strip()
    assert client_of(store).get_run(run_id).data.metrics["x"] == 2.0


def test_a_record_that_is_never_taken_is_named_and_keeps_nothing_behind_it(
    store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logger = open_logger(store, tmp_path)
    logger.logger.log_file(tmp_path / "absent.png")
    logger.logger.delivery.put({"kind": "nonsense"})
    logger.logger.delivery.put({"kind": "metrics", "metrics": {"x": "many"}, "step": 1, "time": 1})
    log_steps(logger, range(2))
    close(logger)
    assert list_steps(store) == {0, 1}
    for words in ("won't take the file", "absent.png", "won't take the nonsense", "won't take the metrics x of step 1"):
        assert words in caplog.text


def test_files_that_find_no_room_keep_no_numbers_back(
    store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logger = open_logger(store, tmp_path)
    log_steps(logger, range(1))
    assert logger.logger.delivery.flush(20.0)
    (picture := tmp_path / "a.png").write_bytes(b"x")
    artifacts = Path(client_of(store).get_run(logger.version).info.artifact_uri.removeprefix("file://"))
    shutil.rmtree(artifacts)
    artifacts.write_text("a file where a folder belongs")
    logger.logger.log_file(picture, "samples")
    log_steps(logger, range(1, LOGGED))
    end = time.monotonic() + 10
    while len(list_steps(store)) < LOGGED and time.monotonic() < end:
        time.sleep(0.05)
    assert list_steps(store) == set(range(LOGGED))
    close(logger)
    assert "doesn't take files" in caplog.text


class BadLogger:
    """A logger of someone else's, all of whose methods fail."""

    def __getattr__(self, name: str) -> Any:
        if name in ("name", "version", "save_dir"):
            raise OSError(28, "No space left on device")

        def fail(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        fail.__name__ = name
        return fail


def test_any_logger_s_errors_are_reported_once_and_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    logger = RunLogger(BadLogger())  # type: ignore[arg-type]
    for step in range(5):
        logger.log_metrics({"x": 1.0}, step)
        logger.save()
    logger.log_hyperparams({})
    logger.finalize("failed")
    logger.close()
    assert (logger.name, logger.version, logger.save_dir) == (None, None, None)
    assert caplog.text.count("No space left on device") <= 8
