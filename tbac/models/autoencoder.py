"""Images to scaled latents and back, with a frozen `AutoencoderDC`."""

import torch
from diffusers import AutoencoderDC
from torch import Tensor, nn


class FrozenAutoencoder(nn.Module):
    """A deep-compression autoencoder that never trains.

    Args:
        model: the autoencoder; latents are multiplied by its config's `scaling_factor`.
    """

    def __init__(self, model: AutoencoderDC) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "FrozenAutoencoder":
        """Stay in evaluation mode."""
        return super().train(False)

    @property
    def compression(self) -> int:
        """Pixels per latent along one axis."""
        return 2 ** (len(self.model.config.encoder_block_out_channels) - 1)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """(batch, 3, height, width) in [-1, 1] -> scaled latents (batch, channel, height / f, width / f)."""
        return self.model.encode(pixels.to(self.model.dtype)).latent * self.model.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents -> pixels (batch, 3, height, width) clamped to [-1, 1]."""
        pixels = self.model.decode(latents.to(self.model.dtype) / self.model.config.scaling_factor).sample
        return pixels.float().clamp(-1, 1)
