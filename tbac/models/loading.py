"""Building a UniImage from hub ids, local folders or bare configs.

Everything that can be wrong is checked on configs, which are small, before any weight is read.
"""

import copy
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderDC, SanaTransformer2DModel
from torch import Tensor
from transformers import BitsAndBytesConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLModel

from tbac.models.architecture import Architecture, check_model, configs_of, read_config
from tbac.models.autoencoder import FrozenAutoencoder
from tbac.models.denoiser import LadderDenoiser
from tbac.models.ladder import Ladder
from tbac.models.mllm import FrozenMLLM, check_mllm
from tbac.models.prompt import SYSTEM_PROMPT, PromptProcessor
from tbac.models.taps import TapPlan, TapRule
from tbac.models.uniimage import FORMAT, PROMPT_EMBEDDINGS, Provenance, UniImage, read_state
from tbac.models.weights import (
    DENOISER_FILES,
    MLLM_FILES,
    WeightFiles,
    autoencoder_digest,
    digest_of,
    local_folder,
    mllm_digest,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTIZATIONS = ("nf4", "int8")


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
            digests_of(mllm_folder, denoiser_folder, plan.deepest, table),
        ),
    )
    model.set_checkpointing(denoiser_checkpointing, query_checkpointing)
    if compile:
        model.compile_parts(mllm=quantization is None)
    return model


def load_mllm(
    folder: Path,
    config: Qwen2_5_VLConfig,
    depth: int,
    dtype: torch.dtype,
    quantization: str | None = None,
    prompt_embeddings: Tensor | None = None,
) -> FrozenMLLM:
    """Read an MLLM's word embeddings, vision tower and first `depth` layers; the rest is read when it has to answer.

    Args:
        folder: with config and weights.
        config: of the whole model; it stays as it is.
        depth: the deepest tap.
        dtype: of the weights.
        quantization: `nf4` or `int8`, of the decoder layers.
        prompt_embeddings: the table that prompts are read with instead of the model's own.

    Raises:
        ValueError: when tensors are missing or have another shape, by name.
    """
    text = config.text_config
    options = _mllm_options(dtype, quantization)

    def load_whole() -> Qwen2_5_VLForConditionalGeneration:
        with _no_report():
            return _keep_layout(Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, **options))

    truncated = copy.deepcopy(config)
    truncated.text_config.num_hidden_layers = depth
    if getattr(text, "layer_types", None):
        truncated.text_config.layer_types = text.layer_types[:depth]
    with _no_report():
        model, loaded = Qwen2_5_VLModel.from_pretrained(folder, config=truncated, output_loading_info=True, **options)
    if wrong := sorted(loaded["missing_keys"]) + sorted(str(k[0]) for k in loaded["mismatched_keys"]):
        raise ValueError(f"{folder}: the MLLM's weights don't fit its config, such as {wrong[0]}")
    table = None if prompt_embeddings is None else prompt_embeddings.to(dtype)
    return FrozenMLLM(_keep_layout(model), load_whole, text.num_hidden_layers, table)


def open_mllm(option: str, source: str, dtype: str, quantization: str | None = None) -> tuple[Path, FrozenMLLM]:
    """A whole MLLM that only answers, and its folder.

    Args:
        option: what the user calls it, for messages.
        source: folder or hub id.
        dtype: of its weights.
        quantization: of its decoder layers: `nf4`, `int8`, or None.

    Raises:
        ValueError: for anything that doesn't fit or isn't there.
    """
    check_precision("", dtype, quantization)
    check_mllm(Qwen2_5_VLConfig(**read_config(option, source, "config.json")))
    folder = local_folder(option, source, MLLM_FILES)
    with _no_report():
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, **_mllm_options(DTYPES[dtype], quantization))
    return folder, FrozenMLLM(_keep_layout(model))


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
    """Keep the library from reporting tensors that aren't needed here; what is missing is raised by name."""
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


def load_transformer(folder: Path) -> SanaTransformer2DModel:
    """SANA's transformer in float32, from a denoiser folder.

    Raises:
        ValueError: when tensors are missing, unexpected or have another shape, by name.
    """
    model, loaded = SanaTransformer2DModel.from_pretrained(
        folder, subfolder="transformer", torch_dtype=torch.float32, output_loading_info=True, use_safetensors=True
    )
    wrong = [*loaded["missing_keys"], *loaded["unexpected_keys"], *(k[0] for k in loaded["mismatched_keys"])]
    if wrong:
        raise ValueError(f"{folder}: the denoiser's weights don't fit its config, such as {wrong[0]}")
    return model


def read_prompt_embeddings(folder: str | None) -> Tensor | None:
    """The table that an exported folder reads prompts with, as stored.

    Raises:
        ValueError: when the folder has none.
    """
    if folder is None:
        return None
    file = Path(folder).expanduser() / "model.safetensors"
    files = WeightFiles(file.parent) if file.is_file() else None
    if files is None or PROMPT_EMBEDDINGS not in files.file_of:
        raise ValueError(f"model.prompt_embeddings={folder}: no exported folder with a table {PROMPT_EMBEDDINGS}")
    return files.tensor(PROMPT_EMBEDDINGS)


def digests_of(mllm: Path, denoiser: Path, depth: int, prompt_embeddings: Tensor | None) -> dict[str, str]:
    """What the frozen parts are known by."""
    digests = {"mllm": mllm_digest(mllm, depth), "autoencoder": autoencoder_digest(denoiser)}
    if prompt_embeddings is not None:
        digests["prompt_embeddings"] = digest_of([(PROMPT_EMBEDDINGS, prompt_embeddings)])
    return digests


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


def check_precision(prefix: str, dtype: str, quantization: str | None) -> None:
    """Raise ValueError for a type or a quantisation that there isn't; `prefix` is that of the options' names."""
    if dtype not in DTYPES:
        raise ValueError(f"{prefix}dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    if quantization is not None and quantization not in QUANTIZATIONS:
        raise ValueError(f"{prefix}quantization must be null, {' or '.join(QUANTIZATIONS)}; got {quantization!r}")


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
    digests = digests_of(mllm_folder, denoiser_folder, plan.deepest, table)
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
