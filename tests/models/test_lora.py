"""Adapters of the denoiser: they begin as nothing, train alone, and end as part of its matrices."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tbac.models import UniImage
from tbac.models.config import LoraOptions, ModelConfig
from tbac.models.lora import extract_adapters, is_adapter, merge_adapters
from tbac.models.saved import FACTS, SavedModel, read_saved_model
from tbac.training.checkpoints import describe_model, load_weights
from tbac.training.stages import Stage
from tests.helpers.worlds import load_small_model

TEXTS = ["a red circle", "two green squares on a black background"]
FILE = "pytorch_lora_weights.safetensors"
LORA = ("model.lora.rank=3", "model.lora.alpha=6")


@pytest.fixture
def adapted(in_world: Path) -> UniImage:
    return load_small_model(in_world, *LORA)


def fill_adapters(model: UniImage) -> None:
    """Give adapters the numbers that training would."""
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.denoiser.named_parameters():
            if is_adapter(name):
                parameter.normal_(std=0.2)


def predict(model: UniImage) -> Tensor:
    latents = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model.predict_velocity(latents, torch.tensor([0.5]), model.encode_condition(model.prompt(TEXTS)))


def saved_of(model: UniImage) -> SavedModel:
    """What a training checkpoint of `model` would hold of it."""
    return read_saved_model({FACTS: describe_model(model), "state_dict": model.get_trained_state()}, "run.ckpt")


def train_a_step(model: UniImage, trainable: tuple[str, ...] = ("queries", "connector", "denoiser")) -> set[str]:
    """Take one step of plain gradient descent on what a stage trains; returns the names of what changed."""
    Stage("t2i_pretrain", torch.optim.SGD, lambda *_: None, steps=1, trainable=trainable).apply_trainable(
        [(name, p) for name, p in model.named_parameters() if name.split(".")[0] in ("ladder", "denoiser")]
    )
    before = {name: tensor.clone() for name, tensor in model.get_trained_state().items()}
    latents = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(6))
    condition = model.encode_condition(model.prompt(TEXTS))
    model.predict_velocity(latents, torch.tensor([0.4]), condition).square().mean().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    return {name for name, tensor in model.get_trained_state().items() if not torch.equal(tensor, before[name])}


def test_adapters_begin_as_nothing(model: UniImage, adapted: UniImage) -> None:
    assert torch.equal(predict(model), predict(adapted))
    fill_adapters(adapted)
    assert not torch.allclose(predict(model), predict(adapted))


def test_only_adapters_train_of_the_denoiser(adapted: UniImage) -> None:
    fill_adapters(adapted)
    changed = train_a_step(adapted)
    of_denoiser = {name for name in changed if name.startswith("denoiser.")}
    assert of_denoiser == {name for name, _ in adapted.named_parameters() if is_adapter(name)}
    assert "ladder.queries" in changed
    assert all(p.dtype == torch.float32 for name, p in adapted.named_parameters() if is_adapter(name))


def test_a_stage_that_doesn_t_train_the_denoiser_leaves_adapters_alone(adapted: UniImage) -> None:
    fill_adapters(adapted)
    assert not any(name.startswith("denoiser.") for name in train_a_step(adapted, ("queries", "connector")))


def test_merged_adapters_compute_the_same(adapted: UniImage, tmp_path: Path) -> None:
    fill_adapters(adapted)
    expected = predict(adapted)
    adapted.save_pretrained(tmp_path / "export")
    for opened in (UniImage.from_saved(saved_of(adapted)), UniImage.from_pretrained(tmp_path / "export")):
        assert opened.provenance.config.lora == LoraOptions()
        assert not any(map(is_adapter, opened.get_trained_state()))
        torch.testing.assert_close(predict(opened), expected, rtol=1e-4, atol=1e-5)


def test_a_product_is_added_to_its_matrix_by_its_share() -> None:
    base, down, up = torch.randn(4, 5), torch.randn(2, 5), torch.randn(4, 2)
    state = {
        "a.to_q.base_layer.weight": base, "a.to_q.base_layer.bias": torch.ones(4), "a.norm.weight": torch.ones(3),
        "a.to_q.lora_A.default.weight": down, "a.to_q.lora_B.default.weight": up,
    }  # fmt: skip
    merged = merge_adapters(state, LoraOptions(rank=2, alpha=5))
    assert set(merged) == {"a.to_q.weight", "a.to_q.bias", "a.norm.weight"}
    torch.testing.assert_close(merged["a.to_q.weight"], base + 2.5 * up @ down)


def test_training_goes_on_with_or_without_adapters(model: UniImage, adapted: UniImage, in_world: Path) -> None:
    # From full training to adapters: the base is what was trained, and adapters start as nothing.
    train_a_step(model)
    load_weights(saved_of(model), adapted)
    assert torch.equal(predict(adapted), predict(model))
    # The same adapters go on as they are.
    fill_adapters(adapted)
    same = load_small_model(in_world, *LORA)
    load_weights(saved_of(adapted), same)
    assert torch.equal(predict(same), predict(adapted))
    # Others, or none, begin from what adapters have become.
    for overrides in (("model.lora.rank=2",), ()):
        other = load_small_model(in_world, *overrides)
        load_weights(saved_of(adapted), other)
        torch.testing.assert_close(predict(other), predict(adapted), rtol=1e-4, atol=1e-5)


def test_tensors_that_are_missing_or_too_many_are_named(model: UniImage, adapted: UniImage) -> None:
    saved = saved_of(model)
    saved.state.pop("denoiser.transformer.proj_out.bias")
    saved.state["denoiser.transformer.more"] = torch.ones(1)
    with pytest.raises(ValueError, match=r"missing denoiser.transformer.proj_out.bias; unexpected .*more"):
        load_weights(saved, adapted)


def test_diffusers_reads_an_adapter(adapted: UniImage, model: UniImage, tmp_path: Path) -> None:
    fill_adapters(adapted)
    adapted.save_adapter(tmp_path)
    assert set(load_file(tmp_path / FILE)) == {
        f"transformer.{name}" for name in extract_adapters(adapted.get_trained_state())
    }
    model.denoiser.transformer.load_lora_adapter(tmp_path, weight_name=FILE)
    torch.testing.assert_close(predict(model), predict(adapted), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"has no adapters: it was trained without model.lora.rank"):
        UniImage.from_saved(saved_of(adapted)).save_adapter(tmp_path)


def test_a_frozen_base_is_held_in_the_frozen_parts_type(in_world: Path) -> None:
    model = load_small_model(in_world, *LORA, "model.dtype=bfloat16")
    kinds = {is_adapter(name): p.dtype for name, p in model.denoiser.transformer.named_parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    assert predict(model).isfinite().all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "model.lora.rank must be at least 1"),
        ({"rank": 1.5}, "model.lora.rank must be at least 1"),
        ({"rank": 4, "alpha": 0}, "model.lora.alpha must be above 0"),
        ({"rank": 4, "alpha": float("nan")}, "model.lora.alpha must be above 0"),
        ({"rank": 4, "targets": []}, "model.lora.targets must be a list of names"),
        ({"rank": 4, "targets": [3]}, "model.lora.targets must be a list of names"),
    ],
)
def test_options_that_can_t_be_are_named(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LoraOptions(**options)


@pytest.mark.parametrize("options", [{"alpha": 8.0}, {"targets": ["to_q"]}])
def test_options_of_adapters_without_a_rank_are_named(options: dict) -> None:
    with pytest.raises(
        ValueError, match=rf"model\.lora\.{next(iter(options))} is of adapters, and model\.lora\.rank=null"
    ):
        LoraOptions(**options)


def test_a_target_that_no_matrix_has_is_named_with_those_that_there_are(in_world: Path) -> None:
    with pytest.raises(ValueError, match=r"no matrix .* is called 'attn3'; there are attn1.to_q, .*attn2.to_k"):
        load_small_model(in_world, "model.lora.rank=2", "model.lora.targets=[attn3]")
    one = load_small_model(in_world, "model.lora.rank=2", "model.lora.targets=attn2.to_k")
    names = {name.split(".", 3)[3] for name, _ in one.denoiser.named_parameters() if is_adapter(name)}
    assert names == {"attn2.to_k.lora_A.default.weight", "attn2.to_k.lora_B.default.weight"}


def test_options_are_kept_as_plain_values() -> None:
    config = ModelConfig(mllm="a", denoiser="b", image_pixels=1, lora={"rank": 2, "targets": "to_q"})  # type: ignore[arg-type]
    assert config.lora == LoraOptions(2, None, ("to_q",))
    assert LoraOptions.from_dict(config.lora.to_dict()) == config.lora
