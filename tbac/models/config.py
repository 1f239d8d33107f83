"""The options of a model, once.

A YAML of conf/model/, a training checkpoint and an exported folder's `config.json` hold the same keys: the fields of
`ModelConfig`. A YAML is the user's own, so Hydra may instantiate the tap rule and the connector that it names. What a
checkpoint or an export holds is data: plain values with the taps already resolved, read by `ModelConfig.from_dict`,
which imports nothing and calls nothing that the file names.

This module imports neither torch nor a model library, so that a config is checked before these are loaded.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from tbac.files import ForeignFileError, reading
from tbac.models.checks import (
    check_flag,
    check_keys,
    check_plain,
    check_precision,
    check_scheduler,
    check_text,
    check_whole,
    is_number,
)
from tbac.models.taps import TapPlan, TapRule, last_n

TAP_NORMS = ("none", "rms", "layer")
CONNECTORS = ("shared_mlp", "per_tap_mlp", "transformer")
SYSTEM_PROMPT = (
    "You will be given an image or its caption. Please describe the content of the image in detail in your own words."
)
# What weights belong to: a run that goes on can't change these.
FIXED_IN_TRAINING = (
    "taps", "ladder", "num_queries", "query_phrases", "quantization", "lora", "reference_latents", "random_init",
    "seed",
)  # fmt: skip
LARGEST_STD = 1e6  # a larger one can only be a mistake
BEHAVIOUR = ("image_pixels", "max_text_tokens", "system_prompt", "reference_latents", "spell_words")
Connector = Callable[..., Any]  # (num_taps, hidden_size, channels) -> nn.Module; `tbac.models.ladder` says more


def name_connector(connector: str | Connector) -> str:
    """Name a connector for a file: by one of `CONNECTORS`, or by the dotted name of the user's own."""
    if isinstance(connector, str):
        return connector
    made_by = getattr(connector, "func", connector)  # of a functools.partial
    return f"{made_by.__module__}.{made_by.__qualname__}"


LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class LadderConfig:
    """Options of the ladder, apart from those that follow from the model's sizes.

    Attributes:
        connector: `shared_mlp` (released), `per_tap_mlp`, `transformer` (shared by the taps), or your own: a callable
            that takes `num_taps`, `hidden_size` and `channels` and returns a module (more in `tbac.models.ladder`).
        num_layers: encoder layers of the `transformer` connector.
        num_heads: attention heads of the `transformer` connector; must divide the MLLM's hidden size.
        query_std: standard deviation of the queries at the start.
        tap_norm: norm of every tapped state, token by token and without weights, before layers are mixed or projected:
            `none` (released), `rms`, or `layer`.
        prompt_context: the prompt's own tapped states follow the queries in every context, through the same connectors.
            Needs a connector that reads each token apart from the others.

    Raises:
        ValueError: naming the option, its value and what is accepted.
    """

    connector: str | Connector = "shared_mlp"
    num_layers: int = 2
    num_heads: int = 8
    query_std: float = 0.02
    tap_norm: str = "none"
    prompt_context: bool = False

    def __post_init__(self) -> None:
        if self.connector not in CONNECTORS and (isinstance(self.connector, str) or not callable(self.connector)):
            raise ValueError(
                f"ladder.connector must be one of {', '.join(CONNECTORS)}; got {self.connector!r} (a connector of "
                "your own is given by _target_, with _partial_: true)"
            )
        check_whole("ladder.num_layers", self.num_layers, 1)
        check_whole("ladder.num_heads", self.num_heads, 1)
        if not is_number(self.query_std) or not 0 <= self.query_std <= LARGEST_STD:
            raise ValueError(f"ladder.query_std must be between 0 and {LARGEST_STD:g}, got {self.query_std!r}")
        if self.tap_norm not in TAP_NORMS:
            raise ValueError(f"ladder.tap_norm must be one of {', '.join(TAP_NORMS)}; got {self.tap_norm!r}")
        check_flag("ladder.prompt_context", self.prompt_context)
        if self.connector == "transformer":
            self.check_prompt_context(per_token=False)

    @property
    def own_connector(self) -> Connector | None:
        """The user's own connector, or None where it is one of `CONNECTORS`."""
        return None if isinstance(self.connector, str) else self.connector

    def check_prompt_context(self, per_token: bool) -> None:
        """Raise ValueError when the prompt's tokens shall follow the queries and the connector mixes tokens."""
        if self.prompt_context and not per_token:
            raise ValueError(
                "ladder.prompt_context needs ladder.connector=shared_mlp or per_tap_mlp, or a connector of your own "
                "with per_token = True"
            )

    def check_width(self, hidden_size: int, bundle_size: int = 1) -> None:
        """Raise ValueError when the connector's heads don't fit an MLLM of this hidden size.

        Args:
            hidden_size: of the MLLM.
            bundle_size: how many layers are joined along channels to what the connector reads.
        """
        width = hidden_size * bundle_size
        if self.connector == "transformer" and width % self.num_heads:
            joined = f", {bundle_size} times" if bundle_size > 1 else ""
            raise ValueError(
                f"ladder.num_heads={self.num_heads} must divide the MLLM's hidden size {hidden_size}{joined}"
            )

    @classmethod
    def from_dict(cls, values: Any, connector: Connector | None = None) -> "LadderConfig":
        """From plain values.

        Args:
            values: the part `ladder` of a YAML, a checkpoint or an export.
            connector: the user's own connector, if the values name one.

        Raises:
            ValueError: for anything that doesn't fit, and when the user's own connector is named and not given.
        """
        check_keys(values, [f.name for f in fields(cls)], "ladder")
        name = values.get("connector", "shared_mlp")
        if isinstance(name, str) and "." in name:
            if connector is None:
                raise ValueError(
                    f"ladder.connector is {name}, which isn't one of tbac's ({', '.join(CONNECTORS)}), and nothing "
                    "that a file names is imported; give it yourself, as connector= in Python, or on the command line "
                    f"as 'connector={{_target_: {name}, _partial_: true}}'"
                )
            values = {**values, "connector": connector}
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**values, "connector": name_connector(self.connector)}


@dataclass(frozen=True)
class LoraOptions:
    """Low-rank adapters of the denoiser, which then train in its place (`tbac.models.lora`).

    Attributes:
        rank: of each adapter; None trains the denoiser itself.
        alpha: adapters count alpha / rank; None = as much as the rank.
        targets: matrices of the denoiser's blocks, each by how its name ends.

    Raises:
        ValueError: naming the option, its value and what is accepted.
    """

    rank: int | None = None
    alpha: float | None = None
    targets: Sequence[str] = LORA_TARGETS

    def __post_init__(self) -> None:
        if self.rank is not None:
            check_whole("model.lora.rank", self.rank, 1)
        if self.alpha is not None and not (is_number(self.alpha) and 0 < self.alpha <= LARGEST_STD):
            raise ValueError(f"model.lora.alpha must be above 0 and at most {LARGEST_STD:g}, got {self.alpha!r}")
        targets = [self.targets] if isinstance(self.targets, str) else self.targets
        if not isinstance(targets, Sequence) or not targets or not all(isinstance(t, str) and t for t in targets):
            raise ValueError(f"model.lora.targets must be a list of names, got {self.targets!r}")
        object.__setattr__(self, "targets", tuple(targets))
        if self.rank is None and (self.alpha is not None or self.targets != LORA_TARGETS):
            name = "targets" if self.alpha is None else "alpha"
            raise ValueError(f"model.lora.{name} is of adapters, and model.lora.rank=null makes none; give a rank")

    @property
    def scale(self) -> float:
        """By what the product of an adapter's matrices is multiplied."""
        return 1.0 if self.alpha is None or self.rank is None else self.alpha / self.rank

    @classmethod
    def from_dict(cls, values: Any) -> "LoraOptions":
        """From plain values; unknown keys are errors."""
        check_keys(values, [f.name for f in fields(cls)], "model.lora")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {"rank": self.rank, "alpha": self.alpha, "targets": list(self.targets)}


@dataclass(frozen=True)
class ArchitectureConfig:
    """Configs of those parts whose configs aren't read from `mllm` and `denoiser`.

    With `random_init` a YAML needs all four. A checkpoint and an export hold those of transformer and scheduler.

    Attributes:
        mllm: arguments of `Qwen2_5_VLConfig`.
        transformer: constructor arguments of `SanaTransformer2DModel`.
        autoencoder: constructor arguments of `AutoencoderDC`.
        scheduler: of the sampling scheduler, with its `_class_name`, one of `SCHEDULERS`.

    Raises:
        ValueError: for what isn't a mapping, and for another scheduler.
    """

    mllm: Mapping[str, Any] | None = None
    transformer: Mapping[str, Any] | None = None
    autoencoder: Mapping[str, Any] | None = None
    scheduler: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for part in fields(self):
            value = getattr(self, part.name)
            if value is not None and not isinstance(value, Mapping):
                raise ValueError(f"model.architecture.{part.name} must be a mapping, got {value!r}")
        if self.scheduler is not None:
            check_scheduler(self.scheduler)

    @classmethod
    def from_dict(cls, values: Any) -> "ArchitectureConfig":
        """From plain values; unknown keys are errors."""
        check_keys(values, [f.name for f in fields(cls)], "model.architecture")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, without the parts that aren't given."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: dict(value) for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class ModelConfig:
    """What a model is made of, and how.

    Attributes:
        mllm: hub id or folder of a Qwen2.5-VL with tokenizer and image processor.
        denoiser: hub id or folder with SANA's `transformer/`, `vae/` and `scheduler/`.
        image_pixels: area in pixels that each input image is resized to.
        taps: rule that chooses the tapped layers, or the plan that a rule gave.
        ladder: options of connector and queries.
        num_queries: number of learnable queries.
        query_phrases: words that the queries start from, one phrase each (prompt tuning's initialisation from text,
            Lester et al. 2021, arXiv 2104.08691); None starts from noise, as released. Ignored with `random_init`.
        max_text_tokens: longer prompt texts are cut to this many tokens.
        system_prompt: system message of generation prompts; None = the release's.
        dtype: type of the frozen parts' weights: float32, bfloat16, float16; trained parts stay in float32.
        quantization: of the MLLM's decoder layers by bitsandbytes: `nf4`, `int8`, or None.
        prompt_embeddings: exported folder whose table of word embeddings prompts are read with; None = the MLLM's own.
        lora: adapters that train in place of the denoiser's own weights, which are then held in `dtype`.
        reference_latents: the denoiser also reads the latents of each prompt's first input image.
        spell_words: after words in double quotes the prompt has their letters one by one.
        denoiser_checkpointing: run the denoiser's blocks again in the backward pass instead of keeping activations.
        query_checkpointing: the same for the MLLM's layers in the query pass.
        compile: compile the denoiser's blocks and, unless it is quantised, the query pass with `torch.compile`.
        random_init: make weights from `architecture` instead of reading any.
        seed: of the ladder's first weights, and of all weights with `random_init`.
        architecture: configs of the parts; needed with `random_init`.

    Raises:
        ValueError: naming the option, its value and what is accepted.
    """

    mllm: str
    denoiser: str
    image_pixels: int
    taps: TapRule | TapPlan = last_n
    ladder: LadderConfig = field(default_factory=LadderConfig)
    num_queries: int = 64
    query_phrases: Sequence[str] | None = None
    max_text_tokens: int = 256
    system_prompt: str | None = None
    dtype: str = "float32"
    quantization: str | None = None
    prompt_embeddings: str | None = None
    lora: LoraOptions = field(default_factory=LoraOptions)
    reference_latents: bool = False
    spell_words: bool = False
    denoiser_checkpointing: bool = False
    query_checkpointing: bool = False
    compile: bool = False
    random_init: bool = False
    seed: int = 42
    architecture: ArchitectureConfig | None = None

    def __post_init__(self) -> None:
        # Hydra gives nested groups as plain mappings, and these are checked by their own dataclasses.
        if not isinstance(self.ladder, LadderConfig):
            check_keys(self.ladder, [f.name for f in fields(LadderConfig)], "ladder")
            object.__setattr__(self, "ladder", LadderConfig(**self.ladder))
        if not isinstance(self.lora, LoraOptions):
            object.__setattr__(self, "lora", LoraOptions.from_dict(self.lora))
        if self.architecture is not None and not isinstance(self.architecture, ArchitectureConfig):
            object.__setattr__(self, "architecture", ArchitectureConfig.from_dict(self.architecture))
        if self.system_prompt is None:
            object.__setattr__(self, "system_prompt", SYSTEM_PROMPT)
        # Types and ranges of all single values.
        for name in ("mllm", "denoiser", "system_prompt"):
            check_text(f"model.{name}", getattr(self, name))
        for name in ("image_pixels", "num_queries", "max_text_tokens"):
            check_whole(f"model.{name}", getattr(self, name), 1)
        check_whole("model.seed", self.seed, 0)
        flags = ("reference_latents", "spell_words", "denoiser_checkpointing", "query_checkpointing", "compile")
        for name in (*flags, "random_init"):
            check_flag(f"model.{name}", getattr(self, name))
        check_precision("model.", self.dtype, self.quantization)
        if self.prompt_embeddings is not None:
            check_text("model.prompt_embeddings", self.prompt_embeddings)
        if not isinstance(self.taps, TapPlan) and not callable(self.taps):
            raise ValueError(f"model.taps must be a tap rule, such as those of conf/taps/; got {self.taps!r}")
        self._check_query_phrases()

    def _check_query_phrases(self) -> None:
        if self.query_phrases is None:
            return
        if isinstance(self.query_phrases, str) or not isinstance(self.query_phrases, Sequence):
            raise ValueError(f"model.query_phrases must be a list of texts or null, got {self.query_phrases!r}")
        if len(self.query_phrases) != self.num_queries:
            raise ValueError(
                f"model.query_phrases has {len(self.query_phrases)} phrases for model.num_queries={self.num_queries}; "
                "give one phrase per query, or model.query_phrases=null"
            )
        for phrase in self.query_phrases:
            if not isinstance(phrase, str) or not phrase.strip():
                raise ValueError(f"every phrase of model.query_phrases needs a word, got {phrase!r}")

    @classmethod
    def from_dict(cls, values: Any, origin: str, connector: Connector | None = None) -> "ModelConfig":
        """From the plain values of a checkpoint or an export.

        Args:
            values: what `to_dict` gave.
            origin: the file that they come from, for messages.
            connector: the user's own, where the values name one.

        Raises:
            ValueError: for anything else, naming the file.
        """
        with reading(origin):  # wrong types may end in any error
            try:
                return cls._from_plain(values, connector)
            except ValueError as error:
                raise ForeignFileError(f"{origin}: {error}") from None

    @classmethod
    def _from_plain(cls, values: Any, connector: Connector | None) -> "ModelConfig":
        check_plain(values, "model")
        check_keys(values, [f.name for f in fields(cls)], "model")
        missing = [name for name in ("mllm", "denoiser", "image_pixels", "taps", "ladder") if name not in values]
        if missing:
            raise ValueError(f"model lacks the key {missing[0]!r}")
        read = {
            "taps": TapPlan.from_dict(values["taps"]),
            "ladder": LadderConfig.from_dict(values["ladder"], connector),
        }
        return cls(**{**values, **read})

    def describe_taps(self) -> dict[str, Any]:
        """The resolved taps as plain values."""
        assert isinstance(self.taps, TapPlan), "the taps aren't resolved"
        return self.taps.to_dict()

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for a checkpoint or an export; the taps must be resolved."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return values | {
            "taps": self.describe_taps(),
            "ladder": self.ladder.to_dict(),
            "lora": self.lora.to_dict(),
            "query_phrases": None if self.query_phrases is None else list(self.query_phrases),
            "architecture": None if self.architecture is None else self.architecture.to_dict(),
        }

    def without_training_options(self) -> "ModelConfig":
        """The same model, to be opened for use: nothing runs twice to save memory, and nothing is compiled."""
        return replace(self, denoiser_checkpointing=False, query_checkpointing=False, compile=False, random_init=False)

    def list_additions(self) -> dict[str, bool]:
        """List the options by which this model does more than the released one; the value of each is True."""
        return {name: value for name, value in self._list_behaviour().items() if value is True}

    def list_changes_since(self, other: "ModelConfig") -> list[str]:
        """List the options by which this model computes something else than one with the config `other`.

        Each entry reads `option before -> now`. Where the frozen parts lie, how they are kept in memory and
        how training began don't count.
        """
        now, before = self._list_behaviour(), other._list_behaviour()
        return [f"{name} {before[name]} -> {value}" for name, value in now.items() if value != before[name]]

    def _list_behaviour(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name in BEHAVIOUR}
        ladder = self.ladder.to_dict()
        return values | {f"ladder.{name}": ladder[name] for name in ("connector", "tap_norm", "prompt_context")}
