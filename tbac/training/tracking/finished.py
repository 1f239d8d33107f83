"""Runs that have ended: scores are added to them, and what they logged is read."""

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tbac.redaction import hide_in_text
from tbac.training.delivery import describe_safely
from tbac.training.tracking.store import log_metrics, make_metric_name, open_store

log = logging.getLogger(__name__)


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
    now = int(time.time() * 1000)
    try:
        client = open_store(tracking_uri)
        known = client.get_run(run_id).data.metrics
        new = {make_metric_name(name): float(value) for name, value in metrics.items()}
        added = {name: value for name, value in new.items() if known.get(name) != value}
        log_metrics(client, run_id, added, step, now)
        for file in files:
            client.log_artifact(run_id, str(file))
    except Exception as error:  # noqa: BLE001  of MLflow, or of what is below it
        where = hide_in_text(tracking_uri)
        log.warning("nothing was added to the MLflow run %s in %s (%s)", run_id, where, describe_safely(error))
        return False
    return True


def read_metric_history(tracking_uri: str, run_id: str) -> dict[str, list[tuple[int, float]]]:
    """Read every metric of a run: name -> (step, value) in the order of steps; nothing, with a warning, if it fails."""
    histories = {}
    try:
        client = open_store(tracking_uri)
        for name in client.get_run(run_id).data.metrics:
            histories[name] = sorted((m.step, m.value) for m in client.get_metric_history(run_id, name))
    except Exception as error:  # noqa: BLE001  of MLflow, or of what is below it
        log.warning("the history of MLflow run %s can't be read (%s)", run_id, describe_safely(error))
        return {}
    return histories
