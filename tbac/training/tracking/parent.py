"""A run that holds other runs as children: a demo, a sweep, an evaluation."""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tbac.redaction import hide_in_text
from tbac.training.delivery import describe_safely
from tbac.training.run_facts import collect_run_facts
from tbac.training.tracking.logger import make_mlflow_logger
from tbac.training.tracking.pages import get_comparison_link, get_runs_link
from tbac.training.tracking.run import describe_end

log = logging.getLogger(__name__)


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
