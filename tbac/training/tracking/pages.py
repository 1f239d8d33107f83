"""Links to the pages of MLflow's UI: all runs, those of a sweep, one run, runs beside each other."""

import json
import logging
from urllib.parse import quote

from tbac.training.delivery import describe_safely
from tbac.training.tracking.store import look_up_name, open_store

log = logging.getLogger(__name__)

PAGE = "workflowType=machine_learning"  # without it pages are those of another kind of work, with traces for runs
SCORE = "geneval/overall"  # the metric of a sweep's children that says most
COLUMNS = [  # of the list of runs
    "params.`taps`", "params.`lr`", "params.`seed`", "metrics.`val/loss`", f"metrics.`{SCORE}`",
]  # fmt: skip
SERVED = "http://127.0.0.1:5000"  # what `make ui` serves at


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
    _, experiment = look_up_name(client, experiment_name)
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
    ids, experiments = quote(json.dumps([run.info.run_id for run in runs])), quote(json.dumps([experiment]))
    return f"{address}/#/compare-runs?runs={ids}&experiments={experiments}&{PAGE}"


def list_links(tracking_uri: str, address: str) -> dict[str, str]:
    """List pages of the UI: all runs; those of the newest run that has children, in a list and beside each other.

    What can't be found is left out, with a warning: the pages are served all the same.
    """
    links = {"the first page": address}
    try:
        links["all runs"] = get_runs_link(tracking_uri, address)
        client = open_store(tracking_uri)
        _, experiment = look_up_name(client, "tbac")
        if experiment is None:
            return links
        children = client.search_runs([experiment.experiment_id], "tags.mlflow.parentRunId != ''", max_results=1)
        if children:
            parent = client.get_run(children[0].data.tags["mlflow.parentRunId"]).info
            score = SCORE if SCORE in children[0].data.metrics else None
            view = get_runs_link(tracking_uri, address, parent_run_id=parent.run_id, score=score)
            links[f"runs of {parent.run_name}"] = view
            links["beside each other"] = get_comparison_link(tracking_uri, parent.run_id, address)
    except Exception as error:  # noqa: BLE001  of MLflow, or of what is below it
        log.warning("the pages of runs can't be listed (%s)", describe_safely(error))
    return links
