"""A Llama in Qwen2.5-VL's class computes what transformers' own Llama does, through our prompt and query passes too."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from data_prep.language_model import NOT_INSTALLED, LanguageModel, convert_llama, find_package, load_smollm2
from tbac.app import to_plain
from tbac.models.answering import AnswerOptions
from tbac.models.mllm import FrozenMLLM
from tests.helpers.configs import compose_config

PLANNED = to_plain(compose_config("train", "run_dir=.", "world=words").model.architecture.mllm)
VISION = PLANNED["vision_config"]
QUESTIONS = ["What is the capital of France?", "Name a fruit that is yellow, long and curved, in one word."]
PROMPTS = ["a disc", "beneath a golden box sits a letter that isn't crimson but the color of grass", "2 coins"]


def make_small_llama(world: Path) -> LanguageModel:
    tokenizer = AutoTokenizer.from_pretrained(world / "tokenizer")
    sizes = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 5}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": True}
    rotary = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **heads, **rotary))
    for parameter in llama.parameters():  # the library's start is so small that wrong layers would hardly show
        torch.nn.init.normal_(parameter, std=0.2)
    return LanguageModel(llama.eval(), tokenizer)


SMOLLM2 = pytest.param(
    "smollm2", marks=[pytest.mark.slow, pytest.mark.skipif(find_package() is None, reason=NOT_INSTALLED)]
)


@pytest.fixture(scope="module", params=["small", SMOLLM2])
def language(request: pytest.FixtureRequest, world_folder: Path) -> LanguageModel:
    return make_small_llama(world_folder) if request.param == "small" else load_smollm2()


def assert_near(found: Tensor, expected: Tensor) -> None:
    """Each token's state is within 1e-5 of its length; a few states are a thousand times longer than the others."""
    error = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.max() <= 1e-5


def compute_alone(llama: LlamaForCausalLM, embeddings: Tensor) -> Tensor:
    """All hidden states (layer, token, hidden) of one sequence without padding, as transformers computes them."""
    states = llama.model(inputs_embeds=embeddings[None], output_hidden_states=True).hidden_states
    return torch.stack(states)[:, 0]


@torch.no_grad()
def test_every_tap_of_prompts_and_queries_is_that_of_the_llama(language: LanguageModel) -> None:
    llama = language.model
    model, tokenizer = convert_llama(language, VISION, seed=0)
    mllm, depth = FrozenMLLM(model), llama.config.num_hidden_layers
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    padded = tokenizer.pad({"input_ids": prompts}, padding_side="right", return_tensors="pt")
    table = llama.get_input_embeddings().weight
    queries = table[tokenizer("a red circle left of it")["input_ids"]] + 0.1 * torch.randn(1, table.shape[1])
    layers = range(depth + 1)
    prefix = mllm.read_prefix(dict(padded), depth, layers)
    taps = mllm.read_queries(queries, prefix, layers)
    assert prefix.states is not None
    for row, ids in enumerate(prompts):
        expected = compute_alone(llama, torch.cat([table[ids], queries]))
        for layer in layers:
            assert_near(prefix.states[layer, row, : len(ids)], expected[layer, : len(ids)])
            assert_near(taps[layer, row], expected[layer, len(ids) :])


@torch.no_grad()
def test_it_answers_as_the_llama_does(language: LanguageModel, request: pytest.FixtureRequest) -> None:
    llama = language.model
    model, tokenizer = convert_llama(language, VISION, seed=0)
    ask: Callable[[str], dict] = lambda question: dict(  # noqa: E731
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    )
    words = len(tokenizer) - 11 if "smollm2" in request.node.name else len(tokenizer)
    for question in QUESTIONS:
        inputs = ask(question)
        options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": tokenizer.eos_token_id}
        expected = llama.generate(**inputs, **options, pad_token_id=tokenizer.pad_token_id)
        found = FrozenMLLM(model).generate(inputs, AnswerOptions(12))
        assert found.max() < words  # never one of the tokens that were appended for pictures
        assert found.tolist() == expected[:, inputs["input_ids"].shape[1] :].tolist()
        if "smollm2" in request.node.name and "France" in question:
            assert "Paris" in tokenizer.decode(found[0])


@pytest.mark.parametrize("language", [SMOLLM2], indirect=True)
def test_the_converted_language_model_is_the_one_that_is_planned_with(language: LanguageModel) -> None:
    """The sizes in conf/model/words.yaml are SmolLM2's."""
    model, _ = convert_llama(language, VISION, seed=0)
    text = model.config.text_config.to_dict()
    assert {name: text[name] for name in PLANNED["text_config"]} == PLANNED["text_config"]


def test_other_layers_than_qwen_s_are_refused(world_folder: Path) -> None:
    language = make_small_llama(world_folder)
    language.model.config.attention_bias = True
    with pytest.raises(ValueError, match="neither biases nor scaled rotary positions"):
        convert_llama(language, VISION, seed=0)
