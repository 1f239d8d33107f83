"""Loading a Qwen2.5-VL up to the deepest tap, or the whole of it, in a chosen type or quantisation."""

import copy
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import BitsAndBytesConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLModel

from tbac.files import ForeignFileError, reading
from tbac.models.architecture import check_mllm_kind, make_mllm_config
from tbac.models.checks import DTYPE_NAMES, check_precision
from tbac.models.mllm import FrozenMLLM, check_mllm
from tbac.models.sources import MLLM_FILES, locate_folder, read_config
from tbac.models.weights import WeightFiles, check_finite, strip_mllm_prefix

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_NAMES}


def load_mllm(
    folder: Path,
    config: Qwen2_5_VLConfig,
    depth: int,
    dtype: torch.dtype,
    quantization: str | None = None,
    prompt_embeddings: Tensor | None = None,
) -> FrozenMLLM:
    """Load an MLLM's word embeddings, vision tower and first `depth` layers; the rest is read when it has to answer.

    Args:
        folder: folder with config and weights.
        config: config of the whole model; it isn't changed.
        depth: the deepest tap.
        dtype: type of the weights.
        quantization: quantisation of the decoder layers: `nf4`, `int8`, or None.
        prompt_embeddings: word embeddings for prompts, instead of the model's own.

    Raises:
        ValueError: when tensors are missing or have another shape, by name.
    """
    text = config.text_config
    options = _mllm_options(dtype, quantization)

    # A config with fewer layers makes the library leave the others on disk.
    truncated = copy.deepcopy(config)
    truncated.text_config.num_hidden_layers = depth
    if getattr(text, "layer_types", None):
        truncated.text_config.layer_types = text.layer_types[:depth]
    check_shapes(folder, truncated, text.num_hidden_layers)
    with _no_report(), reading(str(folder)):
        model, loaded = Qwen2_5_VLModel.from_pretrained(folder, config=truncated, output_loading_info=True, **options)
    # The library fills what is missing with random numbers and only warns.
    wrong = sorted(loaded["missing_keys"]) + sorted(str(mismatch[0]) for mismatch in loaded["mismatched_keys"])
    if wrong:
        raise ValueError(f"{folder}: the MLLM's weights don't fit its config, such as {wrong[0]}")
    table = None if prompt_embeddings is None else prompt_embeddings.to(dtype)
    return FrozenMLLM(_keep_layout(model), FullModelReader(folder, config, options), text.num_hidden_layers, table)


@dataclass(frozen=True)
class FullModelReader:
    """Reads the whole MLLM of a folder when it is called; unlike a function within another it can be pickled.

    Attributes:
        folder: folder with the weights.
        config: config of the whole model.
        options: further arguments of the library's `from_pretrained`.
    """

    folder: Path
    config: Qwen2_5_VLConfig
    options: dict[str, Any]

    def __call__(self) -> Qwen2_5_VLForConditionalGeneration:
        """Read the model.

        Raises:
            ForeignFileError: when it can't be read, or holds numbers that aren't finite.
        """
        check_shapes(self.folder, self.config, self.config.text_config.num_hidden_layers)
        config = copy.deepcopy(self.config)
        with _no_report(), reading(str(self.folder)):
            model = Qwen2_5_VLForConditionalGeneration.from_pretrained(self.folder, config=config, **self.options)
        for name, parameter in model.named_parameters():
            check_finite(name, parameter.detach(), str(self.folder))
        return _keep_layout(model)


def open_mllm(option: str, source: str, dtype: str, quantization: str | None = None) -> tuple[Path, FrozenMLLM]:
    """Load a whole MLLM that only answers; returns its folder and the model.

    Args:
        option: name of the user's option that gives `source`, for messages.
        source: folder or hub id.
        dtype: type of the weights.
        quantization: quantisation of the decoder layers: `nf4`, `int8`, or None.

    Raises:
        ValueError: for anything that doesn't fit or isn't there.
    """
    check_precision("", dtype, quantization)
    config = read_config(option, source, "config.json")
    check_mllm_kind(config, f"{option}={source}")
    made = make_mllm_config(config, f"{option}={source}: config.json")
    check_mllm(made)
    folder = locate_folder(option, source, MLLM_FILES)
    return folder, FrozenMLLM(FullModelReader(folder, made, _mllm_options(DTYPES[dtype], quantization))())


def check_shapes(folder: Path, config: Qwen2_5_VLConfig, num_layers: int) -> None:
    """Check that a folder's weights have the shapes that a config gives the body of an MLLM.

    This comes before any memory is taken: the library would fill what is missing with random numbers, and leave out
    layers that the config doesn't count.

    Args:
        folder: folder with the weights.
        config: of the body, perhaps with fewer layers than the whole model has.
        num_layers: decoder layers of the whole model.

    Raises:
        ForeignFileError: naming a tensor that is missing, of another shape, or unexpected.
    """
    found = {strip_mllm_prefix(name): shape for name, shape in WeightFiles(folder).read_shapes().items()}
    with reading(str(folder)), init_empty_weights(include_buffers=True):
        expected = Qwen2_5_VLModel(config).state_dict()
    for name, tensor in expected.items():
        if found.get(strip_mllm_prefix(name)) != tuple(tensor.shape):
            raise ForeignFileError(f"{folder}: the MLLM's weights don't fit its config, such as {name}")
    known = {strip_mllm_prefix(name) for name in expected}
    for name in found:
        layer = re.match(r"layers\.(\d+)\.", name)
        if (name.startswith("visual.") and name not in known) or (layer and int(layer[1]) >= num_layers):
            raise ForeignFileError(f"{folder}: the MLLM's config doesn't count all of its weights, such as {name}")


def _keep_layout(model: Any) -> Any:
    """Keep bitsandbytes from repacking 4-bit weights on a CPU in a pass without gradient.

    The packed layout has no backward pass, so the query pass would undo it in every step, and it doesn't take widths
    that aren't multiples of its block size.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


@contextmanager
def _no_report() -> Iterator[None]:
    """Silence the library's report of unused tensors, such as those of the layers that aren't loaded."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _mllm_options(dtype: torch.dtype, quantization: str | None) -> dict[str, Any]:
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "sdpa", "use_safetensors": True}
    if quantization == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=["visual", "lm_head"],
        )
    elif quantization == "int8":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_skip_modules=["visual", "lm_head"]
        )
    return options
