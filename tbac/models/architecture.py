"""The configs of all parts, read and checked before any weight is."""

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
    def from_config(cls, config: ArchitectureConfig | None) -> "Architecture":
        """From the options of a model that is made without reading any file.

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
        """Read only the configs of two folders or hub ids.

        Args:
            mllm: folder or hub id of the MLLM.
            denoiser: folder or hub id with `transformer/`, `vae/` and `scheduler/`.
            prefix: of their options' names in messages.
            known: configs of transformer and scheduler that are used instead of those of `denoiser`.

        Raises:
            ValueError: naming the folder or hub id that can't be found, and how to give a local path.
        """
        found: dict[str, Any] = {}
        if known is not None and known.transformer is not None:
            check_arguments(SanaTransformer2DModel, known.transformer, "model.architecture.transformer")
            found["transformer"] = dict(known.transformer)
        if known is not None and known.scheduler is not None:
            found["scheduler"] = dict(known.scheduler)
        # All that can't be read is named at once, with one message per option.
        problems: dict[str, str] = {}
        unreachable = False  # asking a hub that doesn't answer takes long, so it is asked once
        for part, option, source, path in (
            ("mllm", f"{prefix}mllm", mllm, "config.json"),
            ("transformer", f"{prefix}denoiser", denoiser, "transformer/config.json"),
            ("autoencoder", f"{prefix}denoiser", denoiser, "vae/config.json"),
            ("scheduler", f"{prefix}denoiser", denoiser, "scheduler/scheduler_config.json"),
        ):
            if part in found or option in problems:
                continue
            try:
                found[part] = read_config(option, source, path, local_only=unreachable)
            except ValueError as error:
                unreachable = unreachable or isinstance(error, HubUnreachableError)
                problems[option] = str(error)
        if problems:
            raise ValueError("; ".join(problems.values()))
        check_scheduler(found["scheduler"])
        # What begins with an underscore is the library's note of its version, not an argument.
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

    @property
    def caption_channels(self) -> int:
        return self.transformer["caption_channels"]


def check_arguments(kind: type, arguments: Mapping[str, Any], place: str) -> None:
    """Raise ValueError for an argument that a class's constructor doesn't take."""
    check_keys(arguments, [name for name in inspect.signature(kind).parameters if name != "self"], place)


def read_architecture(config: ModelConfig, opened: bool = False) -> Architecture:
    """The configs of all parts.

    Args:
        config: of the model.
        opened: whether it comes out of a checkpoint or an export, and so knows its own transformer and scheduler.
    """
    if config.random_init:
        return Architecture.from_config(config.architecture)
    known = config.architecture if opened else None
    return Architecture.from_pretrained(config.mllm, config.denoiser, "" if opened else "model.", known)


def check_config(config: ModelConfig, opened: bool = False) -> tuple[Architecture, TapPlan]:
    """Check on configs alone, before any weight is read, that the parts of a model are there and fit.

    Args:
        config: of the model.
        opened: as in `read_architecture`.

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
    """Raise ValueError when the latents of autoencoder and denoiser differ in channels."""
    if denoiser != autoencoder:
        raise ValueError(f"the denoiser reads latents of {denoiser} channels but the autoencoder makes {autoencoder}")
