"""UniImage: a frozen MLLM, a ladder of taps, a diffusion transformer and a frozen autoencoder as one model."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tbac import __version__
from tbac.flow import NUM_TIMESTEPS
from tbac.models.autoencoder import FrozenAutoencoder
from tbac.models.denoiser import LadderDenoiser
from tbac.models.ladder import Ladder
from tbac.models.mllm import FrozenMLLM
from tbac.models.prompt import PromptInputs, PromptProcessor
from tbac.types import Condition

FORMAT = "tbac-uniimage-1"
TRAINED = ("ladder", "denoiser")
ANSWER_SYSTEM = "You are a helpful assistant."


@dataclass
class Provenance:
    """Where the parts came from: what an exported folder or a checkpoint needs to find them again.

    Attributes:
        mllm: hub id or folder of the MLLM with its tokenizer and image processor.
        denoiser: hub id or folder with `transformer/`, `vae/` and `scheduler/`.
        ladder: constructor options of the `Ladder` besides plan and sizes.
        scheduler: config of the base model's sampling scheduler.
    """

    mllm: str = ""
    denoiser: str = ""
    ladder: dict[str, Any] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=dict)


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
    def latent_channels(self) -> int:
        return self.denoiser.transformer.config.in_channels

    def encode_condition(self, inputs: PromptInputs | dict[str, Tensor]) -> Condition:
        """Read prompts and queries.

        Args:
            inputs: of `prompt()`, on the model's device.

        Returns:
            states (tap, batch, query, caption_channels), entry i for block i.
        """
        plan = self.ladder.plan
        prefix = self.mllm.prefix(inputs, plan.deepest)
        return Condition(self.ladder(self.mllm.read_queries(self.ladder.queries, prefix, plan.layers)))

    def predict_velocity(self, noisy_latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """Predict `noise - latents`.

        Args:
            noisy_latents: (batch, channel, height, width).
            sigma: (batch,) in [0, 1].
            condition: of the same batch.
        """
        return self.denoiser(noisy_latents, NUM_TIMESTEPS * sigma, condition)

    def answer(self, questions: list[str], images: list[Any] | None = None, max_new_tokens: int = 64) -> list[str]:
        """Greedy answers of the untouched MLLM, one per question; `images` as in `prompt`."""
        inputs = self.prompt(questions, images, system=ANSWER_SYSTEM, ending="", padding_side="left").to(self.device)
        tokens = self.mllm.generate(dict(inputs), max_new_tokens)
        return [t.strip() for t in self.prompt.tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    def trained_state(self) -> dict[str, Tensor]:
        """Every tensor that training may change: queries, connectors, denoiser."""
        return {k: v for k, v in self.state_dict().items() if k.split(".")[0] in TRAINED}

    def load_trained_state(self, state: dict[str, Tensor], origin: str) -> None:
        """Load `trained_state()` of another model.

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
        self.load_state_dict(state, strict=False)

    def frozen_digests(self) -> dict[str, str]:
        """sha256 of names and bytes of every tensor of the frozen parts, computed anew."""
        return {"mllm": tensor_digest(self.mllm), "autoencoder": tensor_digest(self.autoencoder)}

    def describe(self) -> dict[str, Any]:
        """The `config.json` of an exported folder."""
        plan, prompt = self.ladder.plan, self.prompt
        return {
            "format": FORMAT,
            "tbac_version": __version__,
            "num_queries": self.ladder.queries.shape[0],
            "image_pixels": prompt.image_pixels,
            "max_text_tokens": prompt.max_text_tokens,
            "system_prompt": prompt.system_prompt,
            "taps": {
                "layers": list(plan.layers),
                "assignment": list(plan.assignment),
                "mixed": plan.mixed,
                "num_blocks": plan.num_blocks,
            },
            "ladder": self.provenance.ladder,
            "mllm": {"source": self.provenance.mllm},
            "denoiser": {"source": self.provenance.denoiser, "config": dict(self.denoiser.transformer.config)},
            "frozen_digests": self.frozen_digests(),
            "scheduler": self.provenance.scheduler,
        }

    def save_pretrained(self, folder: str | Path, standalone: bool = False) -> None:
        """Write `model.safetensors` and `config.json`; with `standalone` the frozen parts too."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {k: v.detach().cpu().contiguous() for k, v in self.trained_state().items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        config = self.describe()
        if standalone:
            self.mllm.model.save_pretrained(folder / "mllm")
            self.prompt.tokenizer.save_pretrained(folder / "mllm")
            self.prompt.image_processor.save_pretrained(folder / "mllm")
            self.autoencoder.model.save_pretrained(folder / "denoiser" / "vae")
            config["mllm"]["source"], config["denoiser"]["source"] = "mllm", "denoiser"
        (folder / "config.json").write_text(json.dumps(config, indent=2, default=list) + "\n")

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        mllm: str | None = None,
        denoiser: str | None = None,
        dtype: torch.dtype | str = torch.float32,
    ) -> "UniImage":
        """Load an exported folder.

        Args:
            folder: of `save_pretrained`.
            mllm: where to take the MLLM from instead of the place that `config.json` names.
            denoiser: the same for the autoencoder.
            dtype: of all weights.

        Raises:
            ValueError: when the folder isn't an export, a part can't be found, its digest differs, or tensors don't
                fit.
        """
        from tbac.models.loading import load_export  # the loaders build UniImage, so they import this module

        return load_export(cls, Path(folder), mllm, denoiser, dtype)


def check_sizes(transformer: Any, autoencoder: Any) -> None:
    """Raise ValueError when the latents of autoencoder and denoiser differ in channels; both are configs."""
    if transformer.in_channels != autoencoder.latent_channels:
        raise ValueError(
            f"the denoiser reads latents of {transformer.in_channels} channels but the autoencoder makes "
            f"{autoencoder.latent_channels}"
        )


def tensor_digest(module: nn.Module) -> str:
    """sha256 over names, types, shapes and bytes of a module's tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def read_trained_state(folder: Path) -> dict[str, Tensor]:
    """The tensors of an exported folder."""
    return load_file(folder / "model.safetensors")
