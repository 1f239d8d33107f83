"""Where MLflow keeps runs, and what is asked of it; the only file that imports it.

MLflow takes seconds to import, so each function imports what it needs. A client that `open_store` returns is MLflow's
own `MlflowClient`.
"""

import contextlib
import fcntl
import json
import os
import re
import sqlite3
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

ARTIFACTS = "mlartifacts"  # folder of all artifacts, beside the sqlite file
UNFINISHED = ".unfinished"  # end of the name of a sqlite file whose tables are being made
OPENED: dict[str, int] = {}  # sqlite store -> how often this process has made it anew
LONGEST_VALUE = 500  # characters of a parameter


def import_mlflow() -> None:
    """Import MLflow now, and not in a thread: loader processes are forked while that may import."""
    import mlflow.tracking

    assert mlflow.tracking is not None


def get_error_code(error: Exception) -> str | None:
    """Return MLflow's code of an error that it raised; None for any other error."""
    from mlflow.exceptions import MlflowException

    return error.error_code if isinstance(error, MlflowException) else None


def open_store(tracking_uri: str) -> Any:
    """Connect to MLflow; a sqlite file is made by one process at a time, and is there when it is whole.

    MLflow makes a new file table by table, which takes seconds. One whose maker is killed meanwhile could never be
    opened again, so it is made under another name.
    """
    from mlflow import MlflowClient  # takes seconds to import

    if not tracking_uri.startswith("sqlite:///"):
        return MlflowClient(tracking_uri)
    if tracking_uri.startswith("sqlite:///~"):
        tracking_uri = f"sqlite:///{Path(tracking_uri.removeprefix('sqlite:///')).expanduser()}"
    file = Path(tracking_uri.removeprefix("sqlite:///"))
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_name(f"{file.name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if has_tables(file):
            return MlflowClient(name_again(tracking_uri))
        for remains in file.parent.glob(f"{file.name}.*{UNFINISHED}"):
            remains.unlink()
        unfinished = file.with_name(f"{file.name}.{uuid.uuid4().hex[:8]}{UNFINISHED}")
        make_tables(unfinished)
        os.replace(unfinished, file)
    return MlflowClient(name_anew(tracking_uri))


def make_tables(file: Path) -> None:
    """Make a sqlite file with MLflow's tables, which takes seconds."""
    from mlflow import MlflowClient

    MlflowClient(f"sqlite:///{file.absolute()}").search_experiments(max_results=1)


def has_tables(file: Path) -> bool:
    """Whether there is a sqlite file with tables. MLflow would try for minutes to open one that can't be read.

    Raises:
        sqlite3.Error: when it is locked, damaged, or no such file.
    """
    if not file.exists():
        return False
    with contextlib.closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=rw", uri=True, timeout=2.0)) as database:
        (count,) = database.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
    return bool(count)


def name_again(tracking_uri: str) -> str:
    """Name a sqlite file as it was named when it was made anew."""
    folder, slash, name = tracking_uri.rpartition("/")
    return folder + slash + "./" * OPENED.get(tracking_uri, 0) + name


def name_anew(tracking_uri: str) -> str:
    """Name a sqlite file in another way each time, since MLflow keeps its connections to a file by its name.

    Where the file was deleted, it would go on with the connections to what is no longer there.
    """
    OPENED[tracking_uri] = OPENED.get(tracking_uri, 0) + 1
    return name_again(tracking_uri)


def place_artifacts(tracking_uri: str, experiment_id: str) -> None:
    """Let the artifacts of a new experiment lie beside the sqlite file, and be named as the file is.

    MLflow would put them into `mlruns` of the working directory, and note the whole path. A file that is named from
    the working directory, as by default, has artifacts that are named from there too, so a moved folder keeps them.
    """
    if not tracking_uri.startswith("sqlite:///"):
        return
    file = Path(tracking_uri.removeprefix("sqlite:///")).expanduser()
    place = (str(file.parent / ARTIFACTS / experiment_id), experiment_id)
    # Its own interface makes every path absolute.
    with contextlib.closing(sqlite3.connect(file, timeout=30.0)) as database:
        database.execute("UPDATE experiments SET artifact_location = ? WHERE experiment_id = ?", place)
        database.commit()


def find_experiment(client: Any, name: str, tracking_uri: str) -> str:
    """Find the id of an experiment, or make it; where it was deleted, its name with a number is taken.

    MLflow keeps the name of a deleted experiment, so that no other may have it.
    """
    from mlflow.exceptions import MlflowException

    while True:
        current, experiment = look_up_name(client, name)
        if experiment is not None:
            found: str = experiment.experiment_id
            return found
        try:
            created: str = client.create_experiment(current)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            continue  # another process was faster
        place_artifacts(tracking_uri, created)
        return created


def look_up_name(client: Any, name: str) -> tuple[str, Any]:
    """Look up the name that an experiment has now, and the experiment, or None where there is none of that name yet.

    Where `tbac` was deleted it is `tbac-2`, and so on.
    """
    number, current = 1, name
    while True:
        experiment = client.get_experiment_by_name(current)
        if experiment is None or experiment.lifecycle_stage != "deleted":
            return current, experiment
        number += 1
        current = f"{name}-{number}"


def create_run(client: Any, experiment_id: str, run_name: str | None, parent_run_id: str | None) -> str:
    """Begin a run, as a child of another one if that is given; returns its id."""
    from mlflow.tracking.context.registry import resolve_tags
    from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

    tags = {MLFLOW_PARENT_RUN_ID: parent_run_id} if parent_run_id else {}
    created: str = client.create_run(experiment_id, tags=resolve_tags(tags), run_name=run_name).info.run_id
    return created


def log_metrics(client: Any, run_id: str, metrics: Mapping[str, float], step: int, time_ms: int) -> None:
    """Write the metrics of a step; `time_ms` is the time in milliseconds since 1970."""
    from mlflow.entities import Metric

    batch = [Metric(make_metric_name(name), float(value), time_ms, step) for name, value in metrics.items()]
    client.log_batch(run_id, metrics=batch)


def log_params(client: Any, run_id: str, params: Mapping[str, str]) -> None:
    """Write parameters, each cut to the length that MLflow takes."""
    from mlflow.entities import Param

    batch = [Param(make_tag_name(name), str(value)[:LONGEST_VALUE]) for name, value in params.items()]
    client.log_batch(run_id, params=batch)


def log_datasets(client: Any, run_id: str, sources: Sequence[Mapping[str, Any]]) -> None:
    """Name the data that a run reads; MLflow knows an input by name and digest, and takes it once.

    Args:
        client: of the store.
        run_id: of the run.
        sources: as of `MlflowLogger.log_inputs`.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = []
    for source in sources:
        dataset = Dataset(
            name=source["name"],
            digest=source["digest"],
            source_type="local",
            source=json.dumps({"uri": source["path"]}),
            profile=json.dumps({"samples": source["samples"], "weight": source["weight"]}),
        )
        inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", source["context"])]))
    client.log_inputs(run_id, datasets=inputs)


def make_monitors() -> list[Any]:
    """Make MLflow's own monitors of this machine: processors, memory, disk, network, and GPUs where there are any."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    with contextlib.suppress(ImportError, RuntimeError):  # no GPU, or not its library
        monitors.append(GPUMonitor())
    return monitors


def make_metric_name(name: str) -> str:
    """Turn a name into one that MLflow accepts for a metric."""
    return re.sub(r"[^\w\-. /:]", "_", name)


def make_tag_name(path: str) -> str:
    """Turn a path into a name that MLflow accepts for a tag: relative, without `.`, `..` or unusual characters."""
    return re.sub(r"[^\w\-. /:]", "_", "/".join(p for p in PurePath(path).parts if p.strip("./")))
