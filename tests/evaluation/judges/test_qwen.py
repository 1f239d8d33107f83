"""A judge that runs on this machine."""

from pathlib import Path

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from tbac.evaluation.judges.base import Manner
from tbac.evaluation.judges.qwen import QwenJudge
from tbac.models.prompt import ANSWER_SYSTEM
from tests.helpers.pictures import make_noise_image


def test_a_local_model_answers(in_world: Path) -> None:
    mllm = str(in_world / "backbones" / "mllm")
    local = QwenJudge(mllm, device="cpu", dtype="float32", image_pixels=576, max_new_tokens=4)
    said = local.ask("is there a circle?", [make_noise_image(1), make_noise_image(2)])
    assert said == local.ask("is there a circle?", [make_noise_image(1), make_noise_image(2)])
    assert said != local.ask("is there a circle?", [make_noise_image(3)])
    assert mllm in local.identity
    with pytest.raises(ValueError, match=r"judge\.mllm=absent: no such folder"):
        QwenJudge("absent")
    with pytest.raises(ValueError, match="dtype must be one of"):
        QwenJudge(mllm, dtype="int4")


def test_a_local_model_tells_how_likely_its_reply_begins_so(in_world: Path) -> None:
    """As GenEval 2's script computes it: from the scores of the first token that the library generates."""
    mllm = str(in_world / "backbones" / "mllm")
    local = QwenJudge(mllm, device="cpu", dtype="float32", image_pixels=576, max_new_tokens=1)
    image, question = make_noise_image(1), "is there a circle?"
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(mllm, dtype=torch.float32).eval()
    inputs = dict(local.prompt([question], [[image]], system=ANSWER_SYSTEM, ending="", padding_side="left"))
    kinds = (inputs["input_ids"] == model.config.image_token_id).int()
    options = {"max_new_tokens": 1, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    output = model.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], pixel_values=inputs["pixel_values"],
        image_grid_thw=inputs["image_grid_thw"], mm_token_type_ids=kinds, **options,
    )  # fmt: skip
    probabilities = output.scores[0][0].softmax(-1)
    for answers in (["yes"], ["red", "blue"], ["yes", "yes"]):
        first = [local.prompt.tokenizer(answer, add_special_tokens=False)["input_ids"][0] for answer in answers]
        expected = float(sum(probabilities[i] for i in first))
        assert local.compute_probability(question, [image], answers) == pytest.approx(expected, rel=1e-4)
    facts = local.describe_facts()
    assert (facts.name, facts.weights[:7]) == ("mllm", "sha256:")
    assert local.in_manner(Manner(system="be strict")).identity != local.identity
    # What the user has set holds against a benchmark's manner.
    assert local.in_manner(Manner(max_tokens=9)).describe_facts().settings.endswith("at most 1 tokens")
    local.max_new_tokens = None
    assert local.in_manner(Manner(max_tokens=9)).describe_facts().settings.endswith("at most 9 tokens")
    assert local.in_manner(Manner()).describe_facts().settings.endswith("at most 512 tokens")
