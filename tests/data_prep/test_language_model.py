"""Tokenizer and pre-training conversations of the shapes MLLM."""

import re
from collections import Counter
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer, Qwen2VLImageProcessorPil

from data_prep.shapes.conversations import Conversation, Conversations, choose_window
from data_prep.shapes.pretrain_mllm import Recipe, compute_states, make_config, pretrain_mllm
from data_prep.shapes.scene import BACKGROUNDS, CELLS, COLORS, COLUMN_NAMES, GLYPHS, ROW_NAMES, sample_scene
from data_prep.shapes.tokenizer import SPECIAL_TOKENS
from tbac.app import to_plain
from tests.helpers.captions import parse_objects
from tests.helpers.configs import compose_config

PLACES = [f"{row} {column}" for row in ROW_NAMES for column in COLUMN_NAMES]


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
    architecture = to_plain(compose_config("train", "run_dir=.").model)["architecture"]["mllm"]
    model = Qwen2_5_VLForConditionalGeneration._from_config(make_config(architecture, tokenizer)).eval()
    features = torch.randn(4, CELLS * CELLS, architecture["text_config"]["hidden_size"])
    together = Conversations(tokenizer, scenes, rng).draw(kind, CELLS)
    hidden, _ = compute_states(model, [together], features, tokenizer.pad_token_id)
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
        own, _ = compute_states(model, [alone], features, tokenizer.pad_token_id)
        torch.testing.assert_close(own[0], hidden[0, kept], rtol=1e-4, atol=1e-4)


def test_an_imagined_picture_is_the_one_that_is_told(tokenizer: Qwen2Tokenizer) -> None:
    rng = Random(0)
    conversations = Conversations(tokenizer, [sample_scene(rng) for _ in range(4)], rng)
    shapes = {conversations.word[shape]: shape for shape in GLYPHS}
    colors = {conversations.word[color]: color for color in COLORS}
    for _ in range(100):
        imagined = conversations.draw("imagine", CELLS, seen=False)
        assert len(imagined.imagined) == len(imagined.rows) == CELLS * CELLS
        told = tokenizer.decode(imagined.tokens).split("user\n")[1].split("<|im_end|>")[0]
        found = Counter((colors.get(c), shapes[s]) for c, s in imagined.imagined if s in shapes)
        assert found == parse_objects(told), told
        if " at the " in told:  # the places are told too
            for place, (color, shape) in zip(PLACES, imagined.imagined, strict=True):
                assert (f"{colors.get(color)} {shapes.get(shape)} at the {place}" in told) == (shape in shapes)


def test_an_imagined_edit_is_its_target(tokenizer: Qwen2Tokenizer) -> None:
    rng = Random(0)
    scenes = [sample_scene(rng) for _ in range(4)]
    conversations = Conversations(tokenizer, scenes, rng)
    names = {conversations.word[name]: name for name in (*GLYPHS, *COLORS, *BACKGROUNDS)}
    for _ in range(100):
        drawn = conversations.draw("imagine", CELLS)
        said = {i: (names[c], names[s]) for i, (c, s) in enumerate(drawn.imagined) if c != s}
        source = {i.row * CELLS + i.column: (i.color, i.shape) for i in scenes[drawn.picture].items}
        changed = {cell for cell in {*said, *source} if said.get(cell) != source.get(cell)}
        instruction = tokenizer.decode(drawn.tokens)
        moved = re.search(r"\bmove\b", instruction) is not None
        assert len(changed) == (0 if "background" in instruction else 2 if moved else 1)


def test_windows_show_what_is_inside_them() -> None:
    rng = Random(0)
    for side in (1, 2, CELLS):
        for _ in range(50):
            scene = sample_scene(rng)
            part, cells, shown = choose_window(rng, scene, side)
            assert shown == side
            assert len(cells) == side * side
            assert part.items
            assert {i.row * CELLS + i.column for i in part.items} == {
                cell for i in scene.items if (cell := i.row * CELLS + i.column) in cells
            }


def test_pretraining_is_deterministic_and_learns(world_folder: Path, tokenizer: Qwen2Tokenizer) -> None:
    architecture = to_plain(compose_config("train", "run_dir=.").model)["architecture"]["mllm"]
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
