"""The one builder of a model's parts: from base models, from bare configs, or from what training has saved.

Everything that can be wrong is checked on configs, which are small, before any weight is read.
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
from tbac.models.mllm import FrozenMLLM
from tbac.models.prompt import PromptProcessor
from tbac.models.qwen import DTYPES, load_mllm
from tbac.models.saved import SavedModel, check_frozen, compute_digests, read_prompt_embeddings
from tbac.models.sources import DENOISER_FILES, MLLM_FILES, locate_folder
from tbac.models.taps import TapPlan


@dataclass(frozen=True)
class Provenance:
    """What a model is made of: what a checkpoint or an exported folder needs to make it again.

    Attributes:
        config: all its options, with the taps resolved.
        digests: of the frozen parts' files (`mllm`, `autoencoder`) and of `prompt_embeddings` where there are any;
            empty with weights that were never read.
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
    """What never trains, and what it is known by."""

    mllm: FrozenMLLM
    autoencoder: FrozenAutoencoder
    prompt: PromptProcessor | None
    digests: dict[str, str]


def build_parts(config: ModelConfig, saved: SavedModel | None = None) -> Parts:
    """Build what a config describes.

    Args:
        config: all options.
        saved: what training has made of the model. Its ladder and denoiser then take no memory yet: whoever calls this
            loads `saved.state` into them. Without it they start from the base model, or from noise with `random_init`.

    Raises:
        ValueError: for anything that doesn't fit, before a weight is read.
    """
    parts, plan = check_config(config, opened=saved is not None)
    with torch.random.fork_rng(devices=[]):
        # The ladder comes first, so that the seed alone decides its weights.
        torch.manual_seed(config.seed)
        with init_empty_weights(include_buffers=False) if saved else nullcontext():
            ladder = Ladder(plan, config.num_queries, parts.hidden_size, parts.caption_channels, config.ladder)
        frozen = build_random_frozen(config, parts) if config.random_init else load_frozen(config, parts, plan, saved)
        with init_empty_weights(include_buffers=False) if saved else nullcontext():
            from_base = saved is None and not config.random_init
            transformer = (
                load_transformer(locate_folder("model.denoiser", config.denoiser, DENOISER_FILES))
                if from_base
                else SanaTransformer2DModel(**parts.transformer)
            )
            denoiser = LadderDenoiser(transformer, config.reference_latents)
    if from_base and config.query_phrases is not None:
        assert frozen.prompt is not None
        start_queries(ladder, config.query_phrases, frozen.prompt, frozen.mllm.get_prompt_table())
    provenance = Provenance(resolve_config(config, parts, plan, transformer), frozen.digests)
    return Parts(frozen.mllm, ladder, denoiser, frozen.autoencoder, frozen.prompt, provenance)


def resolve_config(
    config: ModelConfig, parts: Architecture, plan: TapPlan, transformer: SanaTransformer2DModel
) -> ModelConfig:
    """The config as a file keeps it: the taps resolved, and what can't be read from the frozen parts alone."""
    if config.random_init:
        return replace(config, taps=plan)
    own = {k: v for k, v in transformer.config.items() if not k.startswith("_")}
    return replace(config, taps=plan, architecture=ArchitectureConfig(transformer=own, scheduler=parts.scheduler))


def load_frozen(config: ModelConfig, parts: Architecture, plan: TapPlan, saved: SavedModel | None) -> FrozenParts:
    """The MLLM up to the deepest tap, the autoencoder, and tokenizer and image processor.

    Raises:
        ValueError: when they can't be read, or aren't those that a saved model was trained on.
    """
    prefix = "" if saved else "model."
    mllm_folder = locate_folder(f"{prefix}mllm", config.mllm, MLLM_FILES)
    denoiser_folder = locate_folder(f"{prefix}denoiser", config.denoiser, DENOISER_FILES)
    table = saved.prompt_embeddings if saved else None
    if table is None:
        table = read_prompt_embeddings(config.prompt_embeddings)
    # The digests are compared first, since reading the weights takes much longer.
    digests = compute_digests(mllm_folder, denoiser_folder, plan.deepest, table)
    if saved is not None and saved.frozen_digests is not None:
        check_frozen(saved.frozen_digests, digests, saved.origin)
    dtype = DTYPES[config.dtype]
    autoencoder = FrozenAutoencoder.from_folder(denoiser_folder / "vae", dtype)
    prompt = load_prompt_processor(mllm_folder, config, compute_reference_size(parts, autoencoder))
    mllm = load_mllm(mllm_folder, parts.mllm, plan.deepest, dtype, config.quantization, table)
    return FrozenParts(mllm, autoencoder, prompt, digests)


def load_prompt_processor(folder: Path, config: ModelConfig, picture_size: tuple[int, int]) -> PromptProcessor:
    """Tokenizer and image processor of an MLLM's folder, with a model's options."""
    return PromptProcessor.from_pretrained(
        folder,
        image_pixels=config.image_pixels,
        max_text_tokens=config.max_text_tokens,
        system_prompt=config.system_prompt,
        spell_words=config.spell_words,
        reference_size=picture_size if config.reference_latents else None,
    )


def compute_reference_size(parts: Architecture, autoencoder: FrozenAutoencoder) -> tuple[int, int]:
    """Height and width in pixels of the pictures that a denoiser makes by default."""
    side = parts.transformer["sample_size"] * autoencoder.compression
    return side, side


def build_random_frozen(config: ModelConfig, parts: Architecture) -> FrozenParts:
    """The frozen parts with fresh weights in the config's type, on the default device; no tokenizer."""
    dtype, usual = DTYPES[config.dtype], torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        autoencoder = AutoencoderDC(**parts.autoencoder)
    finally:
        torch.set_default_dtype(usual)
    mllm = AutoModelForImageTextToText.from_config(parts.mllm, dtype=dtype, attn_implementation="sdpa")
    return FrozenParts(FrozenMLLM(mllm), FrozenAutoencoder(autoencoder), None, {})


def start_queries(ladder: Ladder, phrases: Sequence[str], prompt: PromptProcessor, table: Tensor) -> None:
    """Set each query to the sum of its phrase's word embeddings, as the words read within a sentence."""
    sums = [table[prompt.tokenize_text(f" {phrase}")].float().sum(0) for phrase in phrases]
    ladder.queries.data.copy_(torch.stack(sums))
