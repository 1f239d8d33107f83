"""Reading and checking the configs of all parts, before any weight is read."""

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import diffusers
from accelerate import init_empty_weights
from diffusers import AutoencoderDC, SanaTransformer2DModel
from transformers import Qwen2_5_VLConfig

from tbac.files import ForeignFileError, reading, shorten
from tbac.flow import NUM_TIMESTEPS
from tbac.models.checks import check_keys, check_scheduler
from tbac.models.config import ArchitectureConfig, ModelConfig
from tbac.models.mllm import check_mllm
from tbac.models.sources import HubUnreachableError, read_config
from tbac.models.taps import TapPlan, resolve_taps

# Far above every model that there is, and far below what a config could demand of memory and time.
MAX_LAYERS, MAX_SIZE, MAX_WIDTH, MAX_NUMBER = 512, 2**20, 2**17, 1e9
MAX_POSITIONS = 2**29  # numbers in the denoiser's table of positions
ZERO = ("dropout", "norm_eps", "guidance_embeds_scale")  # arguments that may be 0
UNLIMITED = ("lambda_min_clipped",)  # of schedulers: minus infinity clips nothing


@dataclass(frozen=True)
class Architecture:
    """Configs of all parts, without weights.

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
    def from_config(cls, config: ArchitectureConfig | None) -> "Architecture":
        """Take the configs from the options of a model whose weights are made at random.

        Raises:
            ValueError: when a part is missing, or has an argument that its class doesn't take.
        """
        parts = {} if config is None else config.to_dict()
        missing = [name for name in ("mllm", "transformer", "autoencoder", "scheduler") if name not in parts]
        if missing:
            raise ValueError(
                "model.random_init=true needs model.architecture (configs of mllm, transformer, autoencoder and "
                f"scheduler); it lacks {', '.join(missing)}"
            )
        place = "model.architecture"
        check_transformer(parts["transformer"], f"{place}.transformer")
        check_arguments(AutoencoderDC, parts["autoencoder"], f"{place}.autoencoder")
        check_scheduler(parts["scheduler"])  # not tried out: the planner builds models without numbers
        check_numbers(parts["scheduler"], f"{place}.scheduler")
        mllm = make_mllm_config(parts["mllm"], f"{place}.mllm")
        transformer = complete(SanaTransformer2DModel, parts["transformer"])
        return cls(mllm, transformer, complete(AutoencoderDC, parts["autoencoder"]), parts["scheduler"])

    @classmethod
    def from_pretrained(
        cls, mllm: str, denoiser: str, prefix: str = "model.", known: ArchitectureConfig | None = None
    ) -> "Architecture":
        """Read the configs of two folders or hub ids.

        Args:
            mllm: folder or hub id of the MLLM.
            denoiser: folder or hub id with `transformer/`, `vae/` and `scheduler/`.
            prefix: what stands before the options' names in messages.
            known: configs of transformer and scheduler that are used instead of those of `denoiser`.

        Raises:
            ValueError: naming the folder or hub id that can't be found, and how to give a local path.
        """
        # What a checkpoint or an export says of its own transformer and scheduler comes first.
        configs: dict[str, Any] = {}
        if known is not None and known.transformer is not None:
            configs["transformer"] = dict(known.transformer)
        if known is not None and known.scheduler is not None:
            configs["scheduler"] = dict(known.scheduler)
        places = {name: f"model.architecture.{name}" for name in configs}
        # Every option that can't be read is named in one error, so that the user can mend them all at once.
        problems: dict[str, str] = {}
        unreachable = False  # a hub that doesn't answer takes long to give up, so it is asked only once
        for part, option, source, path in (
            ("mllm", f"{prefix}mllm", mllm, "config.json"),
            ("transformer", f"{prefix}denoiser", denoiser, "transformer/config.json"),
            ("autoencoder", f"{prefix}denoiser", denoiser, "vae/config.json"),
            ("scheduler", f"{prefix}denoiser", denoiser, "scheduler/scheduler_config.json"),
        ):
            if part in configs or option in problems:
                continue
            try:
                configs[part] = read_config(option, source, path, local_only=unreachable)
                places[part] = f"{option}={source}: {path}"
            except ValueError as error:
                unreachable = unreachable or isinstance(error, HubUnreachableError)
                problems[option] = str(error)
        if problems:
            raise ValueError("; ".join(problems.values()))
        check_scheduler_values(configs["scheduler"], places["scheduler"])
        # diffusers adds keys such as `_class_name`, which aren't arguments of the constructors.
        transformer = {k: v for k, v in configs["transformer"].items() if not k.startswith("_")}
        autoencoder = {k: v for k, v in configs["autoencoder"].items() if not k.startswith("_")}
        check_transformer(transformer, places["transformer"])
        check_arguments(AutoencoderDC, autoencoder, places["autoencoder"])
        check_mllm_kind(configs["mllm"], f"{prefix}mllm={mllm}")
        place = places["mllm"]
        config = make_mllm_config(configs["mllm"], place)
        token = config.image_token_id
        if not isinstance(token, int) or not 0 <= token < config.text_config.vocab_size:
            raise ForeignFileError(f"{place}: image_token_id must be a token, got {shorten(token)}")
        transformer = complete(SanaTransformer2DModel, transformer)
        return cls(config, transformer, complete(AutoencoderDC, autoencoder), configs["scheduler"])

    @property
    def num_layers(self) -> int:
        return self.mllm.text_config.num_hidden_layers

    @property
    def hidden_size(self) -> int:
        return self.mllm.text_config.hidden_size

    @property
    def num_blocks(self) -> int:
        return self.transformer["num_layers"]

    @property
    def caption_channels(self) -> int:
        return self.transformer["caption_channels"]


def check_mllm_kind(config: Any, place: str) -> None:
    """Raise ValueError for the config of another kind of model, or for one that names code of its folder to be run."""
    if not isinstance(config, Mapping) or config.get("model_type") != "qwen2_5_vl":
        kind = config.get("model_type") if isinstance(config, Mapping) else config
        raise ValueError(f"{place}: its config.json must be of model_type qwen2_5_vl, got {kind!r}")
    if "auto_map" in config:
        raise ValueError(f"{place}: its config.json names code in auto_map, and no code of a model's folder is run")


def check_transformer(arguments: Mapping[str, Any], place: str) -> None:
    """Raise ValueError for constructor arguments that make no SANA, or one that no memory could hold."""
    check_arguments(SanaTransformer2DModel, arguments, place)
    check_positive(arguments, place)
    with reading(place), init_empty_weights(include_buffers=True):
        values = complete(SanaTransformer2DModel, arguments)
        width = values["num_attention_heads"] * values["attention_head_dim"]
        rows = values["sample_size"] // values["patch_size"]
        if width > MAX_WIDTH or rows**2 * width > MAX_POSITIONS:
            raise ForeignFileError(f"{place}: {width} channels at {rows} x {rows} patches are too many")
        SanaTransformer2DModel(**arguments)  # without memory; whether the sizes fit each other, it knows itself


def check_arguments(kind: type, arguments: Mapping[str, Any], place: str) -> None:
    """Raise ValueError for an argument that a class's constructor doesn't take, or whose type or size it can't use."""
    parameters = {name: part for name, part in inspect.signature(kind).parameters.items() if name != "self"}
    check_keys(arguments, list(parameters), place)
    check_numbers(arguments, place)
    for name, value in arguments.items():
        if not fits(value, parameters[name].annotation):
            expected = getattr(parameters[name].annotation, "__name__", parameters[name].annotation)
            raise ForeignFileError(f"{place}.{name} must be of type {expected}, got {shorten(value)!r}")
    if kind is AutoencoderDC:
        check_positive(arguments, place)
        with reading(place), init_empty_weights(include_buffers=True):
            AutoencoderDC(**arguments)


def check_positive(arguments: Mapping[str, Any], place: str) -> None:
    """Raise ForeignFileError for a size that is 0; lists, such as numbers of layers, may hold zeros."""
    for name, value in arguments.items():
        if isinstance(value, int) and not isinstance(value, bool) and value < 1 and name not in ZERO:
            raise ForeignFileError(f"{place}.{name} must be at least 1, got {value}")


def complete(kind: type, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Add the defaults of a class's constructor to the arguments that a config gives."""
    parameters = inspect.signature(kind).parameters
    defaults = {name: part.default for name, part in parameters.items() if part.default is not inspect.Parameter.empty}
    return defaults | dict(arguments)


def fits(value: Any, annotation: Any) -> bool:
    """Whether a value from a JSON file fits an argument's annotation; a list does where a tuple is meant."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if origin in (tuple, list):
        return isinstance(value, list | tuple) and all(not parts or fits(entry, parts[0]) for entry in value)
    if annotation in (int, float):  # SANA's scale of positions is annotated as a whole number, and is none
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation in (None, NoneType):
        return value is None
    return not isinstance(annotation, type) or isinstance(value, annotation)


def check_numbers(values: Any, place: str, name: str = "") -> None:
    """Raise ForeignFileError for numbers in a config that no model has: not finite, below zero, or enormous.

    Args:
        values: the config, or a part of it.
        place: dotted name of `values`, for messages.
        name: its last part.
    """
    if isinstance(values, Mapping):
        for key, value in values.items():
            check_numbers(value, f"{place}.{shorten(key, 40)}", str(key))
    elif isinstance(values, list | tuple):
        if len(values) > MAX_SIZE:
            raise ForeignFileError(f"{place} has {len(values)} entries; at most {MAX_SIZE} are accepted")
        for value in values:
            check_numbers(value, place, name)
    elif isinstance(values, int | float) and not isinstance(values, bool) and name not in UNLIMITED:
        counts_layers = "layers" in name or name == "depth"
        most = MAX_LAYERS if counts_layers else MAX_NUMBER
        least = 0 if counts_layers or isinstance(values, int) else -MAX_NUMBER
        if (isinstance(values, float) and not math.isfinite(values)) or not least <= values <= most:
            raise ForeignFileError(f"{place} must be a number from {least:g} to {most:g}, got {shorten(values)}")


def check_scheduler_values(config: Mapping[str, Any], place: str) -> None:
    """Raise ValueError for a scheduler outside of the fixed list, or one that can't be made or can't draw a step."""
    check_scheduler(config)
    check_numbers(config, place)
    steps = config.get("num_train_timesteps", NUM_TIMESTEPS)
    if steps != NUM_TIMESTEPS:
        raise ForeignFileError(f"{place}: num_train_timesteps must be {NUM_TIMESTEPS}, got {shorten(steps)}")
    with reading(place):
        scheduler = getattr(diffusers, config["_class_name"]).from_config(dict(config))
        scheduler.set_timesteps(2)
        if not scheduler.sigmas.isfinite().all():
            raise ForeignFileError(f"{place}: its noise levels aren't finite")


def make_mllm_config(values: Mapping[str, Any], place: str) -> Qwen2_5_VLConfig:
    """Make the library's config of an MLLM from plain values, and check its sizes.

    Raises:
        ForeignFileError: for values of which it can't be made, or that no model has.
    """
    # The type of the weights is chosen by whoever opens the model, so what the file says of it is left out.
    nested = {name: part for name, part in values.items() if isinstance(part, Mapping)}
    kept = {name: value for name, value in values.items() if name not in (*nested, "dtype", "torch_dtype")}
    for name, part in nested.items():
        kept[name] = {key: value for key, value in part.items() if key not in ("dtype", "torch_dtype")}
    # Ids of tokens that a model lacks are written as -1 or null, and what isn't known is left to the library.
    check_numbers({name: value for name, value in kept.items() if not name.endswith("_id")}, place)
    with reading(place):
        config = Qwen2_5_VLConfig(**kept)
        text, vision = config.text_config, config.vision_config
        sizes = {
            "hidden_size": text.hidden_size,
            "num_hidden_layers": text.num_hidden_layers,
            "num_attention_heads": text.num_attention_heads,
            "num_key_value_heads": text.num_key_value_heads,
            "intermediate_size": text.intermediate_size,
            "vocab_size": text.vocab_size,
            "vision_config.hidden_size": vision.hidden_size,
            "vision_config: heads": vision.num_attention_heads,
            "vision_config.patch_size": vision.patch_size,
            "vision_config.spatial_merge_size": vision.spatial_merge_size,
            "vision_config.temporal_patch_size": vision.temporal_patch_size,
        }
        for name, size in sizes.items():
            if not isinstance(size, int) or not 1 <= size <= MAX_SIZE:
                raise ForeignFileError(f"{place}: {name} must be from 1 to {MAX_SIZE}, got {shorten(size)}")
        if text.hidden_size % text.num_attention_heads or text.num_attention_heads % text.num_key_value_heads:
            raise ForeignFileError(f"{place}: its numbers of heads don't divide its hidden_size, or each other")
    return config


def read_architecture(config: ModelConfig, opened: bool = False) -> Architecture:
    """Read the configs of all parts.

    Args:
        config: options of the model.
        opened: whether the options come from a checkpoint or an export, which hold the configs of their transformer
            and scheduler.
    """
    if config.random_init:
        return Architecture.from_config(config.architecture)
    known = config.architecture if opened else None
    return Architecture.from_pretrained(config.mllm, config.denoiser, "" if opened else "model.", known)


def check_config(config: ModelConfig, opened: bool = False) -> tuple[Architecture, TapPlan]:
    """Check that the parts of a model exist and fit each other, by their configs alone.

    Args:
        config: options of the model.
        opened: whether the options come from a checkpoint or an export.

    Returns:
        The configs of all parts, and which layer feeds which block.

    Raises:
        ValueError: for anything that doesn't fit or isn't there.
    """
    parts = read_architecture(config, opened)
    plan = resolve_taps(config.taps, parts.num_layers, parts.num_blocks)
    check_mllm(parts.mllm)
    config.ladder.check_width(parts.hidden_size, plan.bundle_size)
    check_channels(parts.transformer["in_channels"], parts.autoencoder["latent_channels"])
    return parts, plan


def check_channels(denoiser: int, autoencoder: int) -> None:
    """Raise ValueError when denoiser and autoencoder have latents of different numbers of channels."""
    if denoiser != autoencoder:
        raise ValueError(f"the denoiser reads latents of {denoiser} channels but the autoencoder makes {autoencoder}")
