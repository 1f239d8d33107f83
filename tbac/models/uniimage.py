"""UniImage: a frozen MLLM, a ladder of taps, a diffusion transformer and a frozen autoencoder as one model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tbac import __version__
from tbac.flow import timestep_of
from tbac.models.architecture import check_sizes
from tbac.models.autoencoder import FrozenAutoencoder
from tbac.models.card import model_card
from tbac.models.denoiser import LadderDenoiser, ProjectedCondition
from tbac.models.export import FORMAT, PROMPT_EMBEDDINGS, Provenance, make_absolute
from tbac.models.ladder import Ladder
from tbac.models.mllm import FrozenMLLM
from tbac.models.prompt import ANSWER_SYSTEM, PromptInputs, PromptProcessor
from tbac.models.sources import DENOISER_FILES, MLLM_FILES, copy_files, local_folder
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
        provenance: where the parts came from.

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
        provenance: Provenance | None = None,
    ) -> None:
        super().__init__()
        check_sizes(denoiser.transformer.config, autoencoder.model.config)
        self.mllm = mllm
        self.ladder = ladder
        self.denoiser = denoiser
        self.autoencoder = autoencoder
        self._prompt = prompt
        self.provenance = provenance or Provenance()

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
    def size_multiple(self) -> int:
        """Pixels that each side of a picture must be a multiple of."""
        return self.autoencoder.compression * self.denoiser.transformer.config.patch_size

    @property
    def latent_channels(self) -> int:
        return self.denoiser.transformer.config.in_channels

    def encode_condition(self, inputs: PromptInputs | dict[str, Tensor]) -> Condition:
        """Read prompts and queries.

        Args:
            inputs: of `prompt()`, on the model's device.

        Returns:
            states (tap, batch, query, caption_channels), entry i for block i; with `ladder.prompt_context` the prompt's
            tokens follow the queries, and there is a mask; with references also the latents of the input images.

        Raises:
            ValueError: for inputs that aren't of `prompt()`, where the prompt's states are wanted.
        """
        plan = self.ladder.plan
        if not self.ladder.prompt_context:
            prefix = self.mllm.prefix(inputs, plan.deepest)
            states, mask = self.mllm.read_queries(self.ladder.queries, prefix, plan.layers), None
        elif "shared_ids" not in inputs:
            raise ValueError("ladder.prompt_context needs inputs of model.prompt(), padded on the right")
        else:
            prefix = self.mllm.prefix(inputs, plan.deepest, plan.layers)
            assert prefix.states is not None
            assert prefix.states_mask is not None
            states = self.mllm.read_queries(self.ladder.queries, prefix, plan.layers)
            mask = torch.cat([prefix.states_mask.new_ones(states.shape[1:3]), prefix.states_mask], dim=1)
            states = torch.cat([states, prefix.states.to(states)], dim=2)
        return Condition(self.ladder(states), mask, self.encode_reference(inputs))

    def encode_reference(self, inputs: PromptInputs | dict[str, Tensor]) -> Tensor | None:
        """Scaled latents (batch, channel, height, width) of each prompt's first input image, 0 where it has none."""
        pixels = inputs.get("reference_pixels") if self.denoiser.reference_embed is not None else None
        if pixels is None:
            return None
        return self.autoencoder.encode(pixels).float() * inputs["has_reference"].view(-1, 1, 1, 1)

    def predict_velocity(
        self, noisy_latents: Tensor, sigma: Tensor, condition: Condition | ProjectedCondition, branches: int = 1
    ) -> Tensor:
        """Predict `noise - latents`.

        Args:
            noisy_latents: (batch, channel, height, width).
            sigma: (batch,) in [0, 1]; or (1,) for all.
            condition: of the same batch, as `encode_condition` or `denoiser.project` gives it.
            branches: how many conditions read the same latents: then `condition` has rows (branch * batch), sigma is
                one for all, and what is returned has rows (branch * batch).
        """
        return self.denoiser(noisy_latents, timestep_of(sigma), condition, branches)

    def answer(self, questions: list[str], images: list[Any] | None = None, max_new_tokens: int = 64) -> list[str]:
        """Greedy answers of the untouched MLLM, one per question; `images` as in `prompt`."""
        inputs = self.prompt(questions, images, system=ANSWER_SYSTEM, ending="", padding_side="left").to(self.device)
        tokens = self.mllm.generate(dict(inputs), max_new_tokens)
        return [t.strip() for t in self.prompt.tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    def trained_state(self) -> dict[str, Tensor]:
        """Every tensor that training may change: queries, connectors, denoiser."""
        return {k: v for k, v in self.state_dict().items() if k.split(".")[0] in TRAINED}

    def options(self) -> dict[str, bool]:
        """What this model does beyond the released one."""
        return {
            "reference_latents": self.denoiser.reference_embed is not None,
            "prompt_context": self.ladder.prompt_context,
            "spell_words": self._prompt is not None and self._prompt.spell_words,
        }

    def set_checkpointing(self, denoiser: bool = False, queries: bool = False) -> None:
        """Run the denoiser's blocks, or the query pass, again in the backward pass instead of keeping activations."""
        self.denoiser.checkpointing = denoiser
        self.mllm.checkpointing = queries

    def compile_parts(self, queries: bool = True, **options: Any) -> None:
        """Compile the denoiser's blocks and, with `queries`, the layers of the query pass, for prompts of any length.

        `options` are those of `torch.compile`.
        """
        self.denoiser.compile_blocks(**options)
        if queries:
            self.mllm.compile_queries(**{"dynamic": True, **options})

    def load_trained_state(self, state: dict[str, Tensor], origin: str, assign: bool = False) -> None:
        """Load `trained_state()` of another model; with `assign` the tensors themselves are taken.

        Raises:
            ValueError: naming every tensor that is missing, unexpected or of another shape.
        """
        own = self.trained_state()
        problems = [f"missing {k}" for k in own if k not in state]
        problems += [f"unexpected {k}" for k in state if k not in own]
        problems += [
            f"{k} has shape {tuple(state[k].shape)}, expected {tuple(v.shape)}"
            for k, v in own.items()
            if k in state and state[k].shape != v.shape
        ]
        if problems:
            more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
            raise ValueError(f"{origin} doesn't fit this model: {'; '.join(problems[:8])}{more}")
        self.load_state_dict(state, strict=False, assign=assign)

    def describe(self) -> dict[str, Any]:
        """The `config.json` of an exported folder."""
        plan, prompt = self.ladder.plan, self.prompt
        transformer = {k: v for k, v in self.denoiser.transformer.config.items() if not k.startswith("_")}
        return {
            "format": FORMAT,
            "tbac_version": __version__,
            "num_queries": self.ladder.queries.shape[0],
            "image_pixels": prompt.image_pixels,
            "max_text_tokens": prompt.max_text_tokens,
            "system_prompt": prompt.system_prompt,
            "spell_words": prompt.spell_words,
            "taps": {
                "layers": list(plan.layers),
                "assignment": list(plan.assignment),
                "mixed": plan.mixed,
                "num_blocks": plan.num_blocks,
            },
            "ladder": self.provenance.ladder,
            "mllm": {"source": make_absolute(self.provenance.mllm)},
            "denoiser": {
                "source": make_absolute(self.provenance.denoiser),
                "config": transformer,
                "references": self.denoiser.reference_embed is not None,
            },
            "frozen_digests": self.provenance.digests,
            "scheduler": self.provenance.scheduler,
        }

    def save_pretrained(
        self, folder: str | Path, standalone: bool = False, notes: Mapping[str, Any] | None = None
    ) -> None:
        """Write an exported folder: `model.safetensors`, `config.json` and the model card `README.md`.

        Args:
            folder: made where it doesn't exist.
            standalone: also copy the frozen parts' files, so that the folder loads without network.
            notes: more rows for the card.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = dict(self.trained_state())
        if self.mllm.prompt_embeddings is not None:
            state[PROMPT_EMBEDDINGS] = self.mllm.prompt_embeddings
        config = self.describe()
        if standalone:
            mllm, denoiser = self.provenance.mllm, self.provenance.denoiser
            copy_files(local_folder("mllm", mllm, MLLM_FILES), folder / "mllm", MLLM_FILES)
            frozen = [name for name in DENOISER_FILES if name.startswith("vae/")]
            copy_files(local_folder("denoiser", denoiser, DENOISER_FILES), folder / "denoiser", frozen)
            config["mllm"]["source"], config["denoiser"]["source"] = "mllm", "denoiser"
        save_file(
            {k: v.detach().cpu().contiguous() for k, v in state.items()},
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        sources = [self.provenance.mllm, self.provenance.denoiser]
        (folder / "README.md").write_text(model_card(config, sources, standalone, notes or {}))

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        mllm: str | None = None,
        denoiser: str | None = None,
        dtype: torch.dtype | str = torch.float32,
        quantization: str | None = None,
    ) -> "UniImage":
        """Load an exported folder.

        Args:
            folder: of `save_pretrained`.
            mllm: where to take the MLLM from instead of the place that `config.json` names.
            denoiser: the same for the autoencoder.
            dtype: of all weights.
            quantization: of the MLLM's decoder layers: `nf4`, `int8`, or None.

        Raises:
            ValueError: when the folder isn't an export, a part can't be found, its digest differs, or tensors don't
                fit.
        """
        from tbac.models.loading import load_export  # the loaders build UniImage, so they import this module

        return load_export(cls, Path(folder), mllm, denoiser, dtype, quantization)
