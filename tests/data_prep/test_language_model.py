"""Tokenizer and pre-training conversations of the shapes MLLM."""

from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoTokenizer, Qwen2Tokenizer

from data_prep.shapes.pretrain_mllm import (
    Conversation,
    Conversations,
    Recipe,
    conversation_states,
    make_config,
    pretrain_mllm,
    visible_part,
)
from data_prep.shapes.scene import sample_scene
from data_prep.shapes.tokenizer import SPECIAL_TOKENS
from tests.conftest import composed, plain
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil


@pytest.fixture
def tokenizer(world_folder: Path) -> Qwen2Tokenizer:
    return AutoTokenizer.from_pretrained(world_folder / "backbones" / "mllm")


def test_the_tokenizer_has_qwens_special_tokens_and_template(tokenizer: Qwen2Tokenizer) -> None:
    assert type(tokenizer).__name__.startswith("Qwen2Tokenizer")
    for token in SPECIAL_TOKENS:
        assert tokenizer(token)["input_ids"] == [tokenizer.convert_tokens_to_ids(token)]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what color is the circle?"}]},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>what color is the circle?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert tokenizer.eos_token == "<|im_end|>"


@pytest.mark.parametrize("text", ["a photo of a red circle", "", "Ünïcödé 12 日本 \t\n", "three letters L, above!"])
def test_any_text_survives_the_tokenizer(tokenizer: Qwen2Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("kind", ["name", "answer", "describe", "text"])
def test_branches_of_one_picture_equal_separate_conversations(tokenizer: Qwen2Tokenizer, kind: str) -> None:
    rng = Random(0)
    scenes = [sample_scene(rng) for _ in range(4)]
    architecture = plain(composed("train", "run_dir=.").model)["architecture"]["mllm"]
    model = Qwen2_5_VLForConditionalGeneration._from_config(make_config(architecture, tokenizer)).eval()
    features = torch.randn(4, 16, architecture["text_config"]["hidden_size"])
    together = Conversations(tokenizer, scenes, rng).draw(kind, 4)
    hidden, _ = conversation_states(model, [together], features, tokenizer.pad_token_id)
    assert max(together.branches) >= 1
    for branch in range(1, max(together.branches) + 1):
        kept = [i for i, b in enumerate(together.branches) if b in (0, branch)]
        alone = Conversation(
            [together.tokens[i] for i in kept],
            [together.labels[i] for i in kept],
            [0] * len(kept),  # a plain causal sequence
            [[axis[i] for i in kept] for axis in together.positions],
            together.picture,
            together.cells,
        )
        own, _ = conversation_states(model, [alone], features, tokenizer.pad_token_id)
        torch.testing.assert_close(own[0], hidden[0, kept], rtol=1e-4, atol=1e-4)


def test_windows_show_what_is_inside_them() -> None:
    rng = Random(0)
    for side in (1, 2, 4):
        for _ in range(50):
            scene = sample_scene(rng)
            part, cells, shown = visible_part(rng, scene, side)
            assert shown == side
            assert len(cells) == side * side
            assert part.items
            assert {i.row * 4 + i.column for i in part.items} == {
                i.row * 4 + i.column for i in scene.items if i.row * 4 + i.column in cells
            }


def test_pretraining_is_deterministic_and_learns(world_folder: Path, tokenizer: Qwen2Tokenizer) -> None:
    architecture = plain(composed("train", "run_dir=.").model)["architecture"]["mllm"]
    processor = Qwen2VLImageProcessorPil.from_pretrained(world_folder / "backbones" / "mllm")
    recipe = Recipe(vision_steps=3, steps=40, pictures=32)

    def run() -> tuple[dict, list[float]]:
        losses = []
        model = pretrain_mllm(
            architecture, tokenizer, processor, recipe, 0, report=lambda *facts: losses.append(facts[-1])
        )
        return model.state_dict(), losses

    (first, losses), (second, again) = run(), run()
    assert losses == again
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
