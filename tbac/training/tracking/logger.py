"""The logger that training logs to: records go to a thread that sends them, so training never waits for MLflow."""

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from tbac.redaction import hide_secrets
from tbac.training.delivery import Delivery
from tbac.training.run_logger import RunLogger
from tbac.training.system_metrics import SystemMetrics
from tbac.training.tracking.run import MlflowRun
from tbac.training.tracking.store import import_mlflow, make_monitors

UNSENT = "mlflow_unsent.jsonl"  # beside the file of the run's id: what MLflow hasn't taken yet
REQUEST = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}  # we try again ourselves
STATUS = {"success": "FINISHED", "finished": "FINISHED", "killed": "KILLED"}  # everything else has failed


class MlflowLogger(Logger):
    """Logs to one MLflow run. Nothing that goes wrong there reaches training, and training never waits for it.

    Args:
        run: the run.
        spool: file that keeps what MLflow hasn't taken yet.
    """

    def __init__(self, run: MlflowRun, spool: Path | None = None) -> None:
        super().__init__()
        import_mlflow()
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
