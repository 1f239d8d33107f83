"""UniImage: a frozen MLLM, a ladder of taps, a diffusion transformer and a frozen autoencoder as one model."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tbac.flow import compute_timestep
from tbac.models.answering import AnswerOptions
from tbac.models.architecture import check_channels
from tbac.models.autoencoder import FrozenAutoencoder
from tbac.models.config import Connector, ModelConfig
from tbac.models.denoiser import LadderDenoiser, ProjectedCondition
from tbac.models.export import find_export, read_export, write_export
from tbac.models.kept_prompts import CachedInputs, PromptCache
from tbac.models.ladder import Ladder
from tbac.models.loading import Provenance, build_parts
from tbac.models.locks import CallLock, one_at_a_time
from tbac.models.lora import merge_saved, write_adapters
from tbac.models.mllm import FrozenMLLM, Prefix
from tbac.models.prompt import ANSWER_SYSTEM, PromptInputs, PromptProcessor
from tbac.models.qwen import DTYPES
from tbac.models.saved import SavedModel, read_checkpoint, read_saved_model
from tbac.types import Condition

TRAINED = ("ladder", "denoiser")


class UniImage(nn.Module):
    """One model that understands and generates.

    Args:
        mllm: reads prompts and queries; never changes.
        ladder: queries and connectors; trains.
        denoiser: the diffusion transformer; trains.
        autoencoder: image <-> scaled latents; never changes.
        prompt: texts and images -> model inputs; None only where no prompt is ever read (planning).
        provenance: what the model is made of.

    Raises:
        ValueError: when the sizes of two parts don't fit.
    """

    def __init__(
        self,
        mllm: FrozenMLLM,
        ladder: Ladder,
        denoiser: LadderDenoiser,
        autoencoder: FrozenAutoencoder,
        prompt: PromptProcessor | None,
        provenance: Provenance,
    ) -> None:
        super().__init__()
        check_channels(denoiser.transformer.config.in_channels, autoencoder.model.config.latent_channels)
        self.mllm = mllm
        self.ladder = ladder
        self.denoiser = denoiser
        self.autoencoder = autoencoder
        self._prompt = prompt
        self.provenance = provenance
        self.prompt_cache: PromptCache | None = None  # `make_prompt_cache` sets it; inputs that it made are read by it
        self.lock = CallLock()  # parts are read, and settings of a pass are made, on the way

    @property
    def prompt(self) -> PromptProcessor:
        """`model.prompt(texts, images=None)`: a list of strings, and per string a list of PIL images or None."""
        if self._prompt is None:
            raise ValueError("this model was built without a tokenizer, so it can't read prompts; give model.mllm")
        return self._prompt

    @property
    def device(self) -> torch.device:
        return self.ladder.queries.device

    @property
    def dtype(self) -> torch.dtype:
        return self.ladder.queries.dtype

    @property
    def size_multiple(self) -> int:
        """Pixels that each side of a picture must be a multiple of."""
        return self.autoencoder.compression * self.denoiser.transformer.config.patch_size

    @property
    def latent_channels(self) -> int:
        return self.denoiser.transformer.config.in_channels

    @property
    def scheduler_config(self) -> dict[str, Any]:
        """Config of the base model's sampling scheduler."""
        architecture = self.provenance.config.architecture
        assert architecture is not None
        return dict(architecture.scheduler or {})

    @one_at_a_time
    def encode_condition(self, inputs: PromptInputs | dict[str, Tensor]) -> Condition:
        """Run prompts and queries through the MLLM, and their tapped states through the connector.

        Args:
            inputs: what `prompt()` returned, on the model's device.

        Returns:
            states (tap, batch, query, caption_channels), entry i for block i. With `ladder.prompt_context` the prompt's
            tokens follow the queries, and there is a mask; with references also the latents of the input images.

        Raises:
            ValueError: with `ladder.prompt_context`, for inputs that `prompt()` hasn't made.
        """
        states, mask = self.read_taps(inputs)
        return Condition(self.ladder(states), mask, self.encode_reference(inputs))

    @one_at_a_time
    def read_taps(self, inputs: PromptInputs | dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Read the tapped states of queries, and with `ladder.prompt_context` of prompts, from the MLLM.

        Args:
            inputs: what `prompt()` returned, on the model's device.

        Returns:
            States (tap, batch, token, hidden) as `ladder` takes them, and the mask (batch, token) of real tokens, or
            None where there are only queries.

        Raises:
            ValueError: with `ladder.prompt_context`, for inputs that `prompt()` hasn't made.
        """
        # The queries run after the prompt. Where the prompt's own states are tapped too, they follow those of the
        # queries, and the mask leaves out the prompt's padding.
        if self.ladder.prompt_layers and "shared_ids" not in inputs:
            raise ValueError("ladder.prompt_context needs inputs of model.prompt(), padded on the right")
        prefix = self.read_prefix(inputs)
        states = self.mllm.read_queries(self.ladder.queries, prefix, self.ladder.plan.layers)
        if prefix.states is None:
            return states, None
        assert prefix.states_mask is not None
        mask = torch.cat([prefix.states_mask.new_ones(states.shape[1:3]), prefix.states_mask], dim=1)
        return torch.cat([states, prefix.states.to(states)], dim=2), mask

    @one_at_a_time
    def read_prefix(self, inputs: PromptInputs | dict[str, Tensor]) -> Prefix:
        """Return what the queries read of prompts: what a prompt cache has kept of them, or what the MLLM computes.

        Args:
            inputs: what `prompt()` or `prompt_cache` made, on the model's device.
        """
        if isinstance(inputs, CachedInputs):
            assert self.prompt_cache is not None, "these inputs were made by a prompt cache that the model hasn't"
            return self.prompt_cache.read_prefix(inputs, self.mllm)
        return self.mllm.read_prefix(inputs, self.ladder.plan.deepest, self.ladder.prompt_layers)

    @one_at_a_time
    def encode_reference(self, inputs: PromptInputs | dict[str, Tensor]) -> Tensor | None:
        """Encode each prompt's first input image as latents (batch, channel, height, width), 0 where it has none."""
        pixels = inputs.get("reference_pixels") if self.denoiser.reference_embed is not None else None
        if pixels is None:
            return None
        return self.autoencoder.encode(pixels).float() * inputs["has_reference"].view(-1, 1, 1, 1)

    @one_at_a_time
    def predict_velocity(
        self, noisy_latents: Tensor, sigma: Tensor, condition: Condition | ProjectedCondition, branches: int = 1
    ) -> Tensor:
        """Predict `noise - latents`.

        Args:
            noisy_latents: (batch, channel, height, width).
            sigma: (batch,) in [0, 1]; or (1,) for all.
            condition: what `encode_condition` or `denoiser.project` returned for the same batch.
            branches: number of guidance branches that share the latents. With more than one, `condition` and the result
                have rows (branch * batch), and sigma is (1,).
        """
        return self.denoiser(noisy_latents, compute_timestep(sigma), condition, branches)

    @one_at_a_time
    def answer(
        self,
        questions: list[str],
        images: list[Any] | None = None,
        max_new_tokens: int = 64,
        streamer: Any = None,
        **sampling: Any,
    ) -> list[str]:
        """Answer questions with the untouched MLLM, greedily unless `sampling` says otherwise.

        Args:
            questions: one per answer.
            images: per question a list of images, or None.
            max_new_tokens: longest answer in tokens.
            streamer: a streamer of transformers, such as `TextStreamer`, which gets the tokens of a single answer.
            sampling: the other options of `AnswerOptions`.

        Raises:
            TypeError: for an option that there isn't.
            ValueError: for an option's value that isn't accepted, and for a streamer with several questions.
        """
        options = AnswerOptions(max_new_tokens, **sampling)
        if not questions:
            return []
        if streamer is not None and len(questions) > 1:
            raise ValueError(f"a streamer shows one answer, and there are {len(questions)} questions")
        inputs = self.prompt(questions, images, system=ANSWER_SYSTEM, ending="", padding_side="left").to(self.device)
        tokens = self.mllm.generate(dict(inputs), options, streamer)
        return [t.strip() for t in self.prompt.tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    def get_trained_state(self) -> dict[str, Tensor]:
        """Return every tensor that training may change: those of queries, connectors and denoiser."""
        return {k: v for k, v in self.state_dict().items() if k.split(".")[0] in TRAINED}

    def set_checkpointing(self, denoiser: bool = False, queries: bool = False) -> None:
        """Choose which passes run again in the backward pass instead of keeping their activations."""
        self.denoiser.checkpointing = denoiser
        self.mllm.checkpointing = queries

    def compile_parts(self, mllm: bool = True, **options: Any) -> None:
        """Compile the denoiser's blocks and, with `mllm`, the MLLM's layers, for prompts of any length.

        `options` are those of `torch.compile`.
        """
        self.denoiser.compile_blocks(**options)
        if mllm:
            self.mllm.compile_layers(**{"dynamic": True, **options})

    def load_trained_state(self, state: dict[str, Tensor], origin: str, assign: bool = False) -> None:
        """Load `get_trained_state()` of another model; with `assign` its tensors are used and not copied.

        Raises:
            ValueError: naming every tensor that is missing, unexpected or of another shape.
        """
        expected = self.get_trained_state()
        problems = [f"missing {k}" for k in expected if k not in state]
        problems += [f"unexpected {k}" for k in state if k not in expected]
        problems += [
            f"{k} has shape {tuple(state[k].shape)}, expected {tuple(v.shape)}"
            for k, v in expected.items()
            if k in state and state[k].shape != v.shape
        ]
        if problems:
            more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
            raise ValueError(f"{origin} doesn't fit this model: {'; '.join(problems[:8])}{more}")
        self.load_state_dict(state, strict=False, assign=assign)

    def save_pretrained(
        self,
        folder: str | Path,
        standalone: bool = False,
        notes: Mapping[str, Any] | None = None,
        scheduler: Mapping[str, Any] | None = None,
    ) -> None:
        """Write an exported folder: `model.safetensors`, `config.json`, the model card `README.md`, and for diffusers
        `model_index.json` with what it names.

        Args:
            folder: made where it doesn't exist.
            standalone: also copy the frozen parts' files, so that the folder loads without network.
            notes: more rows for the card.
            scheduler: config of a scheduler of diffusers that takes the place of the base model's.
        """
        saved = self._describe(str(folder))
        if scheduler is not None:
            architecture = saved.config.architecture
            assert architecture is not None
            config = replace(saved.config, architecture=replace(architecture, scheduler=dict(scheduler)))
            saved = replace(saved, config=config)
        write_export(merge_saved(saved), Path(folder), standalone, notes)

    def save_adapter(self, folder: str | Path) -> None:
        """Write the denoiser's adapters alone, as diffusers loads them (`load_lora_adapter`, `load_lora_weights`).

        Raises:
            ValueError: for a model without adapters, such as one that was opened for use, where they are merged.
        """
        write_adapters(self._describe("the model"), folder)

    def _describe(self, origin: str) -> SavedModel:
        """Describe this model as a file would hold it."""
        provenance = self.provenance
        return SavedModel(
            provenance.config, provenance.digests, self.get_trained_state(), origin, self.mllm.prompt_embeddings
        )

    @classmethod
    def from_config(cls, config: ModelConfig) -> "UniImage":
        """Build the model that a config describes, with untrained queries and connector.

        Raises:
            ValueError: for anything that doesn't fit, before a weight is read.
        """
        with torch.inference_mode(False):  # tensors that are made in inference mode can never be trained with
            model = cls(**vars(build_parts(config)))
        model.set_checkpointing(config.denoiser_checkpointing, config.query_checkpointing)
        if config.compile:
            model.compile_parts(mllm=config.quantization is None)
        return model

    @classmethod
    def from_saved(cls, saved: SavedModel) -> "UniImage":
        """Build a trained model for use, not for further training; its weights get the config's type.

        Raises:
            ValueError: when a part can't be found, its digest differs, or tensors don't fit.
        """
        saved = merge_saved(saved)
        saved = replace(saved, config=saved.config.without_training_options())
        with torch.inference_mode(False):  # tensors that are made in inference mode can never be trained with
            model = cls(**vars(build_parts(saved.config, saved)))
            dtype = DTYPES[saved.config.dtype]
            state = {name: _own(tensor).to(dtype) for name, tensor in saved.state.items()}
            model.load_trained_state(state, saved.origin, assign=True)
        return model

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        mllm: str | None = None,
        denoiser: str | None = None,
        dtype: torch.dtype | str = torch.float32,
        quantization: str | None = None,
        connector: Connector | None = None,
    ) -> "UniImage":
        """Load an exported folder.

        Args:
            folder: what `save_pretrained` wrote, or its hub id.
            mllm: folder or hub id of the MLLM, instead of the one that `config.json` names.
            denoiser: folder or hub id with the autoencoder, instead of the one that `config.json` names.
            dtype: type of all weights.
            quantization: quantisation of the MLLM's decoder layers: `nf4`, `int8`, or None.
            connector: your own connector, if the model was trained with one; nothing that a file names is imported.

        Raises:
            ValueError: when the folder isn't an export, a part can't be found, its digest differs, or tensors don't
                fit.
        """
        saved = read_export(find_export(folder), connector)
        saved = replace(saved, config=replace(saved.config, quantization=quantization))
        return cls.from_saved(place_parts(saved, mllm, denoiser, dtype))

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        mllm: str | None = None,
        denoiser: str | None = None,
        dtype: torch.dtype | str = torch.float32,
        quantization: str | None = None,
        connector: Connector | None = None,
        prompt_embeddings: str | None = None,
    ) -> "UniImage":
        """Load a training checkpoint.

        Args:
            path: the file, or a run folder whose last checkpoint is meant.
            mllm: folder or hub id of the MLLM, instead of the one that the checkpoint names.
            denoiser: folder or hub id with the autoencoder, instead of the one that the checkpoint names.
            dtype: type of all weights.
            quantization: quantisation of the MLLM's decoder layers: `nf4`, `int8`, or None for that of training.
            connector: your own connector, if the model was trained with one; nothing that a file names is imported.
            prompt_embeddings: exported folder with the word embeddings for prompts, instead of the one that the
                checkpoint names.

        Raises:
            ValueError: when it isn't a checkpoint, a part can't be found, its digest differs, or tensors don't fit.
        """
        saved = read_saved_model(read_checkpoint(path, only_weights=True), str(path), connector)
        if quantization is not None:
            saved = replace(saved, config=replace(saved.config, quantization=quantization))
        if prompt_embeddings is not None:
            saved = replace(saved, config=replace(saved.config, prompt_embeddings=prompt_embeddings))
        return cls.from_saved(place_parts(saved, mllm, denoiser, dtype))


def _own(tensor: Tensor) -> Tensor:
    """Return an ordinary tensor, in place of one that was read in inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor


def place_parts(saved: SavedModel, mllm: str | None, denoiser: str | None, dtype: torch.dtype | str) -> SavedModel:
    """Replace where a saved model looks for its frozen parts, and the type of its weights.

    Args:
        saved: the model, as it was read from its file.
        mllm: folder or hub id of the MLLM, or None for the one that the file names.
        denoiser: folder or hub id of the denoiser, or None for the one that the file names.
        dtype: type of all weights.
    """
    config = saved.config
    name = str(dtype).removeprefix("torch.")
    config = replace(config, mllm=mllm or config.mllm, denoiser=denoiser or config.denoiser, dtype=name)
    return replace(saved, config=config)
