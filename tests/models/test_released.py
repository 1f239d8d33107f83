"""The released checkpoint: the numbers of the release's own code, and every tensor accounted for."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tbac.flow import compute_timestep, compute_velocity_loss, interpolate
from tbac.models import UniImage
from tbac.models.prompt import SYSTEM_PROMPT
from tbac.models.released import TABLE, read_released
from tests.helpers.configs import ROOT

pytestmark = pytest.mark.xdist_group("released")  # the checkpoint is read once

RELEASED = ROOT / "tests" / "released"
MLLM, DENOISER = str(RELEASED / "base" / "Qwen2.5-VL-tiny"), str(RELEASED / "base" / "Sana-tiny")
RELATIVE = 5e-6  # the release itself differs by 2e-6 between two runs and float64


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> UniImage:
    """Imported, saved and read again."""
    folder = tmp_path_factory.mktemp("imported")
    model, _ = read_released(RELEASED / "checkpoint", MLLM, DENOISER)
    model.save_pretrained(folder)
    return UniImage.from_pretrained(folder)


@pytest.fixture(scope="module")
def case() -> dict[str, Tensor]:
    return load_file(RELEASED / "train_text.safetensors")


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    return json.loads((RELEASED / "case_text.json").read_text())["prompts"]


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference relative to the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def test_prompts_have_the_released_tokens_and_positions(
    released: UniImage, case: dict[str, Tensor], prompts: list[str]
) -> None:
    inputs = released.prompt(prompts)
    count, queries = len(prompts), released.ladder.queries.shape[0]
    assert json.loads((RELEASED / "case_text.json").read_text())["system_prompt"] == SYSTEM_PROMPT
    for row in range(count):
        theirs = case["attention_mask"][row].bool()
        ours = inputs["attention_mask"][row].bool()
        length = int(theirs.sum()) - queries - 2  # without queries, <|vision_end|> and <|im_end|>
        assert inputs["input_ids"][row, ours].tolist() == case["input_ids"][row, theirs][:length].tolist()
        assert torch.equal(inputs["position_ids"][:, row, ours], case["position_ids"][:, row, theirs][:, :length])


def test_taps_context_prediction_and_loss_are_the_released_ones(
    released: UniImage, case: dict[str, Tensor], prompts: list[str]
) -> None:
    inputs = released.prompt(prompts)
    plan = released.ladder.plan
    taps = released.mllm.read_queries(
        released.ladder.queries, released.mllm.read_prefix(inputs, plan.deepest), plan.layers
    )
    assert plan.layers == (2, 3, 4, 5, 6, 7)
    assert distance(taps, case["query_hidden_states"]) < RELATIVE
    condition = released.encode_condition(inputs)
    assert distance(condition.states, case["prompt_embeds"]) < RELATIVE
    path = interpolate(case["target_latents"], case["noise"], case["sigmas"])
    assert distance(path.noisy, case["noisy_latents"]) < 1e-6
    assert torch.equal(compute_timestep(case["sigmas"]), case["timesteps"])
    predicted = released.predict_velocity(case["noisy_latents"], case["sigmas"], condition)
    assert distance(predicted, case["model_pred"]) < RELATIVE
    assert compute_velocity_loss(predicted, path.velocity).item() == pytest.approx(case["loss"].item(), rel=RELATIVE)


def test_gradients_are_the_released_ones(released: UniImage, case: dict[str, Tensor], prompts: list[str]) -> None:
    released.zero_grad()
    path = interpolate(case["target_latents"], case["noise"], case["sigmas"])
    condition = released.encode_condition(released.prompt(prompts))
    compute_velocity_loss(released.predict_velocity(path.noisy, path.sigma, condition), path.velocity).backward()
    ours = {
        "grad.query_rows": released.ladder.queries.grad,
        **{f"grad.model.connector.{k}": p.grad for k, p in released.ladder.connector.named_parameters()},
        **{f"grad.model.transformer.{k}": p.grad for k, p in released.denoiser.transformer.named_parameters()},
    }
    theirs = {name: tensor for name, tensor in case.items() if name.startswith("grad.")}
    total = torch.stack([g.norm() for g in theirs.values()]).norm()
    # A cross-attention's key bias moves all its scores alike, so its gradient is zero and isn't among the numbers.
    silent = {name: ours.pop(name) for name in ours.keys() - theirs.keys()}
    assert all(name.endswith("attn2.to_k.bias") and g.norm() < 1e-6 * total for name, g in silent.items())
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        error = (ours[name] - gradient).norm() / max(gradient.norm(), 1e-4 * total)
        assert error < 2e-5, f"{name}: {error}"
    norm = torch.stack([g.norm() for g in ours.values()]).norm()
    assert norm.item() == pytest.approx(case["grad_norm"].item(), rel=1e-5)


def test_answers_use_the_base_model_s_own_table(released: UniImage) -> None:
    from transformers import Qwen2_5_VLForConditionalGeneration

    base = Qwen2_5_VLForConditionalGeneration.from_pretrained(MLLM)
    table = base.get_input_embeddings().weight
    assert torch.equal(released.mllm.load_full_model().get_input_embeddings().weight, table)
    assert not torch.equal(released.mllm.get_prompt_table(), table)


def test_every_tensor_is_accounted_for() -> None:
    _, accounting = read_released(RELEASED / "checkpoint", MLLM, DENOISER)
    names = set(load_file(RELEASED / "checkpoint" / "model.safetensors"))
    assert {*accounting.used, *accounting.dropped} == names
    assert len(accounting.used) + len(accounting.dropped) == 413
    assert accounting.unused_rows == 2


def changed(folder: Path, change: str, name: str) -> Path:
    """A copy of the checkpoint with one tensor changed."""
    shutil.copytree(RELEASED / "checkpoint", folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensor = tensors.pop(name)
    if change == "renamed":
        tensors[f"{name}_"] = tensor
    elif change == "reshaped":
        tensors[name] = torch.zeros(*tensor.shape, 1)
    elif change == "different":
        tensors[name] = tensor + 1e-3
    elif change == "short":
        tensors[name] = tensor[:1060].clone()
    save_file(tensors, file)
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "model.connector.2.weight",
        "model.transformer.transformer_blocks.3.ff.conv_point.weight",
        "model.mllm_backbone.model.layers.7.mlp.up_proj.weight",
        "model.mllm_backbone.visual.merger.ln_q.weight",
        "vae.encoder.conv_in.weight",
        TABLE,
    ],
)
@pytest.mark.parametrize("change", ["renamed", "missing", "reshaped"])
def test_a_tensor_that_doesn_t_fit_is_refused_by_name(tmp_path: Path, change: str, name: str) -> None:
    with pytest.raises(ValueError, match="isn't what its base models ask for") as error:
        read_released(changed(tmp_path / "checkpoint", change, name), MLLM, DENOISER)
    assert name in str(error.value)


def test_a_table_without_query_rows_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"embed_tokens.weight has shape \(1060, 96\), expected at least \(1072, 96\)"):
        read_released(changed(tmp_path / "checkpoint", "short", TABLE), MLLM, DENOISER)


@pytest.mark.parametrize(
    "name",
    [
        "model.mllm_backbone.model.norm.weight",
        "model.mllm_backbone.visual.merger.ln_q.weight",
        "vae.decoder.norm_out.bias",
    ],
)
def test_a_frozen_tensor_unlike_the_base_model_s_is_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="frozen tensors differ") as error:
        read_released(changed(tmp_path / "checkpoint", "different", name), MLLM, DENOISER)
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "other"}, "model_type must be 'tbacuniimage', got 'other'"),
        ({"num_metaqueries": 0}, "num_metaqueries must be a positive whole number, got 0"),
        ({"loss_type": "diff"}, "loss_type must be 'flow', got 'diff'"),
    ],
)
def test_a_config_that_isn_t_the_release_s_is_refused(tmp_path: Path, change: dict, words: str) -> None:
    config = json.loads((RELEASED / "checkpoint" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=words):
        read_released(tmp_path, MLLM, DENOISER)
