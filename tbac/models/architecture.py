"""Reading and checking the configs of all parts, before any weight is read."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusers import AutoencoderDC, SanaTransformer2DModel
from transformers import Qwen2_5_VLConfig

from tbac.models.config import ArchitectureConfig, ModelConfig, check_keys, check_scheduler
from tbac.models.mllm import check_mllm
from tbac.models.sources import HubUnreachableError, read_config
from tbac.models.taps import TapPlan, resolve_taps


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
        check_arguments(SanaTransformer2DModel, parts["transformer"], "model.architecture.transformer")
        check_arguments(AutoencoderDC, parts["autoencoder"], "model.architecture.autoencoder")
        return cls(Qwen2_5_VLConfig(**parts["mllm"]), parts["transformer"], parts["autoencoder"], parts["scheduler"])

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
            check_arguments(SanaTransformer2DModel, known.transformer, "model.architecture.transformer")
            configs["transformer"] = dict(known.transformer)
        if known is not None and known.scheduler is not None:
            configs["scheduler"] = dict(known.scheduler)
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
            except ValueError as error:
                unreachable = unreachable or isinstance(error, HubUnreachableError)
                problems[option] = str(error)
        if problems:
            raise ValueError("; ".join(problems.values()))
        check_scheduler(configs["scheduler"])
        # diffusers adds keys such as `_class_name`, which aren't arguments of the constructors.
        transformer = {k: v for k, v in configs["transformer"].items() if not k.startswith("_")}
        autoencoder = {k: v for k, v in configs["autoencoder"].items() if not k.startswith("_")}
        check_mllm_kind(configs["mllm"], f"{prefix}mllm={mllm}")
        return cls(Qwen2_5_VLConfig(**configs["mllm"]), transformer, autoencoder, configs["scheduler"])

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


def check_arguments(kind: type, arguments: Mapping[str, Any], place: str) -> None:
    """Raise ValueError for an argument that a class's constructor doesn't take."""
    check_keys(arguments, [name for name in inspect.signature(kind).parameters if name != "self"], place)


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
    config.ladder.check_width(parts.hidden_size)
    check_channels(parts.transformer["in_channels"], parts.autoencoder["latent_channels"])
    return parts, plan


def check_channels(denoiser: int, autoencoder: int) -> None:
    """Raise ValueError when denoiser and autoencoder have latents of different numbers of channels."""
    if denoiser != autoencoder:
        raise ValueError(f"the denoiser reads latents of {denoiser} channels but the autoencoder makes {autoencoder}")
