"""The builder of a model's parts: from base models, at random from configs alone, or from what training has saved.

Configs are small, so everything that can be wrong is checked on them before any weight is read.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderDC, SanaTransformer2DModel
from torch import Tensor
from transformers import AutoModelForImageTextToText

from tbac.models.architecture import Architecture, check_config
from tbac.models.autoencoder import FrozenAutoencoder
from tbac.models.config import ArchitectureConfig, ModelConfig
from tbac.models.denoiser import LadderDenoiser, load_transformer
from tbac.models.ladder import Ladder
from tbac.models.lora import add_adapters, check_targets, has_adapters
from tbac.models.mllm import FrozenMLLM
from tbac.models.prompt import PromptProcessor
from tbac.models.qwen import DTYPES, load_mllm
from tbac.models.saved import SavedModel, check_frozen, compute_digests, read_prompt_embeddings
from tbac.models.sources import DENOISER_FILES, MLLM_FILES, locate_folder
from tbac.models.taps import TapPlan


@dataclass(frozen=True)
class Provenance:
    """What a model is made of: what a checkpoint or an exported folder needs to build it again.

    Attributes:
        config: all its options, with the taps resolved.
        digests: digests of the frozen parts (`mllm`, `autoencoder`), and of `prompt_embeddings` if there are any; empty
            when the weights were made at random.
    """

    config: ModelConfig
    digests: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Parts:
    """The parts of a `UniImage`, by the names of its arguments."""

    mllm: FrozenMLLM
    ladder: Ladder
    denoiser: LadderDenoiser
    autoencoder: FrozenAutoencoder
    prompt: PromptProcessor | None
    provenance: Provenance


@dataclass(frozen=True)
class FrozenParts:
    """The parts that never train, and the digests that they are known by."""

    mllm: FrozenMLLM
    autoencoder: FrozenAutoencoder
    prompt: PromptProcessor | None
    digests: dict[str, str]


def build_parts(config: ModelConfig, saved: SavedModel | None = None) -> Parts:
    """Build the parts that a config describes.

    Args:
        config: all options.
        saved: what training has made of the model. Ladder and denoiser are then left on the meta device, without
            memory, and the caller loads `saved.state` into them. Without it they start from the base model, or from
            noise with `random_init`.

    Raises:
        ValueError: for anything that doesn't fit, before a weight is read.
    """
    from_base = saved is None and not config.random_init
    parts, plan = check_config(config, opened=saved is not None)
    if has_adapters(config):
        with init_empty_weights(include_buffers=True):
            check_targets(config.lora, SanaTransformer2DModel(**parts.transformer))
    with torch.random.fork_rng(devices=[]):
        # The ladder comes first, so that the seed alone decides its weights.
        torch.manual_seed(config.seed)
        with init_empty_weights(include_buffers=False) if saved else nullcontext():
            ladder = Ladder(plan, config.num_queries, parts.hidden_size, parts.caption_channels, config.ladder)
        frozen = build_random_frozen(config, parts) if config.random_init else load_frozen(config, parts, plan, saved)
        with init_empty_weights(include_buffers=False) if saved else nullcontext():
            if from_base:
                transformer = load_transformer(locate_folder("model.denoiser", config.denoiser, DENOISER_FILES))
            else:
                transformer = SanaTransformer2DModel(**parts.transformer)
            if has_adapters(config):
                add_adapters(transformer, config.lora, DTYPES[config.dtype])
            denoiser = LadderDenoiser(transformer, config.reference_latents)
    # Phrases need the tokenizer and the word embeddings of a real MLLM.
    if from_base and config.query_phrases is not None:
        assert frozen.prompt is not None
        start_queries(ladder, config.query_phrases, frozen.prompt, frozen.mllm.get_prompt_table())
    provenance = Provenance(resolve_config(config, parts, plan, transformer), frozen.digests)
    return Parts(frozen.mllm, ladder, denoiser, frozen.autoencoder, frozen.prompt, provenance)


def resolve_config(
    config: ModelConfig, parts: Architecture, plan: TapPlan, transformer: SanaTransformer2DModel
) -> ModelConfig:
    """Complete a config for checkpoints and exports: resolved taps, and the configs of transformer and scheduler."""
    if config.random_init:
        return replace(config, taps=plan)
    arguments = {k: v for k, v in transformer.config.items() if not k.startswith("_")}
    architecture = ArchitectureConfig(transformer=arguments, scheduler=parts.scheduler)
    return replace(config, taps=plan, architecture=architecture)


def load_frozen(config: ModelConfig, parts: Architecture, plan: TapPlan, saved: SavedModel | None) -> FrozenParts:
    """Load the MLLM up to the deepest tap, the autoencoder, the tokenizer and the image processor.

    Raises:
        ValueError: when one can't be read, or isn't the one that a saved model was trained on.
    """
    prefix = "" if saved else "model."
    mllm_folder = locate_folder(f"{prefix}mllm", config.mllm, MLLM_FILES)
    denoiser_folder = locate_folder(f"{prefix}denoiser", config.denoiser, DENOISER_FILES)
    table = saved.prompt_embeddings if saved else None
    if table is None:
        table = read_prompt_embeddings(config.prompt_embeddings, f"{prefix}prompt_embeddings")
    # Digests are compared before the weights are loaded, which takes much longer.
    digests = compute_digests(mllm_folder, denoiser_folder, plan.deepest, table)
    if saved is not None and saved.frozen_digests is not None:
        check_frozen(saved.frozen_digests, digests, saved.origin)
    dtype = DTYPES[config.dtype]
    autoencoder = FrozenAutoencoder.from_folder(denoiser_folder / "vae", dtype)
    prompt = load_prompt_processor(mllm_folder, config, compute_reference_size(parts, autoencoder))
    mllm = load_mllm(mllm_folder, parts.mllm, plan.deepest, dtype, config.quantization, table)
    return FrozenParts(mllm, autoencoder, prompt, digests)


def load_prompt_processor(folder: Path, config: ModelConfig, picture_size: tuple[int, int]) -> PromptProcessor:
    """Load tokenizer and image processor from an MLLM's folder."""
    return PromptProcessor.from_pretrained(
        folder,
        image_pixels=config.image_pixels,
        max_text_tokens=config.max_text_tokens,
        system_prompt=config.system_prompt,
        spell_words=config.spell_words,
        reference_size=picture_size if config.reference_latents else None,
    )


def compute_reference_size(parts: Architecture, autoencoder: FrozenAutoencoder) -> tuple[int, int]:
    """Compute height and width in pixels of the pictures that a denoiser makes by default."""
    side = parts.transformer["sample_size"] * autoencoder.compression
    return side, side


def build_random_frozen(config: ModelConfig, parts: Architecture) -> FrozenParts:
    """Build the frozen parts with random weights, without a tokenizer."""
    dtype, usual = DTYPES[config.dtype], torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # AutoencoderDC takes no type
    try:
        autoencoder = AutoencoderDC(**parts.autoencoder)
    finally:
        torch.set_default_dtype(usual)
    mllm = AutoModelForImageTextToText.from_config(parts.mllm, dtype=dtype, attn_implementation="sdpa")
    return FrozenParts(FrozenMLLM(mllm), FrozenAutoencoder(autoencoder), None, {})


def start_queries(ladder: Ladder, phrases: Sequence[str], prompt: PromptProcessor, table: Tensor) -> None:
    """Set each query to the sum of the word embeddings of its phrase."""
    # With a space before it, a phrase gets the tokens that it has within a sentence.
    sums = [table[prompt.tokenize_text(f" {phrase}")].float().sum(0) for phrase in phrases]
    ladder.queries.data.copy_(torch.stack(sums))
