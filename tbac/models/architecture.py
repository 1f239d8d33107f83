"""The configs of all parts, read and checked before any weight is."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import Qwen2_5_VLConfig

from tbac.models.ladder import check_ladder
from tbac.models.mllm import check_mllm
from tbac.models.sources import HubUnreachableError, read_config
from tbac.models.taps import TapPlan, TapRule


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
    def from_pretrained(cls, mllm: str, denoiser: str, prefix: str = "model.") -> "Architecture":
        """Read only the configs of two folders or hub ids; `prefix` is that of their options' names in messages.

        Raises:
            ValueError: naming the folder or hub id that can't be found, and how to give a local path.
        """
        problems: list[str] = []
        unreachable = False  # asking a hub that doesn't answer takes long, so it is asked once
        found: dict[str, dict[str, Any]] = {}
        for part, (option, source, path) in {
            "mllm": (f"{prefix}mllm", mllm, "config.json"),
            "transformer": (f"{prefix}denoiser", denoiser, "transformer/config.json"),
            "autoencoder": (f"{prefix}denoiser", denoiser, "vae/config.json"),
            "scheduler": (f"{prefix}denoiser", denoiser, "scheduler/scheduler_config.json"),
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


def check_sizes(transformer: Any, autoencoder: Any) -> None:
    """Raise ValueError when the latents of autoencoder and denoiser differ in channels; both are configs."""
    if transformer.in_channels != autoencoder.latent_channels:
        raise ValueError(
            f"the denoiser reads latents of {transformer.in_channels} channels but the autoencoder makes "
            f"{autoencoder.latent_channels}"
        )
