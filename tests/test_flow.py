"""The mathematics of flow matching."""

import pytest
import torch

from tbac.flow import NUM_TIMESTEPS, compute_velocity_loss, interpolate, sample_sigma


def test_the_path_runs_from_latents_to_noise_along_the_velocity() -> None:
    latents, noise = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64)
    sigma = torch.tensor([0.0, 1.0, 0.3, 0.7, 0.5], dtype=torch.float64)
    path = interpolate(latents, noise, sigma)
    torch.testing.assert_close(path.noisy[0], latents[0])
    torch.testing.assert_close(path.noisy[1], noise[1])
    torch.testing.assert_close(path.velocity, noise - latents)
    # Back from any point: latents = noisy - sigma * velocity; noise = noisy + (1 - sigma) * velocity.
    scale = sigma.view(-1, 1, 1, 1)
    torch.testing.assert_close(path.noisy - scale * path.velocity, latents)
    torch.testing.assert_close(path.noisy + (1 - scale) * path.velocity, noise)
    step = 1e-6
    further = interpolate(latents, noise, sigma + step)
    torch.testing.assert_close((further.noisy - path.noisy) / step, path.velocity, rtol=1e-5, atol=1e-5)


def test_sigmas_are_those_of_the_scheduler_s_thousand_steps() -> None:
    sigma = sample_sigma(50_000, torch.Generator().manual_seed(0))
    assert sigma.dtype == torch.float32
    assert 0 < sigma.min() <= 2 / NUM_TIMESTEPS
    assert sigma.max() <= 1
    assert abs(sigma.mean() - 0.5) < 0.005
    torch.testing.assert_close(sigma * NUM_TIMESTEPS, (sigma * NUM_TIMESTEPS).round(), rtol=0, atol=1e-3)


def test_a_shift_moves_sigmas_towards_noise() -> None:
    plain = sample_sigma(1000, torch.Generator().manual_seed(0))
    shifted = sample_sigma(1000, torch.Generator().manual_seed(0), shift=3.0)
    torch.testing.assert_close(shifted, 3 * plain / (1 + 2 * plain))


def test_the_generator_decides() -> None:
    draws = [sample_sigma(16, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_the_loss_is_the_mean_squared_error_in_float32() -> None:
    a, b = torch.randn(2, 3, 4, 5, 5)
    torch.testing.assert_close(compute_velocity_loss(a, b), ((a - b) ** 2).mean())
    assert compute_velocity_loss(a.bfloat16(), b).dtype == torch.float32


def test_unknown_schemes_are_named() -> None:
    with pytest.raises(ValueError, match="scheme"):
        sample_sigma(3, scheme="cosine")
