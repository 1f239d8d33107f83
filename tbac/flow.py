"""Flow matching as equations on tensors.

sigma in [0, 1], 1 = pure noise; `noisy = (1 - sigma) * latents + sigma * noise`; `velocity = noise - latents`; the
denoiser's timestep is `1000 * sigma`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

NUM_TIMESTEPS = 1000
SCHEMES = ("uniform", "logit_normal")


@dataclass(frozen=True)
class NoisyLatents:
    """A point on the straight path from latents to noise, and the direction of the path there.

    Attributes:
        noisy: (batch, channel, height, width).
        velocity: same shape, the regression target.
        sigma: (batch,).
    """

    noisy: Tensor
    velocity: Tensor
    sigma: Tensor


def check_scheme(scheme: str, shift: float) -> None:
    """Raise ValueError for options that `sample_sigma` doesn't accept."""
    if scheme not in SCHEMES:
        raise ValueError(f"flow.scheme must be one of {', '.join(SCHEMES)}; got {scheme!r}")
    if shift <= 0:
        raise ValueError(f"flow.shift must be positive, got {shift}")


def sample_sigma(
    batch_size: int,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
    scheme: str = "uniform",
    shift: float = 1.0,
) -> Tensor:
    """Draw noise levels in float32.

    Args:
        batch_size: number of noise levels.
        generator: source of randomness, on `device`.
        device: device of the result.
        scheme: `uniform` over the 1000 steps 1/1000 ... 1 (the released recipe), or `logit_normal` (continuous; SD3).
        shift: the flow shift of SD3 and SANA, `s * sigma / (1 + (s - 1) * sigma)`; 1 changes nothing.

    Returns:
        (batch,) in (0, 1].

    Raises:
        ValueError: for an unknown scheme or a shift that isn't positive.
    """
    check_scheme(scheme, shift)
    if scheme == "uniform":
        uniform = torch.rand(batch_size, generator=generator, device=device)
        sigma = (NUM_TIMESTEPS - (uniform * NUM_TIMESTEPS).floor()) / NUM_TIMESTEPS
    else:
        sigma = torch.sigmoid(torch.randn(batch_size, generator=generator, device=device))
    return shift * sigma / (1 + (shift - 1) * sigma)


def compute_timestep(sigma: Tensor) -> Tensor:
    """Compute the denoiser's timestep, `1000 * sigma`, in float32.

    The sigmas of the training grid are n / 1000. For ten of these thousand, rounding in float32 makes 1000 * sigma miss
    the whole number n, so a timestep that is this close to a whole number becomes that number.
    """
    timestep = NUM_TIMESTEPS * sigma.float()
    nearest = timestep.round()
    return torch.where((timestep - nearest).abs() < 2e-4, nearest, timestep)


def interpolate(latents: Tensor, noise: Tensor, sigma: Tensor) -> NoisyLatents:
    """Mix latents with noise: the point at `sigma` on the straight path from `latents` to `noise`.

    Args:
        latents: (batch, channel, height, width).
        noise: same shape, standard normal.
        sigma: (batch,) in [0, 1].
    """
    level = sigma.to(latents.dtype).view(-1, 1, 1, 1)
    noisy = (1 - level) * latents + level * noise
    return NoisyLatents(noisy, noise - latents, sigma)


def compute_latents(noisy: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """Compute the latents at the end of the straight path that goes through `noisy` with `velocity`.

    Args:
        noisy: (batch, channel, height, width).
        velocity: the same shape.
        sigma: (batch,), the noise level of `noisy`.
    """
    return noisy - sigma.to(noisy.dtype).view(-1, 1, 1, 1) * velocity


def compute_velocity_loss(prediction: Tensor, velocity: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean squared error per sample in float32, optionally weighted by `weight` (batch,), averaged over the batch."""
    per_sample = (prediction.float() - velocity.float()).square().mean(dim=(1, 2, 3))
    return (per_sample if weight is None else per_sample * weight).mean()
