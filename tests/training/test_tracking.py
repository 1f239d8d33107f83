"""What is told to MLflow."""

import contextlib
from pathlib import Path

import mlflow
import pytest

from tbac.training.tracking import parent_run, tag_name


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("data/outputs/shapes/t2i", "data/outputs/shapes/t2i"),
        ("data//mnt/shards", "data/mnt/shards"),
        ("data/../shards/./a b", "data/shards/a b"),
        ("data/~/Bilder-ü/x@y", "data/_/Bilder-ü/x_y"),
        ("git_revision", "git_revision"),
    ],
)
def test_paths_become_names_that_mlflow_takes(path: str, name: str) -> None:
    assert tag_name(path) == name


@pytest.mark.parametrize("fails", [False, True])
def test_a_parent_run_ends_as_its_block_does(fails: bool, tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path}/x.db"
    with contextlib.suppress(RuntimeError), parent_run(store, "tbac", "demo") as parent:
        parent.log_metrics({"a": 1.0})
        if fails:
            raise RuntimeError("half-way")
    client = mlflow.MlflowClient(store)
    (experiment,) = [e for e in client.search_experiments() if e.name == "tbac"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == ("FAILED" if fails else "FINISHED")
    assert run.data.metrics == {"a": 1.0}
