"""Building a UniImage from hub ids, local folders or bare configs.

Everything that can be wrong is checked on configs, which are small, before any weight is read.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderDC, SanaTransformer2DModel
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tbac.models.architecture import Architecture, check_model, configs_of
from tbac.models.autoencoder import FrozenAutoencoder
from tbac.models.denoiser import LadderDenoiser, load_transformer
from tbac.models.export import (
    FORMAT,
    PROMPT_EMBEDDINGS,
    Provenance,
    compute_digests,
    read_prompt_embeddings,
    read_state,
)
from tbac.models.ladder import Ladder
from tbac.models.mllm import FrozenMLLM
from tbac.models.prompt import SYSTEM_PROMPT, PromptProcessor
from tbac.models.qwen import DTYPES, check_precision, load_mllm
from tbac.models.sources import DENOISER_FILES, MLLM_FILES, local_folder, read_config
from tbac.models.taps import TapPlan, TapRule
from tbac.models.uniimage import UniImage


def load_model(
    mllm: str,
    denoiser: str,
    taps: TapRule,
    ladder: Mapping[str, Any],
    num_queries: int,
    image_pixels: int,
    query_phrases: Sequence[str] | None = None,
    max_text_tokens: int = 256,
    system_prompt: str = SYSTEM_PROMPT,
    dtype: str = "float32",
    quantization: str | None = None,
    prompt_embeddings: str | None = None,
    reference_latents: bool = False,
    spell_words: bool = False,
    denoiser_checkpointing: bool = False,
    query_checkpointing: bool = False,
    compile: bool = False,
    random_init: bool = False,
    architecture: Mapping[str, Any] | None = None,
    seed: int = 42,
) -> UniImage:
    """Build the model that a `conf/model/*.yaml` describes.

    Args:
        mllm: hub id or folder of a Qwen2.5-VL with tokenizer and image processor.
        denoiser: hub id or folder with SANA's `transformer/`, `vae/` and `scheduler/`.
        taps: rule that chooses the tapped layers.
        ladder: options of `Ladder` besides plan and sizes.
        num_queries: number of learnable queries.
        image_pixels: area of each input image.
        query_phrases: words that the queries start from, one phrase each (prompt tuning's initialisation from text,
            Lester et al. 2021, arXiv 2104.08691); None starts from noise, as released. Ignored with `random_init`.
        max_text_tokens: longest prompt text.
        system_prompt: system message of generation prompts.
        dtype: type of the frozen parts' weights; trained parts stay in float32.
        quantization: of the MLLM's decoder layers by bitsandbytes: `nf4`, `int8`, or None.
        prompt_embeddings: exported folder whose table of word embeddings prompts are read with; None = the MLLM's own.
        reference_latents: the denoiser also reads the latents of each prompt's first input image.
        spell_words: after words in double quotes the prompt has their letters one by one.
        denoiser_checkpointing: run the denoiser's blocks again in the backward pass instead of keeping activations.
        query_checkpointing: the same for the MLLM's layers in the query pass.
        compile: compile the denoiser's blocks and, unless it is quantised, the query pass with `torch.compile`.
        random_init: make weights from `architecture` instead of reading any.
        architecture: `{mllm, transformer, autoencoder, scheduler}` configs; needed with `random_init`.
        seed: of the ladder's first weights, and of all weights with `random_init`.

    Raises:
        ValueError: for anything that doesn't fit, before a weight is read.
    """
    parts, plan = check_config(
        mllm, denoiser, taps, ladder, num_queries, query_phrases, dtype, random_init, architecture, quantization
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if random_init:
            model = assemble_random(parts, plan, ladder, num_queries, DTYPES[dtype], reference_latents)
            model.set_checkpointing(denoiser_checkpointing, query_checkpointing)
            return model
        built = Ladder(plan, num_queries, parts.hidden_size, parts.transformer["caption_channels"], **ladder)
    mllm_folder = local_folder("model.mllm", mllm, MLLM_FILES)
    denoiser_folder = local_folder("model.denoiser", denoiser, DENOISER_FILES)
    autoencoder = FrozenAutoencoder.from_folder(denoiser_folder / "vae", DTYPES[dtype])
    transformer = load_transformer(denoiser_folder)
    prompt = PromptProcessor.from_pretrained(
        mllm_folder,
        image_pixels=image_pixels,
        max_text_tokens=max_text_tokens,
        system_prompt=system_prompt,
        spell_words=spell_words,
        reference_size=reference_size(transformer, autoencoder) if reference_latents else None,
    )
    table = read_prompt_embeddings(prompt_embeddings)
    language = load_mllm(mllm_folder, parts.mllm, plan.deepest, DTYPES[dtype], quantization, table)
    if query_phrases is not None:
        start_queries(built, query_phrases, prompt, language.prompt_table())
    model = UniImage(
        language,
        built,
        LadderDenoiser(transformer, reference_latents),
        autoencoder,
        prompt,
        Provenance(
            mllm,
            denoiser,
            dict(ladder),
            parts.scheduler,
            compute_digests(mllm_folder, denoiser_folder, plan.deepest, table),
        ),
    )
    model.set_checkpointing(denoiser_checkpointing, query_checkpointing)
    if compile:
        model.compile_parts(queries=quantization is None)
    return model


def check_config(
    mllm: str,
    denoiser: str,
    taps: TapRule,
    ladder: Mapping[str, Any],
    num_queries: int,
    query_phrases: Sequence[str] | None = None,
    dtype: str = "float32",
    random_init: bool = False,
    architecture: Mapping[str, Any] | None = None,
    quantization: str | None = None,
    **_: Any,
) -> tuple[Architecture, TapPlan]:
    """What `load_model` checks before it reads a weight; arguments as there.

    Returns:
        The configs of all parts, and which layer feeds which block.

    Raises:
        ValueError: for anything that doesn't fit or isn't there.
    """
    check_precision("model.", dtype, quantization)
    parts = configs_of(mllm, denoiser, random_init, architecture)
    plan = check_model(parts, taps, ladder, num_queries)
    if query_phrases is not None and len(query_phrases) != num_queries:
        raise ValueError(
            f"model.query_phrases has {len(query_phrases)} phrases for model.num_queries={num_queries}; give one "
            "phrase per query, or model.query_phrases=null"
        )
    if empty := [p for p in query_phrases or () if not p.strip()]:
        raise ValueError(f"every phrase of model.query_phrases needs a word, got {empty[0]!r}")
    return parts, plan


def start_queries(ladder: Ladder, phrases: Sequence[str], prompt: PromptProcessor, table: Tensor) -> None:
    """Set each query to the sum of its phrase's word embeddings, as the words read within a sentence."""
    sums = [table[prompt.text_ids(f" {phrase}")].float().sum(0) for phrase in phrases]
    ladder.queries.data.copy_(torch.stack(sums))


def reference_size(transformer: SanaTransformer2DModel, autoencoder: FrozenAutoencoder) -> tuple[int, int]:
    """Height and width in pixels of the pictures that a denoiser makes by default."""
    side = transformer.config.sample_size * autoencoder.compression
    return side, side


def assemble_random(
    parts: Architecture,
    plan: TapPlan,
    ladder: Mapping[str, Any],
    num_queries: int,
    dtype: torch.dtype = torch.float32,
    reference_latents: bool = False,
) -> UniImage:
    """All parts with fresh weights, on the default device, the frozen ones in `dtype`; no tokenizer."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        autoencoder = AutoencoderDC(**parts.autoencoder)
    finally:
        torch.set_default_dtype(usual)
    return UniImage(
        FrozenMLLM(
            Qwen2_5_VLForConditionalGeneration._from_config(parts.mllm, dtype=dtype, attn_implementation="sdpa")
        ),
        Ladder(plan, num_queries, parts.hidden_size, parts.transformer["caption_channels"], **ladder),
        LadderDenoiser(SanaTransformer2DModel(**parts.transformer), reference_latents),
        FrozenAutoencoder(autoencoder),
        None,
        Provenance(ladder=dict(ladder), scheduler=parts.scheduler),
    )


def load_export(
    cls: type[UniImage],
    folder: Path,
    mllm: str | None,
    denoiser: str | None,
    dtype: torch.dtype | str,
    quantization: str | None,
) -> UniImage:
    """What `UniImage.from_pretrained` does."""
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} is not an exported model: it has no config.json")
    config = json.loads(file.read_text())
    if config.get("format") != FORMAT:
        raise ValueError(f"{file}: format must be {FORMAT!r}, got {config.get('format')!r}")
    weights = DTYPES[dtype] if isinstance(dtype, str) else dtype

    def source(given: str | None, named: str) -> str:
        return given or (str(folder / named) if (folder / named).is_dir() else named)

    mllm, denoiser = source(mllm, config["mllm"]["source"]), source(denoiser, config["denoiser"]["source"])
    mllm_config = Qwen2_5_VLConfig(**read_config("mllm", mllm, "config.json"))
    read_config("denoiser", denoiser, "vae/config.json")
    mllm_folder = local_folder("mllm", mllm, MLLM_FILES)
    denoiser_folder = local_folder("denoiser", denoiser, DENOISER_FILES)
    taps = config["taps"]
    plan = TapPlan(tuple(taps["layers"]), tuple(taps["assignment"]), taps["mixed"], taps["num_blocks"])
    state = read_state(folder)
    table = state.pop(PROMPT_EMBEDDINGS, None)
    digests = compute_digests(mllm_folder, denoiser_folder, plan.deepest, table)
    for part, digest in digests.items():
        if part in config["frozen_digests"] and digest != config["frozen_digests"][part]:
            raise ValueError(
                f"{folder} was trained on another {part}: its digest is not that of "
                f"{mllm if part == 'mllm' else denoiser}"
            )
    referring = config["denoiser"].get("references", False)
    with init_empty_weights(include_buffers=False):
        denoiser_model = LadderDenoiser(SanaTransformer2DModel.from_config(config["denoiser"]["config"]), referring)
        transformer = denoiser_model.transformer
        ladder = Ladder(
            plan,
            config["num_queries"],
            mllm_config.text_config.hidden_size,
            transformer.config.caption_channels,
            **config["ladder"],
        )
    autoencoder = FrozenAutoencoder.from_folder(denoiser_folder / "vae", weights)
    model = cls(
        load_mllm(mllm_folder, mllm_config, plan.deepest, weights, quantization, table),
        ladder,
        denoiser_model,
        autoencoder,
        PromptProcessor.from_pretrained(
            mllm_folder,
            **{k: config[k] for k in ("image_pixels", "max_text_tokens", "system_prompt")},
            spell_words=config.get("spell_words", False),
            reference_size=reference_size(transformer, autoencoder) if referring else None,
        ),
        Provenance(mllm, denoiser, config["ladder"], config["scheduler"], digests),
    )
    model.load_trained_state(
        {k: v.to(weights) for k, v in state.items()}, str(folder / "model.safetensors"), assign=True
    )
    return model
