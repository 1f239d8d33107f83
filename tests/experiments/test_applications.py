"""The applications as their users run them, on untrained backbones."""

import json
import os
import re
from pathlib import Path
from urllib.parse import unquote

import mlflow
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from experiments.studies.faults.runs import are_identical
from tbac.models.lora import is_adapter
from tbac.models.saved import read_checkpoint
from tbac.training.tracking import get_runs_link, list_links
from tests.helpers.commands import FEW, run_to_message, run_to_success
from tests.helpers.pictures import make_noise_image

pytestmark = pytest.mark.usefixtures("in_world")


def only(pattern: str) -> Path:
    (found,) = Path().glob(pattern)
    return found


def test_each_stage_starts_from_the_newest_weights_of_the_one_before(capfd: pytest.CaptureFixture[str]) -> None:
    names = ("t2i_pretrain", "ti2i_pretrain", "finetune")
    for number, name in enumerate(names):
        text = run_to_success("train", capfd, *FEW, f"stage={name}", f"hydra.run.dir=outputs/train/{number}")
        report = json.loads(Path(f"outputs/train/{number}/report.json").read_text())
        assert (report["name"], report["steps"]) == (name, 2)
        assert report["val_loss_last"] > 0
        assert list(Path(f"outputs/train/{number}/samples").glob("*.png"))
        if number:
            assert f"outputs/train/{number - 1}/checkpoints/{names[number - 1]}-step=2.ckpt" in text
    first, second = (read_checkpoint(f"outputs/train/{n}/checkpoints/{names[n]}-step=2.ckpt") for n in (0, 1))
    assert not are_identical(first["state_dict"], second["state_dict"])


@pytest.mark.usefixtures("trained_run")
def test_a_stage_of_no_step_keeps_the_weights_it_starts_from(capfd: pytest.CaptureFixture[str]) -> None:
    run_to_success("train", capfd, *FEW, "hydra.run.dir=two", "stage.lr=1e-30", "stage.min_lr=0", "init=run")
    first, second = (read_checkpoint(f"{f}/checkpoints/t2i_pretrain-step=2.ckpt")["state_dict"] for f in ("run", "two"))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("trained_run")
def test_resuming_goes_on_from_the_step_that_was_reached(capfd: pytest.CaptureFixture[str]) -> None:
    checkpoint = only("run/checkpoints/t2i_pretrain-step=2.ckpt")
    run_to_success("train", capfd, *FEW, "stage.steps=4", "hydra.run.dir=two", f"resume='{checkpoint}'")
    assert json.loads(Path("two/report.json").read_text())["steps"] == 4
    assert read_checkpoint(only("two/checkpoints/t2i_pretrain-step=4.ckpt"))["global_step"] == 4


def test_a_multirun_makes_one_run_for_each_point(capfd: pytest.CaptureFixture[str]) -> None:
    store = os.environ["MLFLOW_TRACKING_URI"]
    points = ["taps=last_n,final", "stage.lr=1e-3,2e-3", "seed=1", "logger=mlflow"]
    run_to_success("train", capfd, "-m", *FEW, *points, "hydra.sweep.dir=sweep")
    checkpoints = list(Path("sweep").glob("*/checkpoints/t2i_pretrain-step=2.ckpt"))
    assert len(checkpoints) == 4
    found = {
        (tuple(c["tbac"]["config"]["model"]["taps"]["layers"]), c["tbac"]["config"]["stage"]["lr"])
        for c in map(read_checkpoint, checkpoints)
    }
    assert found == {(taps, lr) for taps in ((2, 3, 4, 5), (6,)) for lr in (1e-3, 2e-3)}
    # In MLflow they are children of one run, told apart by their names, and there are links to see them together.
    client = mlflow.MlflowClient(store)
    runs = client.search_runs([client.get_experiment_by_name("tbac").experiment_id])
    (parent,) = [run for run in runs if run.info.run_name == "taps x lr"]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    names = {f"{taps} lr={lr} seed=1 t2i_pretrain" for taps in ("last_n", "final") for lr in (0.001, 0.002)}
    assert {run.info.run_name for run in children} == names
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert len(runs) == 5
    place = f"http://127.0.0.1:5000/#/experiments/{parent.info.experiment_id}/runs?workflowType=machine_learning"
    assert get_runs_link(store, "http://127.0.0.1:5000") == f"{place}&viewStateShareKey=runs"
    links = list_links(store, "http://127.0.0.1:5000")
    assert links["runs of taps x lr"] == f"{place}&viewStateShareKey={parent.info.run_id}"
    compared = unquote(links["beside each other"])
    assert all(f'"{run.info.run_id}"' in compared for run in children)


def test_a_run_is_tracked_with_its_config_metrics_and_pictures(capfd: pytest.CaptureFixture[str]) -> None:
    run_to_success("train", capfd, *FEW, "logger=mlflow", "hydra.run.dir=run")
    client = mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    (experiment,) = [e for e in client.search_experiments() if e.name == "tbac"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "last_n lr=0.002 seed=42 t2i_pretrain"
    assert run.data.params["lr"] == "0.002"
    assert run.data.params["tap_layers"] == "[2, 3, 4, 5]"
    assert 15 <= len(run.data.params) <= 32
    assert not [value for value in run.data.params.values() if "/" in value]
    assert run.data.metrics["val/loss"] > 0
    assert {"git_revision", "version/torch"} <= run.data.tags.keys()
    assert any(name.startswith("data/") and len(digest) == 64 for name, digest in run.data.tags.items())
    artifacts = [a.path for a in client.list_artifacts(run.info.run_id)]
    assert "config.yaml" in artifacts
    pictures = [a.path for a in client.list_artifacts(run.info.run_id, "images") if a.path.endswith(".png")]
    assert {re.findall(r"step\D(\d+)", path)[0] for path in pictures} == {"0", "2"}
    # Artifacts lie beside the sqlite file, which the tests name by its whole path.
    assert Path(run.info.artifact_uri).is_relative_to(Path.cwd() / "mlartifacts")
    inputs = {(i.dataset.name, i.tags[0].value) for i in run.inputs.dataset_inputs}
    assert inputs == {("t2i-train", "training"), ("t2i-val", "validation")}
    assert {"train/lr", "train/loss", "system/cpu_utilization_percentage"} <= run.data.metrics.keys()
    assert not [name for name in run.data.metrics if name.startswith("lr-")]
    assert max(run.data.metrics.values()) < 1e15


@pytest.mark.usefixtures("trained_run")
def test_a_run_folder_draws_edits_and_answers(capfd: pytest.CaptureFixture[str]) -> None:
    make_noise_image(0, (24, 24)).save("scene.png")
    few = ["checkpoint=run", "num_inference_steps=2", "device=cpu"]
    prompts = "prompts=[a red circle,two squares,a letter T]"
    run_to_success("generate", capfd, *few, prompts, "num_images_per_prompt=2", "batch_size=2", "out=drawn")
    drawn = sorted(Path("drawn").glob("*.png"))
    assert [d.name for d in drawn] == [f"{i:05d}.png" for i in range(6)]
    run_to_success("generate", capfd, *few, prompts, "num_images_per_prompt=2", "batch_size=3", "out=again")
    for picture in drawn:  # whatever the batch size
        first, second = (torch.tensor(list(Image.open(f).getdata())) for f in (picture, Path("again") / picture.name))
        assert (first - second).abs().max() <= 2
    run_to_success("generate", capfd, *few, "prompts=[a circle]", "height=16", "width=40", "out=wide")
    with Image.open("wide/00000.png") as image:
        assert image.size == (40, 16)
    run_to_success("generate", capfd, *few, "prompts=[remove the circle]", "images=[scene.png]", "out=edited")
    assert Image.open("edited/00000.png").size == (24, 24)
    assert run_to_success(
        "answer", capfd, "checkpoint=run", "question='what color is the circle?'", "image=scene.png", "device=cpu"
    )


@pytest.mark.parametrize(
    ("benchmark", "fields"),
    [
        ("geneval", {"overall", "single_object", "color_attr"}),
        ("edits", {"score", "happened", "kept"}),
        ("answers", {"accuracy"}),
    ],
)
@pytest.mark.usefixtures("trained_run")
def test_a_run_folder_is_scored(benchmark: str, fields: set[str], capfd: pytest.CaptureFixture[str]) -> None:
    steps = [] if benchmark == "answers" else ["benchmark.num_inference_steps=2"]
    run_to_success(
        "evaluate", capfd, "checkpoint=run", f"benchmark={benchmark}", "hydra.run.dir=scored", "device=cpu", *steps
    )
    report = json.loads(Path("scored/report.json").read_text())
    assert fields <= report.keys()
    assert all(0 <= report[name] <= 1 for name in fields)


@pytest.mark.parametrize("quantization", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_a_quantised_mllm_and_an_8_bit_optimizer_train_and_resume(
    capfd: pytest.CaptureFixture[str], quantization: str
) -> None:
    options = [*FEW, f"model.quantization={quantization}", "optim=adamw8bit"]
    run_to_success("train", capfd, *options, "hydra.run.dir=one")
    checkpoint = only("one/checkpoints/t2i_pretrain-step=2.ckpt")
    run_to_success("train", capfd, *options, "stage.steps=4", "hydra.run.dir=two", f"resume='{checkpoint}'")
    checkpoint = read_checkpoint("two")
    assert checkpoint["global_step"] == 4
    states = [v["__bnb_optimizer_quant_state__"] for v in checkpoint["optimizer_states"][0]["state"].values()]
    assert {s["state1"].dtype for s in states} == {torch.uint8, torch.float32}  # small tensors stay in float32
    assert {v["step"] for v in checkpoint["optimizer_states"][0]["state"].values()} == {4}
    text = run_to_success("evaluate", capfd, "checkpoint=two", "benchmark.num_inference_steps=1")
    assert "overall" in text


def test_adapters_train_go_on_to_the_bit_and_become_part_of_the_model(capfd: pytest.CaptureFixture[str]) -> None:
    options = [
        *FEW,
        "model.lora.rank=2",
        "stage.steps=4",
        "callbacks.checkpoint.every=2",
        "callbacks.checkpoint.keep=9",
    ]
    run_to_success("train", capfd, *options, "hydra.run.dir=whole")
    halfway = only("whole/checkpoints/t2i_pretrain-step=2.ckpt")
    run_to_success("train", capfd, *options, "hydra.run.dir=again", f"resume='{halfway}'")
    whole, again = read_checkpoint("whole"), read_checkpoint("again")
    for part in ("state_dict", "current_model_state"):
        assert all(torch.equal(whole[part][name], again[part][name]) for name in whole[part])
    # Only queries, connector and adapters have an optimizer's state and an average of their own.
    optimized = set(whole["tbac"]["optimized"])
    assert {name for name in optimized if name.startswith("denoiser.")} == set(filter(is_adapter, whole["state_dict"]))
    differs = {n for n, t in whole["state_dict"].items() if not torch.equal(t, whole["current_model_state"][n])}
    assert differs <= optimized
    # The next stage trains in full from what they have become, and exports hold plain matrices, and adapters if asked.
    run_to_success("train", capfd, *FEW, "stage=ti2i_pretrain", "init=whole", "hydra.run.dir=next")
    assert not any(map(is_adapter, read_checkpoint("next")["state_dict"]))
    run_to_success("export", capfd, "checkpoint=whole", "out=export", "adapter=true")
    assert not any(map(is_adapter, load_file("export/model.safetensors")))
    assert len(load_file("export/pytorch_lora_weights.safetensors")) == len(
        list(filter(is_adapter, whole["state_dict"]))
    )
    assert "trained without model.lora.rank" in run_to_message(
        "export", capfd, "checkpoint=next", "out=x", "adapter=true"
    )


@pytest.mark.slow
def test_a_compiled_run_trains_as_a_plain_one(capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("false", "true"):
        run_to_success("train", capfd, *FEW, f"model.compile={name}", f"hydra.run.dir=run_{name}")
    plain, compiled = (read_checkpoint(f"run_{name}")["state_dict"] for name in ("false", "true"))
    assert plain.keys() == compiled.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-3, atol=2e-4)


def test_a_checkpointed_run_trains_as_a_plain_one(capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("false", "true"):
        both = [f"model.denoiser_checkpointing={name}", f"model.query_checkpointing={name}"]
        options = [*both, "stage=ti2i_pretrain", "stage.previous=null", f"hydra.run.dir=run_{name}"]
        run_to_success("train", capfd, *FEW, *options)
    plain, checkpointed = (read_checkpoint(f"run_{name}")["state_dict"] for name in ("false", "true"))
    for name, tensor in plain.items():
        torch.testing.assert_close(checkpointed[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("trained_run")
def test_the_quantisation_study_compares_every_option_with_the_plain_one(capfd: pytest.CaptureFixture[str]) -> None:
    text = run_to_success(
        "studies.quantization.run", capfd, "checkpoint=run", "geneval.num_inference_steps=1", "out=study"
    )
    rows = json.loads(Path("study/report.json").read_text())
    assert [row["MLLM layers"] for row in rows] == ["float32", "bfloat16", "int8", "nf4"]
    sizes = [row["MiB"] for row in rows]
    assert sizes == sorted(sizes, reverse=True)
    cosines = {row["MLLM layers"]: row["cosine of taps"] for row in rows}
    assert cosines["float32"] == pytest.approx(1)
    assert 0.5 < cosines["nf4"] < cosines["int8"] < 1
    assert "| MLLM layers | MiB | cosine of taps | GenEval rules | answers |" in text
