"""What is told to MLflow."""

import contextlib
import os
from pathlib import Path

import mlflow
import pytest

from tbac.models import UniImage
from tbac.training.callbacks.throughput import Throughput
from tbac.training.tracking import make_tag_name, open_parent_run
from tests.helpers.training import make_data, make_module, make_trainer


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
    assert make_tag_name(path) == name


@pytest.mark.parametrize("fails", [False, True])
def test_a_parent_run_ends_as_its_block_does(fails: bool, tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path}/x.db"
    with contextlib.suppress(RuntimeError), open_parent_run(store, "tbac", "demo") as parent:
        parent.log_metrics({"a": 1.0})
        if fails:
            raise RuntimeError("half-way")
    client = mlflow.MlflowClient(store)
    (experiment,) = [e for e in client.search_experiments() if e.name == "tbac"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == ("FAILED" if fails else "FINISHED")
    assert run.data.metrics == {"a": 1.0}


def test_the_samples_taken_of_each_source_are_logged(model: UniImage) -> None:
    world = os.environ["TBAC_SHAPES"]
    sources = ",".join(
        f"{{path: {world}/data/{name}, split: train, weight: {w}}}" for name, w in (("t2i", 3), ("edit", 1))
    )
    data = make_data(model, "stage=ti2i_pretrain", f"stage.sources=[{sources}]")
    trainer = make_trainer(8, callbacks=[Throughput(every=4)])
    trainer.fit(make_module(model, steps=8), datamodule=data)
    logged = {k.removeprefix("data/drawn/"): v.item() for k, v in trainer.logged_metrics.items() if "drawn" in k}
    assert logged == data.drawn
    assert set(logged) == {"t2i-train", "edit-train"}
    assert sum(logged.values()) == 32
    assert logged["t2i-train"] > logged["edit-train"] > 0
