"""Experiment tracking with MLflow; the only file that knows of it."""

import contextlib
import fcntl
import json
import logging
import os
import re
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import quote

from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import DummyLogger

from tbac.files import write_whole
from tbac.redaction import hide_in_text, hide_secrets
from tbac.training.delivery import Delivery, Record, UndeliverableError, describe_safely

log = logging.getLogger(__name__)

PACKAGES = (
    "torch",
    "lightning",
    "transformers",
    "diffusers",
    "webdataset",
    "hydra-core",
    "bitsandbytes",
    "torchmetrics",
    "mlflow",
)
UNSENT = "mlflow_unsent.jsonl"  # beside the file of the run's id: what MLflow hasn't taken yet
OPENED: dict[str, int] = {}  # sqlite store -> how often this process has made it anew
LONGEST_VALUE = 500  # characters of a parameter
REQUEST = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}  # we try again ourselves
# What MLflow says of a request that it will refuse the next time too.
REFUSED = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST")


def log_nowhere(trainer: Any) -> None:
    """Give a process that logs nothing a dummy logger: with none it would skip the reductions that all must run."""
    trainer.loggers = [DummyLogger()]


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
        self._described: list[Record] = []  # config and tags, for a run that has to take the place of this one

    def send(self, record: Record) -> None:
        """Send one record.

        Raises:
            UndeliverableError: for a record that MLflow refuses.
            Exception: whatever MLflow raises otherwise; the record may be sent again.
        """
        from mlflow.exceptions import MlflowException

        if record["kind"] in ("config", "tags") and record not in self._described:
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
        experiment_id = find_experiment(self._client, self.experiment_name)
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
            "file": self._send_file,
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

    def _send_end(self, record: Record) -> None:
        self._client.set_terminated(self.run_id, record["status"])


def open_store(tracking_uri: str) -> Any:
    """Connect to MLflow; a sqlite file is made by one process at a time."""
    from mlflow import MlflowClient  # takes seconds to import

    if not tracking_uri.startswith("sqlite:///"):
        return MlflowClient(tracking_uri)
    file = Path(tracking_uri.removeprefix("sqlite:///")).expanduser()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_name(f"{file.name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if has_tables(file):
            return MlflowClient(name_again(tracking_uri))
        client = MlflowClient(name_anew(tracking_uri))
        client.search_experiments(max_results=1)  # makes the tables
    return client


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


def find_experiment(client: Any, name: str) -> str:
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

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.log_config(dict(params), {})

    def log_config(self, config: Mapping[str, Any], params: Mapping[str, str]) -> None:
        """Write the whole config as a file, and a few parameters, by which runs are compared."""
        self.delivery.put(
            {"kind": "config", "config": hide_secrets(dict(config)), "params": hide_secrets(dict(params))}
        )

    def log_tags(self, tags: Mapping[str, str]) -> None:
        self.delivery.put({"kind": "tags", "tags": hide_secrets(dict(tags))})

    def log_file(self, path: Path, folder: str | None = None) -> None:
        """Add a file to the run's artifacts."""
        self.delivery.put({"kind": "file", "path": str(path.absolute()), "folder": folder})

    def wait_for_run(self, seconds: float) -> str | None:
        """Wait until the run is begun; returns its id, or None when MLflow didn't begin it in time."""
        end = time.monotonic() + seconds
        while self.run.run_id is None and time.monotonic() < end and not self.delivery.failing:
            time.sleep(0.02)
        return self.run.run_id

    def finalize(self, status: str) -> None:
        """End the run, and deliver what is left."""
        if self._delivery is not None:
            self._delivery.put({"kind": "end", "status": "FINISHED" if status in ("success", "finished") else "FAILED"})
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


def read_git_revision() -> str:
    """Read the commit of the working tree, with `-dirty` for uncommitted changes; "unknown" outside a repository."""
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return run.stdout.strip()


def collect_run_facts() -> dict[str, str]:
    """Collect the git revision and package versions."""
    facts = {"git_revision": read_git_revision()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            facts[f"version/{package}"] = version(package)
    return facts


def make_metric_name(name: str) -> str:
    """Turn a name into one that MLflow accepts for a metric."""
    return re.sub(r"[^\w\-. /:]", "_", name)


def make_tag_name(path: str) -> str:
    """Turn a path into a name that MLflow accepts for a tag: relative, without `.`, `..` or unusual characters."""
    return re.sub(r"[^\w\-. /:]", "_", "/".join(p for p in PurePath(path).parts if p.strip("./")))


class RunLogger(Logger):
    """Logs the fits of one run to one logger: steps are counted over all fits, and only `close` ends the run.

    An error of the logger is reported once and passed over: only weights may end training.

    Args:
        logger: the logger that everything is passed to.
    """

    def __init__(self, logger: Logger) -> None:
        super().__init__()
        self.logger = logger
        self.first_step = 0  # optimizer steps of the run before the fit that logs now
        self._failing: set[str] = set()

    def _try(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a method of the logger; returns None when it fails."""
        name = call.__name__
        try:
            result = call(*args, **kwargs)
        except Exception as error:  # noqa: BLE001  whatever a logger raises
            if name not in self._failing:
                message = "%s.%s failed (%s); training goes on, and later failures of it aren't reported"
                log.warning(message, type(self.logger).__name__, name, describe_safely(error))
            self._failing.add(name)
            return None
        self._failing.discard(name)
        return result

    def _read(self, name: str) -> Any:
        """Read an attribute of the logger; None when that fails."""

        def read() -> Any:
            return getattr(self.logger, name)

        return self._try(read)

    @property
    def name(self) -> str | None:
        return self._read("name")

    @property
    def version(self) -> int | str | None:
        return self._read("version")

    @property
    def save_dir(self) -> str | None:
        return self._read("save_dir")

    @property
    def log_dir(self) -> str | None:
        return self._read("log_dir")

    @property
    def group_separator(self) -> str:
        return self.logger.group_separator

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._try(self.logger.log_metrics, metrics, None if step is None else self.first_step + step)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self._try(self.logger.log_hyperparams, params, *args, **kwargs)

    def save(self) -> None:
        self._try(self.logger.save)

    def finalize(self, status: str) -> None:
        """Called at the end of a fit; only a fit that failed ends the run."""
        if status == "success":
            self.save()
        else:
            self._try(self.logger.finalize, status)

    def close(self) -> None:
        """End the run."""
        self._try(self.logger.finalize, "success")


def log_run(
    logger: RunLogger, name: str, config: Mapping[str, Any], params: Mapping[str, str], facts: Mapping[str, str]
) -> None:
    """Begin the run in MLflow.

    Args:
        logger: of the run.
        name: what the run is called, unless its config gives it a name.
        config: all of it, which becomes a file.
        params: the few by which runs are compared.
        facts: become tags.
    """
    if isinstance(logger.logger, MlflowLogger):
        run = logger.logger.run
        run.run_name = run.run_name or name
        logger.logger.log_config(config, params)
        logger.logger.log_tags(facts)


def log_picture(loggers: Iterable[Logger], path: Path) -> None:
    """Add a picture file to the run's artifacts."""
    for logger in loggers:
        if isinstance(logger, RunLogger) and isinstance(logger.logger, MlflowLogger):
            logger.logger.log_file(path, "samples")


def get_runs_link(tracking_uri: str, address: str, experiment_name: str = "tbac") -> str:
    """Return the page of MLflow's UI that lists an experiment's runs.

    Args:
        tracking_uri: where runs are stored.
        address: where the UI is served, such as `http://127.0.0.1:5000`.
        experiment_name: MLflow experiment.
    """
    experiment = open_store(tracking_uri).get_experiment_by_name(experiment_name)
    number = experiment.experiment_id if experiment else "0"
    # Without this word the page is that of another kind of work, with traces in the place of runs.
    return f"{address}/#/experiments/{number}/runs?workflowType=machine_learning"


def get_comparison_link(tracking_uri: str, address: str, parent_run_id: str) -> str:
    """Return the page of MLflow's UI that compares the children of a run; its first page when they can't be listed."""
    try:
        client = open_store(tracking_uri)
        experiment = client.get_run(parent_run_id).info.experiment_id
        children = f"tags.mlflow.parentRunId = '{parent_run_id}'"
        runs = client.search_runs([experiment], children, order_by=["start_time ASC"])
    except Exception as error:  # noqa: BLE001  of MLflow, or of what is below it
        log.warning("the children of MLflow run %s can't be listed (%s)", parent_run_id, describe_safely(error))
        return address
    ids, experiments = (quote(json.dumps(one)) for one in ([run.info.run_id for run in runs], [experiment]))
    return f"{address}/#/compare-runs?runs={ids}&experiments={experiments}"


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

    def finish(self, failed: bool = False) -> None:
        self._logger.finalize("failed" if failed else "success")


@contextlib.contextmanager
def open_parent_run(
    tracking_uri: str, experiment_name: str, run_name: str, run_id_file: str | None = None
) -> Iterator[ParentRun]:
    """Open a `ParentRun` for a block; it ends as finished, or as failed when the block raises.

    With `run_id_file` the run whose id is in that file goes on.
    """
    run = ParentRun(tracking_uri, experiment_name, run_name, run_id_file)
    try:
        yield run
    except BaseException:
        run.finish(failed=True)
        raise
    run.finish()
