"""The equations of DiffusionNFT: what they reduce to, what they pull towards, what groups tell."""

import pytest
import torch
from torch import Tensor

from tbac.flow import NoisyLatents, interpolate
from tbac.reinforcement import (
    NFTOptions,
    compute_advantages,
    compute_distance,
    compute_nft_loss,
    compute_preferences,
)

PLAIN = NFTOptions(beta=1.0, weigh_errors=False)
ONE = torch.ones(1, dtype=torch.float64)


def draw(pictures: int = 3) -> tuple[Tensor, NoisyLatents, Tensor, Tensor]:
    """Latents, a point on their paths to noise, and the velocities of two policies, in float64."""
    torch.manual_seed(1)
    latents, noise, velocity, old = torch.randn(4, pictures, 2, 3, 3, dtype=torch.float64)
    sigma = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)[:pictures]
    return latents, interpolate(latents, noise, sigma), velocity.requires_grad_(), old


def square(difference: Tensor) -> Tensor:
    return difference.square().mean(dim=(1, 2, 3))


def test_at_half_a_preference_the_loss_is_the_distance_from_the_old_policy() -> None:
    latents, path, velocity, old = draw()
    half = torch.full((3,), 0.5)
    loss = compute_nft_loss(velocity, old, path, latents, half, PLAIN)
    constant = path.sigma**2 * square(old - path.velocity)
    torch.testing.assert_close(loss, (path.sigma**2 * square(velocity - old) + constant).float(), rtol=1e-5, atol=1e-6)
    at_old = old.clone().requires_grad_()
    compute_nft_loss(at_old, old, path, latents, half, PLAIN).sum().backward()
    torch.testing.assert_close(at_old.grad, torch.zeros_like(old), atol=1e-6, rtol=0)


def test_a_full_preference_is_supervised_training_times_sigma_squared() -> None:
    latents, path, velocity, old = draw()
    loss = compute_nft_loss(velocity, old, path, latents, torch.ones(3), PLAIN)
    gradient = torch.autograd.grad(loss.sum(), velocity)[0]
    supervised = path.sigma**2 * square(velocity - path.velocity)
    torch.testing.assert_close(loss, supervised.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, torch.autograd.grad(supervised.sum(), velocity)[0], rtol=1e-5, atol=1e-6)


def test_no_preference_at_the_old_policy_is_the_opposite_of_a_full_one() -> None:
    latents, path, _, old = draw()
    gradients = []
    for preference in (0.0, 1.0):
        velocity = old.clone().requires_grad_()
        loss = compute_nft_loss(velocity, old, path, latents, torch.full((3,), preference), NFTOptions(beta=0.3))
        gradients.append(torch.autograd.grad(loss.sum(), velocity)[0])
    torch.testing.assert_close(gradients[0], -gradients[1], rtol=1e-5, atol=1e-7)
    assert gradients[0].abs().max() > 1e-3


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
def test_the_loss_is_its_equation(beta: float) -> None:
    latents, path, velocity, old = draw()
    preference = torch.tensor([0.1, 0.5, 0.8])
    sigma = path.sigma.view(-1, 1, 1, 1)
    plus, minus = beta * velocity + (1 - beta) * old, (1 + beta) * old - beta * velocity
    terms = []
    for implied in (path.noisy - sigma * plus, path.noisy - sigma * minus):
        error = implied - latents
        terms.append(square(error) / error.detach().abs().mean(dim=(1, 2, 3)))
    expected = (preference * terms[0] + (1 - preference) * terms[1]) / beta
    loss = compute_nft_loss(velocity, old, path, latents, preference, NFTOptions(beta=beta))
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(compute_distance(velocity, old), square(velocity - old).float())


def test_steps_along_the_gradient_pull_to_good_pictures_and_push_from_bad_ones() -> None:
    latents, path, _, old = draw(2)
    velocity = old.clone().requires_grad_()
    compute_nft_loss(velocity, old, path, latents, torch.tensor([1.0, 0.0]), NFTOptions()).sum().backward()
    assert velocity.grad is not None
    moved = old - 0.1 * velocity.grad
    before, after = square(old - path.velocity), square(moved - path.velocity)
    assert after[0] < before[0]
    assert after[1] > before[1]


def test_rewards_that_change_places_within_a_group_change_the_places_of_advantages() -> None:
    rewards = torch.rand(2, 4, 6, dtype=torch.float64)
    weights = torch.tensor([1.0, 3.0], dtype=torch.float64)
    order = torch.randperm(6)
    values = compute_advantages(rewards, weights).values
    torch.testing.assert_close(compute_advantages(rewards[:, :, order], weights).values, values[:, order])
    groups = torch.randperm(4)
    assert torch.equal(compute_advantages(rewards[:, groups], weights).values, values[groups])


def test_an_advantage_is_the_distance_from_the_mean_in_spreads() -> None:
    rewards = torch.tensor([[[0.0, 0.0, 0.0, 1.0]]], dtype=torch.float64)
    advantages = compute_advantages(rewards, ONE)
    torch.testing.assert_close(advantages.values, (rewards[0] - 0.25) / 0.1875**0.5)
    assert advantages.spread.item() == pytest.approx(0.1875**0.5)
    # Neither a reward's scale nor its zero matters.
    torch.testing.assert_close(compute_advantages(50 * rewards - 7, ONE).values, advantages.values)


def test_each_reward_is_compared_by_itself_and_counts_by_its_weight() -> None:
    fine = torch.tensor([[0.0, 1.0, 2.0, 3.0]], dtype=torch.float64)
    coarse = 1000 * torch.tensor([[1.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    alone = [compute_advantages(each[None], ONE).values for each in (fine, coarse)]
    both = compute_advantages(torch.stack([fine, coarse]), torch.tensor([3.0, 1.0], dtype=torch.float64)).values
    torch.testing.assert_close(both, 0.75 * alone[0] + 0.25 * alone[1])


def test_a_group_without_spread_teaches_nothing() -> None:
    rewards = torch.tensor([[[0.1, 0.1, 0.1], [0.0, 1.0, 0.0]]], dtype=torch.float64)
    advantages = compute_advantages(rewards + 1e-12 * torch.rand_like(rewards), ONE)
    assert advantages.informative.tolist() == [False, True]
    assert advantages.values[0].tolist() == [0, 0, 0]


def test_pictures_without_a_score_are_left_out_of_their_group() -> None:
    nan = float("nan")
    advantages = compute_advantages(torch.tensor([[[0.0, nan, 1.0, nan], [nan] * 4]], dtype=torch.float64), ONE)
    without = compute_advantages(torch.tensor([[[0.0, 1.0]]], dtype=torch.float64), ONE).values[0]
    assert advantages.values[0].tolist() == [without[0], 0, without[1], 0]
    assert advantages.informative.tolist() == [True, False]


def test_preferences_lie_around_a_half_between_0_and_1() -> None:
    preferences = compute_preferences(torch.tensor([-9.0, -5.0, -2.5, 0.0, 1.0, 5.0, 9.0]))
    torch.testing.assert_close(preferences, torch.tensor([0.0, 0.0, 0.25, 0.5, 0.6, 1.0, 1.0]))
    rewards = torch.zeros(1, 1, 100, dtype=torch.float64)
    rewards[0, 0, 0] = 1.0
    assert compute_advantages(rewards, ONE).values.max() == 5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beta": 0}, "stage.reinforce.loss.beta must be positive, got 0"),
        ({"beta": float("nan")}, "stage.reinforce.loss.beta must be positive"),
        ({"kl_weight": -1}, "stage.reinforce.loss.kl_weight must be at least 0, got -1"),
    ],
)
def test_options_that_can_t_be_are_named(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        NFTOptions(**options)
