"""The planner against formulas, published counts and measurement."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from experiments.budget import (
    Setting,
    build_on_meta,
    count_in_use,
    count_stage_flops,
    count_trained,
    estimate_memory,
    find_largest_batch,
)
from experiments.costs import (
    Case,
    _count_convolution_backward,
    _measure_saved_bytes,
    adapt_denoiser,
    count_autoencoder_flops,
    count_sample_flops,
    make_inputs,
    measure_activations,
)
from experiments.speed.measure import MIB, in_child
from experiments.speed.training import OURS, one_side
from tbac.app import to_plain
from tbac.models.config import LoraOptions
from tbac.reinforcement import NFTOptions
from tbac.training.callbacks.reinforce import Reinforce
from tbac.training.groups import DrawingOptions
from tbac.training.reinforce_options import ReinforceOptions
from tbac.training.rewarding import WeightedReward
from tbac.training.stages import FlowOptions
from tbac.types import Batch
from tests.helpers.commands import run_to_message, run_to_success
from tests.helpers.configs import compose_config
from tests.helpers.rewards import Redness
from tests.helpers.small_bench import SMALL
from tests.helpers.training import make_module, make_trainer
from tests.helpers.worlds import load_small_model

REAL = "world=real"


@pytest.fixture
def config() -> dict:
    return to_plain(compose_config("bench", *SMALL))["model"]


def test_kept_prompts_save_what_is_said(in_world: Path, capfd: pytest.CaptureFixture[str]) -> None:
    reports = []
    for keep in ("null", "prompts"):
        options = ["world=shapes", "machine=local", "stages=[ti2i_pretrain]", f"prompt_cache.keep={keep}"]
        run_to_success("plan", capfd, *options, f"hydra.run.dir=run_{keep}")
        reports += json.loads(Path(f"run_{keep}/report.json").read_text())["stages"]
    plain, kept = reports
    ratio = kept["samples_per_s_per_gpu"] / plain["samples_per_s_per_gpu"]
    assert ratio == pytest.approx(plain["prompt_cache"]["prompts"]["faster_by"], rel=1e-2)
    assert kept["flops_per_sample"]["vision"] == kept["flops_per_sample"]["prefix"] == 0
    assert kept["prompt_cache"] == plain["prompt_cache"]


def test_the_real_model_is_counted_as_published(capfd: pytest.CaptureFixture[str]) -> None:
    text = run_to_success("plan", capfd, REAL, "hydra.run.dir=run")
    report = json.loads(Path("run/report.json").read_text())
    assert {name: round(count / 1e6, 1) for name, count in report["parameters"].items()} == {
        "mllm_layers": 2774.8,
        "mllm_embeddings": 311.2,
        "mllm_vision": 668.7,
        "queries": 0.1,
        "connector": 10.0,
        "denoiser": 1604.5,
        "autoencoder": 312.3,
    }
    assert report["taps"] == list(range(16, 36))
    assert count_autoencoder_flops(to_plain(compose_config("plan", REAL).model), 512) / 1e12 == pytest.approx(
        1.3, rel=0.05
    )
    text_stage, edit_stage, _ = report["stages"]
    assert text_stage["flops"] / 1e12 == pytest.approx(3.8, rel=0.05)
    assert edit_stage["flops"] / 1e12 == pytest.approx(6.6, rel=0.05)
    assert edit_stage["flops_per_sample"]["vision"] / 1e12 == pytest.approx(1.3, rel=0.05)
    assert text_stage["samples"] == 150000 * 16 * 64
    rate = 0.4 * 989e12 / text_stage["flops"]
    assert text_stage["samples_per_s_per_gpu"] == pytest.approx(rate, rel=1e-3)
    assert text_stage["gpu_hours"] == pytest.approx(text_stage["samples"] / rate / 3600, rel=1e-2)
    # A prompt cache spares the prompt pass and the vision tower, for keys and values of 36 layers in bf16.
    spared = text_stage["prompt_cache"]["prompts"]
    assert spared["tflop_saved"] == pytest.approx(text_stage["flops_per_sample"]["prefix"] / 1e12, rel=1e-2)
    assert spared["tflop_saved"] == pytest.approx(0.7, abs=0.1)
    assert spared["mib_an_entry"] == pytest.approx(128 * 35 * 2 * 256 * 2 / 2**20, rel=1e-3)
    assert spared["gib_read_per_s_per_gpu"] == pytest.approx(
        spared["mib_an_entry"] / 1024 * rate * spared["faster_by"], rel=1e-2
    )
    edits = edit_stage["prompt_cache"]
    assert edits["prompts"]["tflop_saved"] == pytest.approx(3.4, abs=0.1)
    assert edits["images"]["mib_an_entry"] == pytest.approx(256 * 2048 * 2 / 2**20)
    assert edits["prompts"]["gib_per_thousand_samples"] == pytest.approx(
        3 * edits["prompts"]["mib_an_entry"] * 1000 / 1024, rel=1e-2
    )
    assert "| prompts: faster by, from the second epoch on |" in text
    assert "| largest batch, finetune | 24 GB | 48 GB | 80 GB | 141 GB |" in text


def test_settings_change_what_they_should(capfd: pytest.CaptureFixture[str]) -> None:
    options = ["model=midsize", "stages=[t2i_pretrain]"]
    memory = {}
    for name, more in {
        "plain": [],
        "8bit": ["optim=adamw8bit"],
        "nf4": ["model.quantization=nf4"],
        "fsdp": ["machine.strategy=fsdp"],
        "checkpointing": ["model.denoiser_checkpointing=true", "model.query_checkpointing=true"],
        "online": ["cached_latents=false"],
        "noises": ["stage.noise_samples_per_prompt=4"],
    }.items():
        run_to_success("plan", capfd, *options, *more, f"hydra.run.dir={name}")
        memory[name] = json.loads(Path(f"{name}/report.json").read_text())["stages"][0]
    gib = {name: stage["memory_gib"] for name, stage in memory.items()}
    assert gib["8bit"]["optimizer"] == pytest.approx(gib["plain"]["optimizer"] / 4, rel=1e-2)
    assert gib["nf4"]["frozen weights"] < 0.6 * gib["plain"]["frozen weights"]
    assert gib["fsdp"]["optimizer"] == pytest.approx(gib["plain"]["optimizer"] / 64, abs=1e-3)
    assert gib["checkpointing"]["activations"] < 0.2 * gib["plain"]["activations"]
    assert gib["online"]["frozen weights"] > gib["plain"]["frozen weights"]
    assert memory["online"]["flops_per_sample"]["autoencoder"] > 0
    flops = {name: stage["flops_per_sample"] for name, stage in memory.items()}
    assert flops["noises"]["denoiser"] == pytest.approx(4 * flops["plain"]["denoiser"])
    assert flops["noises"]["prefix"] == flops["plain"]["prefix"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["utilisation=0"], "utilisation must be positive and at most 1, got 0"),
        (["machine.precision=16-mixed"], "machine.precision must be bf16-mixed or 32-true, got '16-mixed'"),
        (["text_tokens=0"], "text_tokens must be at least 1, got 0"),
        (["stages=[t2i_pretrain,other]"], "other"),
        (["taps=explicit", "taps.layers=[1,99]"], "99"),
    ],
)
def test_what_can_t_be_planned_is_refused(capfd: pytest.CaptureFixture[str], options: list[str], words: str) -> None:
    assert words in run_to_message("plan", capfd, "model=midsize", *options)


def test_prompts_cost_what_their_matrices_do(config: dict) -> None:
    """Two FLOPs a multiply-add; the last layer of the prompt makes only keys and values."""
    one, two = (count_sample_flops(config, Case("text", tokens, 1), 4) for tokens in (24, 40))
    hidden, inner, kv, layers = 64, 96, 2 * 2 * 16, 3  # taps 1..3 of 4 layers
    projections = 2 * hidden * hidden + kv * hidden + 3 * hidden * inner
    per_token = 2 * ((layers - 1) * projections + kv * hidden)
    attention = sum(2 * 2 * 2 * hidden * (a * a - b * b) / 2 for a, b in [(40, 24)] * (layers - 1))
    difference = two["prefix"] - one["prefix"]
    assert difference == pytest.approx(16 * per_token + attention, rel=0.02)
    assert one["denoiser"] == two["denoiser"]
    assert one["vision"] == 0


def test_grouped_convolutions_are_counted_once() -> None:
    dense, grouped = torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.Conv2d(8, 8, 3, padding=1, groups=8)
    found = []
    mapping = {torch.ops.aten.convolution_backward: _count_convolution_backward}
    for layer in (dense, grouped):
        with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            layer(torch.randn(1, 8, 5, 5, requires_grad=True)).sum().backward()
        found.append(counter.get_total_flops())
    assert found == [3 * 2 * 25 * 8 * 8 * 9, 3 * 2 * 25 * 8 * 9]


def test_activations_grow_with_the_batch_alone(config: dict) -> None:
    kept = measure_activations(config, Case("text", 24, 1), 4, mixed=False)
    assert kept.fixed == 0
    assert kept.denoiser > kept.block_inputs > 0
    checkpointed = {**config, "denoiser_checkpointing": True, "query_checkpointing": True}
    assert measure_activations(checkpointed, Case("text", 24, 1), 4, mixed=False) == kept
    mixed = measure_activations(config, Case("text", 24, 1), 4, mixed=True)
    assert 0.4 * kept.denoiser < mixed.denoiser < kept.denoiser
    trained = sum(
        p.numel() for part in (build_on_meta(config).ladder, build_on_meta(config).denoiser) for p in part.parameters()
    )
    assert mixed.fixed == pytest.approx(2 * trained, rel=0.1)  # autocast's copies


def test_what_fits_is_what_remains() -> None:
    assert find_largest_batch(100.0, lambda batch: 40.0 + 7.0 * batch) == 8
    assert find_largest_batch(30.0, lambda batch: 40.0 + 7.0 * batch) == 0
    assert find_largest_batch(100.0, lambda batch: max(90.0, 2.0 * batch)) == 50


def test_activations_and_gradients_have_their_peaks_at_different_times(config: dict) -> None:
    """Few samples: the peak is at the end of the backward pass; many: at its beginning, unless gradients stay."""
    model, kept = build_on_meta(config), measure_activations(config, Case("text", 24, 1), 4, mixed=True)
    setting = Setting("adamw", None, False, False, "auto", 1, True, True)
    trained = 4.0 * sum(p.numel() for part in (model.ladder, model.denoiser) for p in part.parameters())
    few, many = (estimate_memory(model, "float32", setting, kept, batch) for batch in (1, 1000))
    assert (few["gradients"], many["gradients"]) == (trained, 0.0)
    assert many["activations"] > 1000 * (kept.queries + kept.denoiser)
    added = estimate_memory(model, "float32", replace(setting, accumulating=True), kept, 1000)
    assert sum(added.values()) == sum(many.values()) + trained
    totals = [sum(estimate_memory(model, "float32", setting, kept, batch).values()) for batch in range(1, 200)]
    assert totals == sorted(totals)


@pytest.mark.slow
@pytest.mark.parametrize("case", [Case("text", 256, 4), Case("image + text", 256, 4, 13)])
def test_planned_memory_is_near_the_measured(case: Case) -> None:
    config = to_plain(compose_config("bench"))
    model = build_on_meta(config["model"])
    kept = measure_activations(config["model"], case, 16, mixed=False)
    # A CPU's allocator keeps what was freed, so what is needed at different times adds up, as if gradients stayed.
    setting = Setting("adamw", None, False, False, "auto", 1, False, True, accumulating=True)
    planned = estimate_memory(model, "float32", setting, kept, case.batch)
    above = sum(p.numel() for p in model.mllm.body.language_model.layers[-1].parameters()) * 4  # it has all its layers
    measured = in_child(one_side, OURS, config, "cpu", case, 0)["memory"]["peak_mib"]
    assert (sum(planned.values()) + above) / MIB == pytest.approx(measured, rel=0.1)


def test_options_of_the_model_are_counted(config: dict) -> None:
    text, edit = Case("text", 24, 1), Case("image + text", 24, 1, 3)
    plain = {case.name: count_sample_flops(config, case, 4) for case in (text, edit)}
    context = count_sample_flops({**config, "ladder": {**config["ladder"], "prompt_context": True}}, text, 4)
    queries = config["num_queries"]
    assert context["ladder"] == pytest.approx(plain["text"]["ladder"] * (queries + 24) / queries, rel=0.02)
    assert context["denoiser"] > plain["text"]["denoiser"]
    assert context["queries"] == plain["text"]["queries"]
    # Three joined layers make the connector's first matrix three times as wide; all blocks read one bundle.
    bundles = {**config, "taps": {**config["taps"], "_target_": "tbac.models.taps.bundle", "layers": [1, 2, 3]}}
    model = build_on_meta(config)
    hidden, channels = model.mllm.hidden_size, model.denoiser.transformer.config.caption_channels
    ratio = (3 * hidden + channels) / (hidden + channels) / len(model.ladder.plan.layers)
    assert count_sample_flops(bundles, text, 4)["ladder"] == pytest.approx(plain["text"]["ladder"] * ratio, rel=1e-3)
    with_reference = {**config, "reference_latents": True}
    assert "reference" not in count_sample_flops(with_reference, text, 4)
    found = count_sample_flops(with_reference, edit, 4)
    assert found["reference"] == count_autoencoder_flops(config, 128)
    assert found["queries"] == plain["image + text"]["queries"]


def test_of_a_denoiser_with_adapters_these_alone_train(config: dict) -> None:
    plain = build_on_meta(config)
    adapted = build_on_meta({**config, "lora": {"rank": 4, "alpha": None, "targets": ["to_q"]}})
    width = adapted.denoiser.transformer.transformer_blocks[0].attn1.to_q.in_features
    adapters = adapted.denoiser.num_blocks * 2 * (2 * 4 * width)  # two attentions in a block, two matrices each
    assert count_trained(adapted)["denoiser"] == adapters
    assert count_trained(plain)["denoiser"] == sum(p.numel() for p in plain.denoiser.parameters())
    # The denoiser's own weights move from those that train to the frozen ones.
    before, after = count_in_use(plain), count_in_use(adapted)
    own = count_trained(plain)["denoiser"]
    assert after["other"] - before["other"] == own
    assert before["trained"] - after["trained"] == own - adapters


class CountFlops(TorchDispatchMode):
    """Counts FLOPs by torch's own formulas; its `FlopCounterMode` can't see passes without gradient within others."""

    flops = 0.0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        formulas = {**flop_registry, torch.ops.aten.convolution_backward: None}
        if function.overloadpacket is torch.ops.aten.convolution_backward:
            shapes = [tensor.shape for tensor in arguments[:3]]
            self.flops += _count_convolution_backward(*shapes, *arguments[3:])
        elif function.overloadpacket in formulas:
            self.flops += formulas[function.overloadpacket](*arguments, **(options or {}), out_val=result)
        return result


@pytest.mark.parametrize("overrides", [[], ["model.lora.rank=2"], ["stage.reinforce.loss.kl_weight=0"]])
def test_a_step_of_reinforcement_is_counted_as_it_is(in_world: Path, overrides: list[str]) -> None:
    options = [
        "stage=reinforce",
        "stage.reinforce.drawing.group_size=3",
        "stage.noise_samples_per_prompt=2",
        *overrides,
    ]
    plan = to_plain(compose_config("plan", "world=shapes", "machine=local", "text_tokens=30", *options, *overrides))
    planned = count_stage_flops(plan, {Case("text", 30, 1): 1.0}, 4)
    # The same step, counted while it runs; a prompt of 30 tokens has none in common with another one.
    model = load_small_model(in_world, *(override for override in overrides if override.startswith("model.")))
    prompt = make_inputs(model, Case("text", 30, 1), 0)
    drawing = DrawingOptions(3, plan["stage"]["reinforce"]["drawing"]["num_inference_steps"])
    loss = NFTOptions(kl_weight=plan["stage"]["reinforce"]["loss"]["kl_weight"])
    callback = Reinforce([WeightedReward("red", Redness(None))], ReinforceOptions("shards", drawing=drawing, loss=loss))
    module = make_module(model, flow=FlowOptions(noise_samples_per_prompt=2))
    module.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
    trainer = make_trainer(1, callbacks=[])
    trainer.datamodule = type("Data", (), {"state_dict": lambda self: {}})()
    callback.on_train_start(trainer, module)
    batch = Batch(prompt, ["k"], latents=torch.randn(1, model.latent_channels, 6, 6), texts=["x"], positions=[0])
    with CountFlops() as counter:
        module.objective(batch).backward()  # type: ignore[misc]
    assert sum(planned.values()) == pytest.approx(counter.flops, rel=0.1)


def test_policies_are_counted(in_world: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stages = {}
    for name, overrides in {
        "full": [],
        "lora": ["model.lora.rank=2"],
        "free": ["stage.reinforce.loss.kl_weight=0"],
    }.items():
        options = ["world=shapes", "machine=local", "stage=reinforce", "stages=[reinforce]", *overrides]
        text = run_to_success("plan", capfd, *options, f"hydra.run.dir={name}")
        assert "| policies |" in " ".join(text.split())
        stages[name] = json.loads(Path(f"{name}/report.json").read_text())
    full, lora, free = (stages[name]["stages"][0] for name in ("full", "lora", "free"))
    for name, copies in (("full", 2), ("lora", 2), ("free", 1)):
        expected = copies * 4 * stages[name]["trained"] / 2**30
        assert stages[name]["stages"][0]["memory_gib"]["policies"] == pytest.approx(expected, abs=1e-3)
    assert lora["memory_gib"]["policies"] < full["memory_gib"]["policies"]
    assert free["flops"] < full["flops"]
    assert full["flops_per_sample"]["pictures drawn"] > full["flops_per_sample"]["other policies"]


def test_adapters_keep_the_activations_that_peft_s_keep(in_world: Path) -> None:
    """The planner's stand-in, on real tensors: the same bytes are saved for the backward pass."""
    saved = []
    for adapted in (True, False):
        model = load_small_model(in_world, *(["model.lora.rank=2"] if adapted else []))
        if not adapted:
            adapt_denoiser(model.denoiser.transformer, LoraOptions(2), torch.float32)
        saved.append(_measure_saved_bytes(model, Case("text", 30, 2), 6, mixed=False))
    assert saved[0] == saved[1]
    full = _measure_saved_bytes(load_small_model(in_world), Case("text", 30, 2), 6, mixed=False)
    assert saved[0]["denoiser"] < full["denoiser"]
