"""Building a UniImage from hub ids, local folders or bare configs.

Everything that can be wrong is checked on configs, which are small, before any weight is read.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tbac.models.autoencoder import FrozenAutoencoder
from tbac.models.denoiser import LadderDenoiser
from tbac.models.ladder import Ladder, check_ladder
from tbac.models.mllm import FrozenMLLM, check_mllm
from tbac.models.prompt import SYSTEM_PROMPT, PromptProcessor
from tbac.models.taps import TapPlan, TapRule
from tbac.models.uniimage import FORMAT, Provenance, UniImage, check_sizes, read_trained_state

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Architecture:
    """Configs of all parts; with no weights behind them.

    Attributes:
        mllm: `Qwen2_5_VLConfig`.
        transformer: constructor arguments of `SanaTransformer2DModel`.
        autoencoder: constructor arguments of `AutoencoderDC`.
        scheduler: config of the sampling scheduler, with its `_class_name`.
    """

    mllm: Qwen2_5_VLConfig
    transformer: dict[str, Any]
    autoencoder: dict[str, Any]
    scheduler: dict[str, Any]

    @classmethod
    def from_dicts(cls, parts: Mapping[str, Any]) -> "Architecture":
        """From plain mappings, such as the `architecture` of a model config."""
        return cls(
            Qwen2_5_VLConfig(**parts["mllm"]), *(dict(parts[k]) for k in ("transformer", "autoencoder", "scheduler"))
        )

    @classmethod
    def from_pretrained(cls, mllm: str, denoiser: str) -> "Architecture":
        """Read only the configs of two folders or hub ids.

        Raises:
            ValueError: naming the folder or hub id that can't be found, and how to give a local path.
        """
        problems: list[str] = []
        unreachable = False  # asking a hub that doesn't answer takes long, so it is asked once
        found: dict[str, dict[str, Any]] = {}
        for part, (option, source, path) in {
            "mllm": ("model.mllm", mllm, "config.json"),
            "transformer": ("model.denoiser", denoiser, "transformer/config.json"),
            "autoencoder": ("model.denoiser", denoiser, "vae/config.json"),
            "scheduler": ("model.denoiser", denoiser, "scheduler/scheduler_config.json"),
        }.items():
            if any(p.startswith(f"{option}=") for p in problems):
                continue  # one message per option
            try:
                found[part] = read_config(option, source, path, local_only=unreachable)
            except ValueError as error:
                unreachable = unreachable or isinstance(error, HubUnreachableError)
                problems.append(str(error))
        if problems:
            raise ValueError("; ".join(problems))
        transformer = {k: v for k, v in found["transformer"].items() if not k.startswith("_")}
        autoencoder = {k: v for k, v in found["autoencoder"].items() if not k.startswith("_")}
        return cls(Qwen2_5_VLConfig(**found["mllm"]), transformer, autoencoder, found["scheduler"])

    @property
    def num_layers(self) -> int:
        return self.mllm.text_config.num_hidden_layers

    @property
    def hidden_size(self) -> int:
        return self.mllm.text_config.hidden_size

    @property
    def num_blocks(self) -> int:
        return self.transformer["num_layers"]


class HubUnreachableError(ValueError):
    """A file that isn't cached, while the hub doesn't answer."""


def read_config(option: str, source: str, path: str, local_only: bool = False) -> dict[str, Any]:
    """A JSON file of a local folder or a hub repository; with `local_only` the hub isn't asked."""
    folder = Path(source).expanduser()
    hint = f"give a local folder with {option}=/path/to/folder"
    if folder.is_dir():
        file = folder / path
        if not file.is_file():
            raise ValueError(f"{option}={source}: the folder has no {path}; {hint} that has one")
    elif source.count("/") == 1 and not source.startswith((".", "/", "~")):
        try:
            file = Path(hf_hub_download(source, path, local_files_only=local_only))
        except (HfHubHTTPError, HFValidationError, EntryNotFoundError, LocalEntryNotFoundError, OSError) as error:
            kind = HubUnreachableError if isinstance(error, LocalEntryNotFoundError) else ValueError
            raise kind(
                f"{option}={source}: no such local folder, and {path} of the hub repository {source} is neither cached "
                f"nor to be downloaded ({type(error).__name__}); {hint}"
            ) from None
    else:
        raise ValueError(f"{option}={source}: no such folder; {hint}, or a hub id such as owner/name")
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{option}={source}: {path} isn't JSON ({error})") from None


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
        random_init: make weights from `architecture` instead of reading any.
        architecture: `{mllm, transformer, autoencoder, scheduler}` configs; needed with `random_init`.
        seed: of the ladder's first weights, and of all weights with `random_init`.

    Raises:
        ValueError: for anything that doesn't fit, before a weight is read.
    """
    parts, plan = check_config(
        mllm, denoiser, taps, ladder, num_queries, query_phrases, dtype, random_init, architecture
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if random_init:
            return assemble_random(parts, plan, ladder, num_queries)
        built = Ladder(plan, num_queries, parts.hidden_size, parts.transformer["caption_channels"], **ladder)
    prompt = PromptProcessor.from_pretrained(
        mllm, image_pixels=image_pixels, max_text_tokens=max_text_tokens, system_prompt=system_prompt
    )
    frozen = DTYPES[dtype]
    language = Qwen2_5_VLForConditionalGeneration.from_pretrained(mllm, dtype=frozen, attn_implementation="sdpa")
    if query_phrases is not None:
        start_queries(built, query_phrases, prompt, language.get_input_embeddings().weight)
    return UniImage(
        FrozenMLLM(language),
        built,
        LadderDenoiser(
            SanaTransformer2DModel.from_pretrained(denoiser, subfolder="transformer", torch_dtype=torch.float32)
        ),
        FrozenAutoencoder(AutoencoderDC.from_pretrained(denoiser, subfolder="vae", torch_dtype=frozen)),
        prompt,
        Provenance(mllm, denoiser, dict(ladder), parts.scheduler),
    )


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
    **_: Any,
) -> tuple[Architecture, TapPlan]:
    """What `load_model` checks before it reads a weight; arguments as there.

    Returns:
        The configs of all parts, and which layer feeds which block.

    Raises:
        ValueError: for anything that doesn't fit or isn't there.
    """
    if dtype not in DTYPES:
        raise ValueError(f"model.dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
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


def configs_of(mllm: str, denoiser: str, random_init: bool, architecture: Mapping[str, Any] | None) -> Architecture:
    """The configs of all parts, from the model config itself or from where the weights are."""
    if not random_init:
        return Architecture.from_pretrained(mllm, denoiser)
    if architecture is None:
        raise ValueError("model.random_init=true needs model.architecture (configs of mllm, transformer, autoencoder)")
    return Architecture.from_dicts(architecture)


def check_model(parts: Architecture, taps: TapRule, ladder: Mapping[str, Any], num_queries: int) -> TapPlan:
    """Check on configs alone that the parts fit, and resolve the taps."""
    plan = taps.resolve(parts.num_layers, parts.num_blocks)
    check_mllm(parts.mllm)
    check_ladder(num_queries, parts.hidden_size, **ladder)
    transformer, autoencoder = SanaConfigView(parts.transformer), SanaConfigView(parts.autoencoder)
    check_sizes(transformer, autoencoder)
    return plan


class SanaConfigView:
    """A config mapping with attribute access."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.__dict__.update(values)


def assemble_random(parts: Architecture, plan: TapPlan, ladder: Mapping[str, Any], num_queries: int) -> UniImage:
    """All parts with fresh weights, on the default device; no tokenizer."""
    return UniImage(
        FrozenMLLM(Qwen2_5_VLForConditionalGeneration._from_config(parts.mllm, attn_implementation="sdpa")),
        Ladder(plan, num_queries, parts.hidden_size, parts.transformer["caption_channels"], **ladder),
        LadderDenoiser(SanaTransformer2DModel(**parts.transformer)),
        FrozenAutoencoder(AutoencoderDC(**parts.autoencoder)),
        None,
        Provenance(ladder=dict(ladder), scheduler=parts.scheduler),
    )


def load_export(cls: type[UniImage], folder: Path, mllm: str | None, denoiser: str | None, dtype: Any) -> UniImage:
    """What `UniImage.from_pretrained` does."""
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} is not an exported model: it has no config.json")
    config = json.loads(file.read_text())
    if config.get("format") != FORMAT:
        raise ValueError(f"{file}: format must be {FORMAT!r}, got {config.get('format')!r}")
    frozen = DTYPES[dtype] if isinstance(dtype, str) else dtype

    def source(given: str | None, named: str) -> str:
        return given or (str(folder / named) if (folder / named).is_dir() else named)

    mllm, denoiser = source(mllm, config["mllm"]["source"]), source(denoiser, config["denoiser"]["source"])
    read_config("mllm", mllm, "config.json")
    read_config("denoiser", denoiser, "vae/config.json")
    taps = config["taps"]
    plan = TapPlan(tuple(taps["layers"]), tuple(taps["assignment"]), taps["mixed"], taps["num_blocks"])
    transformer = SanaTransformer2DModel.from_config(config["denoiser"]["config"])
    frozen_mllm = FrozenMLLM(
        Qwen2_5_VLForConditionalGeneration.from_pretrained(mllm, dtype=frozen, attn_implementation="sdpa")
    )
    channels = transformer.config.caption_channels
    model = cls(
        frozen_mllm,
        Ladder(plan, config["num_queries"], frozen_mllm.hidden_size, channels, **config["ladder"]),
        LadderDenoiser(transformer),
        FrozenAutoencoder(AutoencoderDC.from_pretrained(denoiser, subfolder="vae", torch_dtype=frozen)),
        PromptProcessor.from_pretrained(
            mllm, **{k: config[k] for k in ("image_pixels", "max_text_tokens", "system_prompt")}
        ),
        Provenance(mllm, denoiser, config["ladder"], config["scheduler"]),
    )
    if frozen == torch.float32:
        for part, digest in model.frozen_digests().items():
            if digest != config["frozen_digests"][part]:
                raise ValueError(
                    f"{folder} was trained on another {part}: its digest is not that of "
                    f"{mllm if part == 'mllm' else denoiser}"
                )
    model.load_trained_state(read_trained_state(folder), str(folder / "model.safetensors"))
    return model.to(dtype=frozen) if frozen != torch.float32 else model
