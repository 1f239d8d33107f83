"""The MLLM in fewer bits: near the whole one, trainable through, the same in answering and after a save."""

from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from hydra.errors import InstantiationException

from tbac.models import UniImage
from tests.helpers.pictures import make_prompt_cases
from tests.helpers.worlds import load_small_model

KINDS = {"nf4": Linear4bit, "int8": Linear8bitLt}


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_decoder_layers_are_quantised(in_world: Path, kind: str) -> None:
    model = load_small_model(in_world, f"model.quantization={kind}")
    language, visual = model.mllm.body.language_model, model.mllm.body.visual
    quantised = [m for m in language.modules() if isinstance(m, KINDS[kind])]
    assert len(quantised) == 7 * len(language.layers)
    assert not any(isinstance(m, KINDS[kind]) for m in visual.modules())
    assert language.embed_tokens.weight.dtype == torch.float32


def taps_and_gradient(model: UniImage, case: str) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, plan = model.prompt(*make_prompt_cases()[case]), model.ladder.plan
    taps = model.mllm.read_queries(model.ladder.queries, model.mllm.read_prefix(inputs, plan.deepest), plan.layers)
    taps.square().mean().backward()
    return taps.detach(), model.ladder.queries.grad


@pytest.mark.parametrize("case", ["text", "mixed"])
def test_nf4_is_the_plain_pass_with_the_weights_that_it_stands_for(in_world: Path, case: str) -> None:
    model, plain = load_small_model(in_world, "model.quantization=nf4"), load_small_model(in_world)
    for name, module in model.mllm.body.language_model.named_modules():
        if isinstance(module, Linear4bit):
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.mllm.body.language_model.get_submodule(name).weight.data.copy_(weight)
    (taps, gradient), (expected, expected_gradient) = (taps_and_gradient(m, case) for m in (model, plain))
    torch.testing.assert_close(taps, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("kind", "least"), [("nf4", 0.75), ("int8", 0.98)])
@pytest.mark.parametrize("case", ["text", "mixed"])
def test_quantised_taps_stay_near_the_whole_ones(in_world: Path, kind: str, least: float, case: str) -> None:
    ours, plain = (
        taps_and_gradient(load_small_model(in_world, f"model.quantization={q}"), case) for q in (kind, "null")
    )
    assert not torch.equal(ours[0], plain[0])
    assert torch.nn.functional.cosine_similarity(ours[0], plain[0], dim=-1).mean() > least
    assert torch.isfinite(ours[1]).all()
    assert ours[1].abs().max() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_model_answers_and_saves_what_it_trains(in_world: Path, tmp_path: Path, kind: str) -> None:
    model = load_small_model(in_world, f"model.quantization={kind}")
    answers = model.answer(["what is it?"], None, 3)
    assert isinstance(answers[0], str)
    model.save_pretrained(tmp_path / "slim", standalone=True)
    whole, again = (UniImage.from_pretrained(tmp_path / "slim", quantization=q) for q in (None, kind))
    assert all(torch.equal(v, model.get_trained_state()[k]) for k, v in whole.get_trained_state().items())
    inputs = model.prompt(["a red circle"])
    assert torch.equal(again.encode_condition(inputs).states, model.encode_condition(inputs).states)


def test_other_quantisations_are_refused(in_world: Path) -> None:
    with pytest.raises((ValueError, InstantiationException), match=r"model\.quantization must be null, nf4 or int8"):
        load_small_model(in_world, "model.quantization=fp4")
