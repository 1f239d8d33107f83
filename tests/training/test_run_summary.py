"""Runs are told apart by a few parameters and by their names."""

from typing import Any

import pytest

from tbac.app import to_plain
from tbac.models.taps import TapPlan
from tbac.training.run_summary import add_varied, name_run, summarize
from tests.helpers.configs import compose_config

PLAN = TapPlan(layers=(1, 2, 3, 4), assignment=(0, 1, 2, 3), mixed=False, num_blocks=4)


def compose(*overrides: str) -> dict[str, Any]:
    return to_plain(compose_config("train", "run_dir=.", *overrides))


@pytest.mark.parametrize(
    ("override", "name", "value"),
    [
        ("taps=final", "taps", "final"),
        ("ladder=per_tap_mlp", "connector", "per_tap_mlp"),
        ("ladder.tap_norm=rms", "tap_norm", "rms"),
        ("ladder.prompt_context=true", "prompt_context", "True"),
        ("stage.lr=3e-4", "lr", "0.0003"),
        ("stage.batch_size=3", "batch_size", "3"),
        ("stage.steps=77", "steps", "77"),
        ("stage=finetune", "stage", "finetune"),
        ("seed=5", "seed", "5"),
        ("model.num_queries=7", "num_queries", "7"),
        ("model.reference_latents=true", "reference_latents", "True"),
        ("optim=adamw8bit", "optimizer", "adamw8bit"),
        ("machine.precision=bf16-mixed", "precision", "bf16-mixed"),
        ("model.lora.rank=4", "lora_rank", "4"),
        ("model.dtype=bfloat16", "dtype", "bfloat16"),
        ("model.image_pixels=784", "image_pixels", "784"),
        ("model.mllm=Qwen/Qwen2.5-VL-7B-Instruct", "mllm", "Qwen2.5-VL-7B-Instruct"),
        ("prompt_cache.keep=prompts", "prompt_cache", "prompts"),
    ],
)
def test_what_an_experiment_turns_is_a_parameter(override: str, name: str, value: str) -> None:
    turned, before = (summarize([compose(*options)], PLAN) for options in ([override], []))
    assert turned[name] == value
    assert turned[name] != before.get(name)


def test_the_kind_of_a_mix_is_a_parameter() -> None:
    for value in ("False", "True"):
        assert summarize([compose("taps=learned_mix", f"taps.shared={value}")], PLAN)["shared"] == value


@pytest.mark.parametrize("key", ["stage.dropout.caption_drop_prob", "callbacks.guard.patience", "machine.num_workers"])
def test_whatever_a_multirun_varies_is_a_parameter(key: str) -> None:
    runs = []
    for value in ("0", "1"):
        config = compose(f"{key}={value}")
        runs.append(add_varied(summarize([config], PLAN), {key: value, "taps": "final", "stage.lr": "1"}, config))
    assert [run[key] for run in runs] == ["0", "1"]
    assert {"taps", "lr"} < set(runs[0])
    assert "stage.lr" not in runs[0]  # it is there as `lr`


def test_resolved_layers_follow_the_blocks() -> None:
    assigned = TapPlan(layers=(2, 5), assignment=(1, 0, 0), mixed=False, num_blocks=3)
    assert summarize([compose()], assigned)["tap_layers"] == "[5, 2, 2]"
    bundled = TapPlan.per_block([[1, 2], [2, 3]])
    assert summarize([compose()], bundled)["tap_layers"] == "[[1, 2], [2, 3]]"
    mixed = TapPlan((1, 2, 3), (), True, 4, "attend")
    assert summarize([compose()], mixed)["tap_layers"] == "mix of 1..3"
    assert summarize([compose()], mixed.place([2, 3, 1, 4], 5, 3))["tap_layers"] == "3" + 4 * ", mix of 1..3"


def test_stages_of_one_run_are_listed_where_they_differ() -> None:
    one, two = compose("stage.lr=1e-3"), compose("stage=finetune", "stage.lr=5e-4")
    summary = summarize([one, two], PLAN)
    assert (summary["lr"], summary["stage"]) == ("0.001 > 0.0005", "t2i_pretrain > finetune")


def test_names_hold_what_a_multirun_varies_and_nothing_twice() -> None:
    summary = summarize([compose("taps=final", "stage.lr=1e-3", "seed=3")], PLAN)
    plain = "final lr=0.001 seed=3 t2i_pretrain"
    assert name_run(summary, {}) == plain
    varied = {"taps": "final", "stage.lr": "1e-3", "seed": "3", "stage.batch_size": "8", "ladder": "per_tap_mlp"}
    assert name_run(summary, varied) == f"{plain} batch_size=8 ladder=per_tap_mlp"
