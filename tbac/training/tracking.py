"""Experiment tracking with MLflow; the only file that knows of it."""

import contextlib
import fcntl
import logging
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath
from typing import Any

from lightning.pytorch.loggers import Logger, MLFlowLogger
from lightning.pytorch.loggers.logger import DummyLogger

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


def log_nowhere(trainer: Any) -> None:
    """Give a process that logs nothing a dummy logger: with none it would skip the reductions that all must run."""
    trainer.loggers = [DummyLogger()]


def prepare_store(tracking_uri: str, experiment_name: str) -> None:
    """Make the store and the experiment; with a sqlite file, one process at a time."""
    from mlflow import MlflowClient  # takes seconds to import
    from mlflow.exceptions import MlflowException

    with contextlib.ExitStack() as stack:
        if tracking_uri.startswith("sqlite:///"):
            file = Path(tracking_uri.removeprefix("sqlite:///")).expanduser()
            file.parent.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(file.with_name(f"{file.name}.lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        client = MlflowClient(tracking_uri)
        if client.get_experiment_by_name(experiment_name) is None:
            with contextlib.suppress(MlflowException):  # another process was faster
                client.create_experiment(experiment_name)


def make_mlflow_logger(
    tracking_uri: str,
    experiment_name: str = "tbac",
    run_name: str | None = None,
    parent_run_id: str | None = None,
    run_id_file: str | None = None,
) -> MLFlowLogger:
    """Lightning's MLflow logger; with a parent, the run appears as its child.

    Args:
        tracking_uri: where runs are stored.
        experiment_name: MLflow experiment.
        run_name: shown in the UI.
        parent_run_id: run that this one belongs to.
        run_id_file: file in which `log_run` notes the run's id, so that a restarted run goes on in the same MLflow run.
    """
    prepare_store(tracking_uri, experiment_name)
    tags = {"mlflow.parentRunId": parent_run_id} if parent_run_id else None
    # A run that was started before goes on, if the store still has it.
    run_id = None
    if run_id_file and Path(run_id_file).is_file():
        run_id = _find_run(tracking_uri, Path(run_id_file).read_text().strip())
    logger = MLFlowLogger(
        experiment_name,
        run_name=run_name,
        tracking_uri=tracking_uri,
        tags=tags,
        run_id=run_id,
    )
    logger.run_id_file = run_id_file  # type: ignore[attr-defined]
    return logger


def _find_run(tracking_uri: str, run_id: str) -> str | None:
    """Return the id of a run, or None with a warning if the store doesn't have it."""
    from mlflow import MlflowClient  # takes seconds to import
    from mlflow.exceptions import MlflowException

    try:
        return MlflowClient(tracking_uri).get_run(run_id).info.run_id
    except MlflowException:
        log.warning("MLflow run %s isn't in %s any more; a new one is begun", run_id, tracking_uri)
        return None


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


def make_tag_name(path: str) -> str:
    """Turn a path into a name that MLflow accepts for a tag: relative, without `.`, `..` or unusual characters."""
    return re.sub(r"[^\w\-. /:]", "_", "/".join(p for p in PurePath(path).parts if p.strip("./")))


class RunLogger(Logger):
    """Logs the fits of one run to one logger: steps are counted over all fits, and only `close` ends the run.

    Args:
        logger: the logger that everything is passed to.
    """

    def __init__(self, logger: Logger) -> None:
        super().__init__()
        self.logger = logger
        self.first_step = 0  # optimizer steps of the run before the fit that logs now

    @property
    def name(self) -> str | None:
        return self.logger.name

    @property
    def version(self) -> int | str | None:
        return self.logger.version

    @property
    def save_dir(self) -> str | None:
        return self.logger.save_dir

    @property
    def log_dir(self) -> str | None:
        return self.logger.log_dir

    @property
    def group_separator(self) -> str:
        return self.logger.group_separator

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.logger.log_metrics(metrics, None if step is None else self.first_step + step)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.logger.log_hyperparams(params, *args, **kwargs)

    def save(self) -> None:
        self.logger.save()

    def finalize(self, status: str) -> None:
        """Called at the end of a fit; only a fit that failed ends the run."""
        if status == "success":
            self.save()
        else:
            self.logger.finalize(status)

    def close(self) -> None:
        """End the run."""
        self.logger.finalize("success")


def log_run(loggers: Iterable[Logger], config: Mapping[str, Any], facts: Mapping[str, str]) -> None:
    """Write the full config as parameters and as a file, and the facts as tags.

    MLflow lets no parameter change, so a run that goes on keeps those of its start; the file holds the newest config.
    """
    for logger in loggers:
        if isinstance(logger, MLFlowLogger):
            run_id = logger.run_id
            assert run_id is not None
            if not logger.experiment.get_run(run_id).data.params:
                logger.log_hyperparams(dict(config))
            logger.experiment.log_dict(run_id, dict(config), "config.yaml")
            for name, value in facts.items():
                logger.experiment.set_tag(run_id, make_tag_name(name), value)
            file = getattr(logger, "run_id_file", None)
            if file:
                Path(file).write_text(f"{run_id}\n")


def log_picture(loggers: Iterable[Logger], path: Path) -> None:
    """Add a picture file to the run's artifacts."""
    for logger in loggers:
        inner = logger.logger if isinstance(logger, RunLogger) else logger
        if isinstance(inner, MLFlowLogger):
            inner.experiment.log_artifact(inner.run_id, str(path), "samples")


def read_metric_history(tracking_uri: str, run_id: str) -> dict[str, list[tuple[int, float]]]:
    """Read every metric of a run: name -> (step, value) in the order of steps."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri)
    histories = {}
    for name in client.get_run(run_id).data.metrics:
        histories[name] = sorted((metric.step, metric.value) for metric in client.get_metric_history(run_id, name))
    return histories


class ParentRun:
    """A run that holds other runs as children, with its own metrics and artifacts."""

    def __init__(self, tracking_uri: str, experiment_name: str, run_name: str, run_id_file: str | None = None) -> None:
        self._logger = make_mlflow_logger(tracking_uri, experiment_name, run_name, run_id_file=run_id_file)
        run_id = self._logger.run_id
        assert run_id is not None
        self.run_id: str = run_id

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Write the full config and the facts of the run."""
        log_run([self._logger], config, collect_run_facts())

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        self._logger.log_metrics(dict(metrics))

    def log_file(self, path: Path) -> None:
        self._logger.experiment.log_artifact(self.run_id, str(path))

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
