"""Experiment tracking with MLflow; the only file that knows of it."""

import contextlib
import fcntl
import json
import logging
import os
import re
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import quote

from lightning.pytorch.loggers import Logger

from tbac.files import write_whole
from tbac.pictures import open_picture
from tbac.redaction import hide_in_text, hide_secrets
from tbac.training.delivery import Delivery, Record, UndeliverableError, describe_safely
from tbac.training.run_facts import collect_run_facts
from tbac.training.run_logger import RunLogger
from tbac.training.system_metrics import SystemMetrics

log = logging.getLogger(__name__)

RUN_ID = "mlflow_run_id"  # the file of a run folder, and of an export, that holds the id of the run
PAGE = "workflowType=machine_learning"  # without it pages are those of another kind of work, with traces for runs
SCORE = "geneval/overall"  # the metric of a sweep's children that says most
COLUMNS = [  # of the list of runs
    "params.`taps`", "params.`lr`", "params.`seed`", "metrics.`val/loss`", f"metrics.`{SCORE}`",
]  # fmt: skip
SERVED = "http://127.0.0.1:5000"  # what `make ui` serves at
ARTIFACTS = "mlartifacts"  # folder of all artifacts, beside the sqlite file
UNSENT = "mlflow_unsent.jsonl"  # beside the file of the run's id: what MLflow hasn't taken yet
UNFINISHED = ".unfinished"  # end of the name of a sqlite file whose tables are being made
OPENED: dict[str, int] = {}  # sqlite store -> how often this process has made it anew
LONGEST_VALUE = 500  # characters of a parameter
REQUEST = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}  # we try again ourselves
STATUS = {"success": "FINISHED", "finished": "FINISHED", "killed": "KILLED"}  # everything else has failed
# What MLflow says of a request that it will refuse the next time too.
REFUSED = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST")


class MlflowRun:
    """One run in MLflow, which is begun when the first record is sent, or goes on if it was begun before.

    Args:
        tracking_uri: where runs are stored.
        experiment_name: MLflow experiment.
        run_name: shown in the UI.
        parent_run_id: run that this one belongs to.
        run_id_file: file that holds the id of the run to go on with, and gets the id of a new one.
    """

    def __init__(
        self,
        tracking_uri: str,
        experiment_name: str,
        run_name: str | None,
        parent_run_id: str | None = None,
        run_id_file: Path | None = None,
    ) -> None:
        self.tracking_uri, self.experiment_name, self.run_name = tracking_uri, experiment_name, run_name
        self.parent_run_id, self.run_id_file = parent_run_id, run_id_file
        self.run_id: str | None = None
        self._client: Any = None
        self._described: list[Record] = []  # what describes it, for a run that has to take the place of this one

    def send(self, record: Record) -> None:
        """Send one record.

        Raises:
            UndeliverableError: for a record that MLflow refuses.
            Exception: whatever MLflow raises otherwise; the record may be sent again.
        """
        from mlflow.exceptions import MlflowException

        if record["kind"] in ("config", "tags", "inputs") and record not in self._described:
            self._described.append(record)
        try:
            self._open()
            self._send(record)
        except MlflowException as error:
            if self.run_id is not None and error.error_code in REFUSED:
                if not self._is_gone():
                    raise UndeliverableError(str(error).splitlines()[0]) from error
                log.warning("MLflow run %s was deleted; a new one is begun", self.run_id)
                self._forget_run()
            self._client = None
            raise
        except Exception:
            self._client = None
            raise

    def _open(self) -> None:
        """Connect, and find or begin the run."""
        if self._client is None:
            self._client = open_store(self.tracking_uri)
        if self.run_id is None:
            self.run_id = self._find_run() or self._begin_run()

    def _find_run(self) -> str | None:
        """Find the run that was begun before; None when there was none, or it isn't there any more."""
        run_id = read_run_id(self.run_id_file)
        if run_id is None:
            return None
        self.run_id = run_id
        gone, self.run_id = self._is_gone(), None
        if not gone:
            self._client.update_run(run_id, status="RUNNING")  # it may have been interrupted before
            return run_id
        where = hide_in_text(self.tracking_uri)
        log.warning("MLflow run %s isn't in %s any more; a new one is begun", run_id, where)
        return None

    def _is_gone(self) -> bool:
        """Whether the run, or its experiment, was deleted."""
        from mlflow.exceptions import MlflowException

        try:
            run = self._client.get_run(self.run_id)
            experiment = self._client.get_experiment(run.info.experiment_id)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return True
            raise
        return "deleted" in (run.info.lifecycle_stage, experiment.lifecycle_stage)

    def _begin_run(self) -> str:
        """Begin a run with the config and tags that are known, and note its id."""
        from mlflow.tracking.context.registry import resolve_tags
        from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

        tags = {MLFLOW_PARENT_RUN_ID: self.parent_run_id} if self.parent_run_id else {}
        experiment_id = find_experiment(self._client, self.experiment_name, self.tracking_uri)
        run = self._client.create_run(experiment_id, tags=resolve_tags(tags), run_name=self.run_name)
        self.run_id = run.info.run_id
        assert self.run_id is not None
        for record in self._described:
            self._send(record)
        if self.run_id_file is not None:
            try:
                write_whole(self.run_id_file, f"{self.run_id}\n".encode())
            except OSError as error:
                log.warning("%s can't be written (%s); a restart begins a new MLflow run", self.run_id_file, error)
        return self.run_id

    def _forget_run(self) -> None:
        """Let the next record begin a new run."""
        self.run_id = None
        if self.run_id_file is not None:
            with contextlib.suppress(OSError):
                self.run_id_file.unlink(missing_ok=True)

    def _send(self, record: Record) -> None:
        senders: Mapping[str, Callable[[Record], None]] = {
            "metrics": self._send_metrics,
            "config": self._send_config,
            "tags": self._send_tags,
            "inputs": self._send_inputs,
            "file": self._send_file,
            "picture": self._send_picture,
            "end": self._send_end,
        }
        try:
            senders[record["kind"]](record)
        except (KeyError, TypeError, ValueError, AttributeError) as error:  # of a record from a damaged file
            raise UndeliverableError(describe_safely(error)) from error

    def _send_metrics(self, record: Record) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(make_metric_name(name), float(value), int(record["time"]), int(record["step"]))
            for name, value in record["metrics"].items()
        ]
        self._client.log_batch(self.run_id, metrics=metrics)

    def _send_config(self, record: Record) -> None:
        """MLflow lets no parameter change, so a run that goes on keeps those of its start; the file is the newest."""
        from mlflow.entities import Param

        if record.get("params") and not self._client.get_run(self.run_id).data.params:
            named = record["params"].items()
            params = [Param(make_tag_name(name), str(value)[:LONGEST_VALUE]) for name, value in named]
            self._client.log_batch(self.run_id, params=params)
        self._client.log_dict(self.run_id, dict(record["config"]), "config.yaml")

    def _send_tags(self, record: Record) -> None:
        for name, value in record["tags"].items():
            self._client.set_tag(self.run_id, make_tag_name(name), value)

    def _send_file(self, record: Record) -> None:
        path = Path(record["path"])
        if not path.is_file():
            raise UndeliverableError("it isn't there any more")
        self._client.log_artifact(self.run_id, str(path), record["folder"])

    def _send_inputs(self, record: Record) -> None:
        """Name the data that the run reads; MLflow knows an input by name and digest, and takes it once."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = []
        for source in record["sources"]:
            dataset = Dataset(
                name=source["name"],
                digest=source["digest"],
                source_type="local",
                source=json.dumps({"uri": source["path"]}),
                profile=json.dumps({"samples": source["samples"], "weight": source["weight"]}),
            )
            inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", source["context"])]))
        self._client.log_inputs(self.run_id, datasets=inputs)

    def _send_picture(self, record: Record) -> None:
        path = Path(record["path"])
        if not path.is_file():
            raise UndeliverableError("it isn't there any more")
        place = {"key": record["name"], "step": int(record["step"]), "timestamp": int(record["time"])}
        self._client.log_image(self.run_id, open_picture(path), **place, synchronous=True)

    def _send_end(self, record: Record) -> None:
        self._client.set_terminated(self.run_id, record["status"])


def open_store(tracking_uri: str) -> Any:
    """Connect to MLflow; a sqlite file is made by one process at a time, and is there when it is whole.

    MLflow makes a new file table by table, which takes seconds. One whose maker is killed meanwhile could never be
    opened again, so it is made under another name.
    """
    from mlflow import MlflowClient  # takes seconds to import

    if not tracking_uri.startswith("sqlite:///"):
        return MlflowClient(tracking_uri)
    file = Path(tracking_uri.removeprefix("sqlite:///")).expanduser()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_name(f"{file.name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if has_tables(file):
            return MlflowClient(name_again(tracking_uri))
        for remains in file.parent.glob(f"{file.name}.*{UNFINISHED}"):
            remains.unlink()
        unfinished = file.with_name(f"{file.name}.{uuid.uuid4().hex[:8]}{UNFINISHED}")
        MlflowClient(f"sqlite:///{unfinished.absolute()}").search_experiments(max_results=1)  # makes the tables
        os.replace(unfinished, file)
    return MlflowClient(name_anew(tracking_uri))


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

    number, candidate = 1, name
    while True:
        experiment = client.get_experiment_by_name(candidate)
        if experiment is None:
            try:
                created: str = client.create_experiment(candidate)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                continue  # another process was faster
            place_artifacts(tracking_uri, created)
            return created
        if experiment.lifecycle_stage != "deleted":
            found: str = experiment.experiment_id
            return found
        number += 1
        candidate = f"{name}-{number}"


def read_run_id(file: Path | None) -> str | None:
    """Read the id of an MLflow run from a file; None where there is none, with a warning if it isn't an id."""
    if file is None or not file.is_file():
        return None
    try:
        text = file.read_bytes()[:200].decode(errors="replace").strip()
    except OSError as error:
        log.warning("%s can't be read (%s); a new MLflow run is begun", file, error)
        return None
    if re.fullmatch(r"[0-9A-Za-z_-]{8,64}", text):
        return text
    log.warning("%s holds no id of an MLflow run, but %r; a new run is begun", file, text[:40])
    return None


class MlflowLogger(Logger):
    """Logs to one MLflow run. Nothing that goes wrong there reaches training, and training never waits for it.

    Args:
        run: the run.
        spool: file that keeps what MLflow hasn't taken yet.
    """

    def __init__(self, run: MlflowRun, spool: Path | None = None) -> None:
        super().__init__()
        import mlflow.tracking  # here, not in the thread: loader processes are forked while it may import

        assert mlflow.tracking is not None
        for name, value in REQUEST.items():
            os.environ.setdefault(name, value)
        self.run = run
        self._delivery: Delivery | None = None
        self._spool = spool
        self._watching = False
        self._system: SystemMetrics | None = None

    @property
    def delivery(self) -> Delivery:
        if self._delivery is None:  # a run that was closed may be logged to again
            self._delivery = Delivery(self.run.send, "MLflow", self._spool)
        return self._delivery

    @property
    def name(self) -> str:
        return self.run.experiment_name

    @property
    def version(self) -> str | None:
        return self.run.run_id

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        values = {name: float(value) for name, value in metrics.items() if not isinstance(value, str)}
        self.delivery.put({"kind": "metrics", "metrics": values, "step": step or 0, "time": int(time.time() * 1000)})
        # The UI compares runs by the metric that they logged first, which must not be one of the machine.
        if self._watching:
            self._watching = False
            self._system = SystemMetrics(make_monitors(), self.log_metrics)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.log_config(dict(params), {})

    def log_config(self, config: Mapping[str, Any], params: Mapping[str, str]) -> None:
        """Write the whole config as a file, and a few parameters, by which runs are compared."""
        self.delivery.put(
            {"kind": "config", "config": hide_secrets(dict(config)), "params": hide_secrets(dict(params))}
        )

    def log_tags(self, tags: Mapping[str, str]) -> None:
        self.delivery.put({"kind": "tags", "tags": hide_secrets(dict(tags))})

    def log_inputs(self, sources: Sequence[Mapping[str, Any]]) -> None:
        """Name the data that the run reads.

        Args:
            sources: each with `name`, `digest`, `path`, `context` (training or validation), `samples` and `weight`.
        """
        self.delivery.put({"kind": "inputs", "sources": [dict(source) for source in sources]})

    def log_file(self, path: Path, folder: str | None = None) -> None:
        """Add a file to the run's artifacts."""
        self.delivery.put({"kind": "file", "path": str(path.absolute()), "folder": folder})

    def log_picture(self, path: Path, name: str, step: int) -> None:
        """Add a picture of a step, which the UI shows beside those of other steps and runs."""
        now = int(time.time() * 1000)
        self.delivery.put({"kind": "picture", "path": str(path.absolute()), "name": name, "step": step, "time": now})

    def watch_system(self) -> None:
        """Log how busy this machine is, from the first metric until the run ends."""
        self._watching = True

    def wait_for_run(self, seconds: float) -> str | None:
        """Wait until the run is begun; returns its id, or None when MLflow didn't begin it in time."""
        end = time.monotonic() + seconds
        while self.run.run_id is None and time.monotonic() < end and not self.delivery.failing:
            time.sleep(0.02)
        return self.run.run_id

    def finalize(self, status: str) -> None:
        """End the run, and deliver what is left; `status` is success, killed or failed."""
        self._watching = False
        if self._system is not None:
            self._system.stop()
            self._system = None
        if self._delivery is not None:
            self._delivery.put({"kind": "end", "status": STATUS.get(status, "FAILED")})
            self._delivery.close()
            self._delivery = None


def make_mlflow_logger(
    tracking_uri: str,
    experiment_name: str = "tbac",
    run_name: str | None = None,
    parent_run_id: str | None = None,
    run_id_file: str | None = None,
) -> MlflowLogger:
    """Make a logger for an MLflow run; with a parent, the run appears as its child.

    Args:
        tracking_uri: where runs are stored.
        experiment_name: MLflow experiment.
        run_name: shown in the UI.
        parent_run_id: run that this one belongs to.
        run_id_file: file in which the run's id is noted, so that a restarted run goes on in the same MLflow run.
    """
    file = Path(run_id_file) if run_id_file else None
    run = MlflowRun(tracking_uri, experiment_name, run_name, parent_run_id, file)
    return MlflowLogger(run, file.with_name(UNSENT) if file else None)


def make_metric_name(name: str) -> str:
    """Turn a name into one that MLflow accepts for a metric."""
    return re.sub(r"[^\w\-. /:]", "_", name)


def make_tag_name(path: str) -> str:
    """Turn a path into a name that MLflow accepts for a tag: relative, without `.`, `..` or unusual characters."""
    return re.sub(r"[^\w\-. /:]", "_", "/".join(p for p in PurePath(path).parts if p.strip("./")))


@dataclass(frozen=True)
class RunDescription:
    """What is known of a run when it begins.

    Attributes:
        name: what it is called, unless its config gives it a name.
        config: all of it, which becomes a file.
        params: the few by which runs are compared.
        facts: become tags.
        sources: the data that it reads (`MlflowLogger.log_inputs`).
    """

    name: str
    config: Mapping[str, Any]
    params: Mapping[str, str]
    facts: Mapping[str, str]
    sources: Sequence[Mapping[str, Any]] = ()


def log_run(logger: RunLogger, description: RunDescription) -> None:
    """Begin the run in MLflow."""
    if not isinstance(logger.logger, MlflowLogger):
        return
    mlflow_logger = logger.logger
    mlflow_logger.run.run_name = mlflow_logger.run.run_name or description.name
    mlflow_logger.log_config(description.config, description.params)
    mlflow_logger.log_tags(description.facts)
    if description.sources:
        mlflow_logger.log_inputs(description.sources)
    mlflow_logger.watch_system()


def log_picture(loggers: Iterable[Logger], path: Path, name: str, step: int) -> None:
    """Add a picture of a step to the run."""
    for logger in loggers:
        if isinstance(logger, RunLogger) and isinstance(logger.logger, MlflowLogger):
            logger.logger.log_picture(path, name, step)


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


def find_run_id(checkpoint: Path) -> str | None:
    """Find the id of the MLflow run that made a checkpoint, a run folder or an export; None if none is noted.

    The id lies in the run folder, which is the checkpoint's or up to two folders above it, and in an export.
    """
    folder = checkpoint.expanduser().absolute()
    for place in (folder, *folder.parents[:2]):
        run_id = read_run_id(place / RUN_ID)
        if run_id is not None:
            return run_id
    return None


def add_to_run(
    tracking_uri: str, run_id: str, metrics: Mapping[str, float], step: int = 0, files: Sequence[Path] = ()
) -> bool:
    """Add metrics and files to a run that was made before, which stays ended as it was.

    Args:
        tracking_uri: where runs are stored.
        run_id: of the run.
        metrics: name -> value; those that the run has already with this value aren't added again.
        step: of the checkpoint that the metrics are of.
        files: become artifacts.

    Returns:
        Whether they were added; otherwise a warning says why not.
    """
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    try:
        client = open_store(tracking_uri)
        known = client.get_run(run_id).data.metrics
        new = {make_metric_name(name): float(value) for name, value in metrics.items()}
        added = [Metric(name, value, now, step) for name, value in new.items() if known.get(name) != value]
        client.log_batch(run_id, metrics=added)
        for file in files:
            client.log_artifact(run_id, str(file))
    except Exception as error:  # noqa: BLE001  of MLflow, or of what is below it
        where = hide_in_text(tracking_uri)
        log.warning("nothing was added to the MLflow run %s in %s (%s)", run_id, where, describe_safely(error))
        return False
    return True


def get_runs_link(
    tracking_uri: str,
    address: str | None = None,
    experiment_name: str = "tbac",
    parent_run_id: str | None = None,
    score: str | None = None,
) -> str:
    """Return the page of MLflow's UI that lists an experiment's runs, the best one first.

    The page would show runs without what tells them apart, and children folded away. So a view with columns of our
    choice is kept in the experiment, as the UI itself does for a view that is shared.

    Args:
        tracking_uri: where runs are stored.
        address: where the UI is served, such as `http://127.0.0.1:5000`; None for the usual one.
        experiment_name: MLflow experiment.
        parent_run_id: the run whose children alone are listed.
        score: metric by which the highest is the best; None for the lowest validation loss.
    """
    client = open_store(tracking_uri)
    experiment = client.get_experiment_by_name(experiment_name)
    place = f"{get_address(tracking_uri) if address is None else address}/#/experiments"
    if experiment is None:
        return place
    view = {"orderByKey": f"metrics.`{score or 'val/loss'}`", "orderByAsc": not score, "selectedColumns": COLUMNS}
    if parent_run_id:
        view["searchFilter"] = f"tags.`mlflow.parentRunId` = '{parent_run_id}'"
    name = parent_run_id or "runs"
    client.set_experiment_tag(experiment.experiment_id, f"mlflow.sharedViewState.{name}", json.dumps(view))
    return f"{place}/{experiment.experiment_id}/runs?{PAGE}&viewStateShareKey={name}"


def get_address(tracking_uri: str) -> str:
    """Return where the pages of a store are served: a server's own address, or the one that `make ui` serves at."""
    return tracking_uri.rstrip("/") if tracking_uri.startswith("http") else SERVED


def get_run_link(tracking_uri: str, run_id: str) -> str | None:
    """Return the page of a run; None, with a warning, when the run can't be found."""
    try:
        experiment = open_store(tracking_uri).get_run(run_id).info.experiment_id
    except Exception as error:  # noqa: BLE001  of MLflow, or of what is below it
        log.warning("the MLflow run %s can't be found (%s)", run_id, describe_safely(error))
        return None
    return f"{get_address(tracking_uri)}/#/experiments/{experiment}/runs/{run_id}?{PAGE}"


def get_comparison_link(tracking_uri: str, parent_run_id: str, address: str | None = None) -> str:
    """Return the page of MLflow's UI that compares the children of a run; its first page when they can't be listed."""
    try:
        client = open_store(tracking_uri)
        experiment = client.get_run(parent_run_id).info.experiment_id
        children = f"tags.mlflow.parentRunId = '{parent_run_id}'"
        runs = client.search_runs([experiment], children, order_by=["start_time ASC"])
    except Exception as error:  # noqa: BLE001  of MLflow, or of what is below it
        log.warning("the children of MLflow run %s can't be listed (%s)", parent_run_id, describe_safely(error))
        return get_address(tracking_uri)
    address = get_address(tracking_uri) if address is None else address
    ids, experiments = (quote(json.dumps(one)) for one in ([run.info.run_id for run in runs], [experiment]))
    return f"{address}/#/compare-runs?runs={ids}&experiments={experiments}&{PAGE}"


def list_links(tracking_uri: str, address: str) -> dict[str, str]:
    """List pages of the UI: all runs; those of the newest run that has children, in a list and beside each other."""
    links = {"all runs": get_runs_link(tracking_uri, address)}
    client = open_store(tracking_uri)
    experiment = client.get_experiment_by_name("tbac")
    if experiment is None:
        return links
    place = [experiment.experiment_id]
    children = client.search_runs(place, "tags.mlflow.parentRunId != ''", max_results=1)
    if children:
        parent = client.get_run(children[0].data.tags["mlflow.parentRunId"]).info
        score = SCORE if SCORE in children[0].data.metrics else None
        view = get_runs_link(tracking_uri, address, parent_run_id=parent.run_id, score=score)
        links[f"runs of {parent.run_name}"] = view
        links["beside each other"] = get_comparison_link(tracking_uri, parent.run_id, address)
    return links


def read_metric_history(tracking_uri: str, run_id: str) -> dict[str, list[tuple[int, float]]]:
    """Read every metric of a run: name -> (step, value) in the order of steps; nothing, with a warning, if it fails."""
    from mlflow import MlflowClient

    histories = {}
    try:
        client = MlflowClient(tracking_uri)
        for name in client.get_run(run_id).data.metrics:
            histories[name] = sorted((m.step, m.value) for m in client.get_metric_history(run_id, name))
    except Exception as error:  # noqa: BLE001  of MLflow, or of what is below it
        log.warning("the history of MLflow run %s can't be read (%s)", run_id, describe_safely(error))
        return {}
    return histories


def describe_end(end: BaseException) -> str:
    """Describe how a run ends that raises: killed by a signal, or failed."""
    by_signal = isinstance(end, SystemExit) and isinstance(end.code, int) and end.code >= 128
    return "killed" if by_signal or isinstance(end, KeyboardInterrupt) else "failed"


class ParentRun:
    """A run that holds other runs as children, with its own metrics and artifacts."""

    def __init__(self, tracking_uri: str, experiment_name: str, run_name: str, run_id_file: str | None = None) -> None:
        self._logger = make_mlflow_logger(tracking_uri, experiment_name, run_name, run_id_file=run_id_file)

    @property
    def run_id(self) -> str | None:
        """Its id, for which this waits; None when MLflow can't begin it now."""
        if self._logger.run.run_id is None:
            self._logger.log_tags({})
        return self._logger.wait_for_run(60.0)

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Write the full config and the facts of the run."""
        self._logger.log_hyperparams(config)
        self._logger.log_tags(collect_run_facts())

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        self._logger.log_metrics(dict(metrics))

    def log_file(self, path: Path) -> None:
        self._logger.log_file(path)

    def list_links(self) -> dict[str, str]:
        """List the pages of the UI that show its children; none when they can't be found."""
        run = self._logger.run
        try:
            view = get_runs_link(run.tracking_uri, experiment_name=run.experiment_name, parent_run_id=self.run_id)
        except Exception as error:  # noqa: BLE001  of MLflow, or of what is below it
            log.warning("MLflow has no page of these runs now (%s)", describe_safely(error))
            return {}
        links = {"its runs": view, "beside each other": get_comparison_link(run.tracking_uri, self.run_id or "")}
        return {name: hide_in_text(link) for name, link in links.items()}

    def finish(self, status: str = "success") -> None:
        """End it; `status` is success, killed or failed."""
        self._logger.finalize(status)


@contextlib.contextmanager
def open_parent_run(
    tracking_uri: str, experiment_name: str, run_name: str, run_id_file: str | None = None
) -> Iterator[ParentRun]:
    """Open a `ParentRun` for a block; it ends as finished, or as failed or killed when the block raises.

    With `run_id_file` the run whose id is in that file goes on.
    """
    run = ParentRun(tracking_uri, experiment_name, run_name, run_id_file)
    try:
        yield run
    except BaseException as end:
        run.finish(describe_end(end))
        raise
    run.finish()
