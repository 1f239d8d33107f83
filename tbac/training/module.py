"""The LightningModule of ladder tuning: prepare, compute the loss, log."""

import hashlib
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from tbac.flow import check_scheme, interpolate, sample_sigma, velocity_loss
from tbac.models import UniImage
from tbac.training.checkpoints import FACTS, check_frozen
from tbac.training.optimizers import parameter_groups
from tbac.types import Batch


@dataclass(frozen=True)
class FlowOptions:
    """How noise is drawn in training.

    Args:
        scheme: of noise levels; see `tbac.flow.sample_sigma`.
        shift: of noise levels, ditto.
        noise_samples_per_prompt: noises and sigmas per sample and step; the MLLM reads each prompt once for all of
            them.
    """

    scheme: str = "uniform"
    shift: float = 1.0
    noise_samples_per_prompt: int = 1

    def __post_init__(self) -> None:
        check_scheme(self.scheme, self.shift)
        if self.noise_samples_per_prompt < 1:
            raise ValueError(f"flow.noise_samples_per_prompt must be at least 1, got {self.noise_samples_per_prompt}")


class Shared:
    """Holds a model by reference: copies of the holder (weight averaging makes one) hold the same model."""

    def __init__(self, model: UniImage) -> None:
        self.model = model

    def __deepcopy__(self, memo: dict) -> "Shared":
        return copy(self)


class LadderTuningModule(L.LightningModule):
    """Trains queries, connector and denoiser of a `UniImage`.

    Only these are parameters of this module: the frozen MLLM and autoencoder are held by reference, so that
    checkpoints, weight averages and gradient synchronisation never touch them.

    Args:
        model: the whole model.
        optimizer: parameter groups -> optimizer.
        scheduler: optimizer, total_steps -> learning-rate scheduler, stepped after each optimizer step.
        flow: how noise levels are drawn.
        weight_decay: of matrices; norms, biases and queries have none.
        total_steps: optimizer steps of this stage.
        seed: of noise and noise levels.
        facts: what checkpoints say of the model besides tensors (`tbac.training.checkpoints.describe_model`).
    """

    def __init__(
        self,
        model: UniImage,
        optimizer: Callable[..., torch.optim.Optimizer],
        scheduler: Callable[..., Any],
        flow: FlowOptions,
        weight_decay: float,
        total_steps: int,
        seed: int = 42,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self._shared = Shared(model)
        self.ladder = model.ladder
        self.denoiser = model.denoiser
        self.make_optimizer, self.make_scheduler = optimizer, scheduler
        self.flow, self.weight_decay, self.total_steps, self.seed = flow, weight_decay, total_steps, seed
        self.facts = dict(facts or {})
        self._generator: torch.Generator | None = None

    @property
    def model(self) -> UniImage:
        return self._shared.model

    def setup(self, stage: str) -> None:
        """Bring the frozen parts to the device of this process."""
        self.model.to(self.device)

    def on_fit_start(self) -> None:
        self.model.to(self.device)
        self._generator = torch.Generator(self.device).manual_seed(self.seed + self.global_rank)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[FACTS] = self.facts

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that was trained on other frozen parts."""
        if FACTS in checkpoint and checkpoint[FACTS].get("frozen"):
            check_frozen(checkpoint[FACTS], self.model, "the checkpoint")

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch.to(device, non_blocking=True)

    def latents(self, batch: Batch) -> Tensor:
        """Cached latents, or the target images encoded now: (batch, channel, height, width)."""
        if batch.latents is not None:
            return batch.latents
        assert batch.pixels is not None
        return self.model.autoencoder.encode(batch.pixels).float()

    def loss(self, batch: Batch, noise: Tensor, sigma: Tensor, latents: Tensor) -> Tensor:
        """Flow-matching loss of a batch.

        Args:
            batch: its prompts are read once.
            noise: as `latents`.
            sigma: one per row of `latents`.
            latents: (batch * k, channel, height, width), k rows per sample, next to each other.
        """
        path = interpolate(latents, noise, sigma)
        condition = self.model.encode_condition(batch.prompt)
        if len(latents) != len(batch):
            rows = torch.arange(len(batch), device=self.device)
            condition = condition[rows.repeat_interleave(len(latents) // len(batch))]
        prediction = self.model.predict_velocity(path.noisy, sigma, condition)
        return velocity_loss(prediction, path.velocity)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        latents = self.latents(batch).repeat_interleave(self.flow.noise_samples_per_prompt, dim=0)
        noise = torch.randn(latents.shape, generator=self._generator, device=self.device)
        sigma = sample_sigma(len(latents), self._generator, self.device, scheme=self.flow.scheme, shift=self.flow.shift)
        loss = self.loss(batch, noise, sigma, latents)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The same noise and sigmas in every validation: each sample's follow from its key."""
        latents = self.latents(batch)
        noise, sigma = fixed_noise(batch.keys, latents)
        loss = self.loss(batch, noise, sigma, latents)
        self.log("val/loss", loss, prog_bar=True, on_epoch=True, sync_dist=True, batch_size=len(batch))

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = self.make_optimizer(parameter_groups([self.ladder, self.denoiser], self.weight_decay))
        scheduler = self.make_scheduler(optimizer, total_steps=self.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def fixed_noise(keys: list[str], latents: Tensor) -> tuple[Tensor, Tensor]:
    """Noise shaped like `latents` and uniform sigmas (batch,), each a function of its key alone."""
    noise, sigma = [], []
    for key in keys:
        seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")
        generator = torch.Generator().manual_seed(seed)
        noise.append(torch.randn(latents.shape[1:], generator=generator))
        sigma.append(sample_sigma(1, generator))
    return torch.stack(noise).to(latents), torch.cat(sigma).to(latents.device)
