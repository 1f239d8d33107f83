"""The main job, as small as it gets: world, stages, scores, suites, report."""

import json
from pathlib import Path

import pytest

from tests.helpers.commands import run_to_success

WORLD = [
    "sizes.t2i=64", "sizes.edit=64", "sizes.curated=64", "sizes.val=8", "sizes.prompts_per_tag=1", "sizes.questions=8",
    "sizes.edits=6", "sizes.dense=1", "sizes.pairs_per_type=1", "autoencoder.steps=3", "denoiser.steps=3",
    "mllm.vision_steps=3", "mllm.steps=3", "mllm.pictures=40",
]  # fmt: skip
STAGE = ["stage.steps=2", "stage.warmup_steps=1", "stage.val_every=2", "stage.val_samples=8", "stage.batch_size=4"]


@pytest.mark.slow
def test_everything_is_built_trained_and_scored(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TBAC_SHAPES", "elsewhere")  # the preset has a world of its own
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{Path.cwd()}/mlflow.db")
    stages = ",".join(f"{stage}:{json.dumps(STAGE)}" for stage in ("t2i_pretrain", "ti2i_pretrain", "finetune"))
    options = [
        "experiment=shapes_full", "out=demo", "world_folder=demo/world", f"world_overrides={json.dumps(WORLD)}",
        f"stage_overrides={{{stages}}}",
        "geneval.num_inference_steps=2", "edits.num_inference_steps=2",
    ]  # fmt: skip
    run_to_success("demo", capfd, *options, "hydra.run.dir=demo/run")
    report = json.loads(Path("demo/report.json").read_text())
    assert [stage["steps"] for stage in report["stages"]] == [2, 2, 2]
    assert report["answers_identical"]
    assert report["detector_accuracy"] == 1.0
    assert set(report["geneval"]) == {"untrained", "t2i_pretrain", "ti2i_pretrain", "finetune"}
    assert {"DPG-Bench: overall", "TIIF-Bench: overall, short", "TIIF-Bench: text, long"} <= set(report["suites"])
    assert "| TIIF-Bench: overall, long |" in Path("demo/report.md").read_text()
    for file in ("contact_sheet.png", "dpg/report.html", "tiif/report.md", "model/model.safetensors"):
        assert Path("demo", file).is_file(), file
    config = json.loads(Path("demo/model/config.json").read_text())
    assert config["reference_latents"]
    assert config["spell_words"]
    assert config["ladder"]["prompt_context"]
    assert not Path("elsewhere").exists()
