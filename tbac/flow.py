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
    """Raise ValueError for options that `sample_sigma` can't draw from."""
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
        batch_size: how many.
        generator: source of randomness, on `device`.
        device: where the result lives.
        scheme: `uniform` over the 1000 steps 1/1000 ... 1 (the released recipe), or `logit_normal` (continuous; SD3).
        shift: the flow shift of SD3 and SANA, `s * sigma / (1 + (s - 1) * sigma)`; 1 changes nothing.

    Returns:
        (batch,) in (0, 1].

    Raises:
        ValueError: for an unknown scheme or a shift that isn't positive.
    """
    check_scheme(scheme, shift)
    if scheme == "uniform":
        u = torch.rand(batch_size, generator=generator, device=device)
        sigma = (NUM_TIMESTEPS - (u * NUM_TIMESTEPS).floor()) / NUM_TIMESTEPS
    else:
        sigma = torch.sigmoid(torch.randn(batch_size, generator=generator, device=device))
    return shift * sigma / (1 + (shift - 1) * sigma)


def compute_timestep(sigma: Tensor) -> Tensor:
    """The denoiser's timestep, `1000 * sigma`, in float32; what rounding alone keeps from a whole number becomes one.

    A sigma of the training grid is a whole number over 1000, and in float32 ten of the thousand don't come back whole.
    """
    timestep = NUM_TIMESTEPS * sigma.float()
    whole = timestep.round()
    return torch.where((timestep - whole).abs() < 2e-4, whole, timestep)


def interpolate(latents: Tensor, noise: Tensor, sigma: Tensor) -> NoisyLatents:
    """Walk from `latents` towards `noise` by `sigma`.

    Args:
        latents: (batch, channel, height, width).
        noise: same shape, standard normal.
        sigma: (batch,) in [0, 1].
    """
    level = sigma.to(latents.dtype).view(-1, 1, 1, 1)
    noisy = (1 - level) * latents + level * noise
    return NoisyLatents(noisy, noise - latents, sigma)


def compute_latents(noisy: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """The latents at the end of the straight path through `noisy` along `velocity`; shapes as in `NoisyLatents`."""
    return noisy - sigma.to(noisy.dtype).view(-1, 1, 1, 1) * velocity


def compute_velocity_loss(prediction: Tensor, velocity: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean squared error per sample in float32, optionally weighted by `weight` (batch,), averaged over the batch."""
    per_sample = (prediction.float() - velocity.float()).square().mean(dim=(1, 2, 3))
    return (per_sample if weight is None else per_sample * weight).mean()
