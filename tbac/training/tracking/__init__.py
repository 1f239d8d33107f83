"""Experiment tracking with MLflow.

`store.py` alone imports it; `run.py` is one run there, `logger.py` what training logs to, `parent.py` a run with
children, `finished.py` what is done with runs that have ended, `pages.py` the links to MLflow's UI.
"""

from tbac.training.tracking.finished import add_to_run, read_metric_history
from tbac.training.tracking.logger import UNSENT, MlflowLogger, RunDescription, log_picture, log_run, make_mlflow_logger
from tbac.training.tracking.pages import SCORE, get_comparison_link, get_run_link, get_runs_link, list_links
from tbac.training.tracking.parent import ParentRun, open_parent_run
from tbac.training.tracking.run import RUN_ID, MlflowRun, describe_end, find_run_id, read_run_id
from tbac.training.tracking.store import make_metric_name, make_tag_name, open_store

__all__ = [
    "RUN_ID",
    "SCORE",
    "UNSENT",
    "MlflowLogger",
    "MlflowRun",
    "ParentRun",
    "RunDescription",
    "add_to_run",
    "describe_end",
    "find_run_id",
    "get_comparison_link",
    "get_run_link",
    "get_runs_link",
    "list_links",
    "log_picture",
    "log_run",
    "make_metric_name",
    "make_mlflow_logger",
    "make_tag_name",
    "open_parent_run",
    "open_store",
    "read_metric_history",
    "read_run_id",
]
