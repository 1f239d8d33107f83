"""DiffusionNFT as equations on tensors: what pictures with rewards teach a flow model (arXiv 2509.16117).

A policy that is about to be replaced, `old`, draws a group of pictures for each prompt. Those that are better than the
rest of their group pull the velocity towards themselves, those that are worse push it away:

    v+ = beta v + (1 - beta) v_old        v- = (1 + beta) v_old - beta v        x+- = noisy - sigma v+-
    loss = [r |x+ - latents|^2 + (1 - r) |x- - latents|^2] / beta

where r in [0, 1] says how good a picture is. Without error weights the loss is sigma^2 |v - v_old|^2 + const at beta 1
and r 1/2, and sigma^2 times the supervised loss at beta 1 and r 1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tbac.flow import NoisyLatents, compute_latents

MOST_ADVANTAGE = 5.0  # advantages are clipped to this distance from 0
LEAST_SPREAD = 1e-6  # a group whose rewards differ by less tells nothing
LEAST_ERROR = 1e-5  # least error that another one is divided by


@dataclass(frozen=True)
class Advantages:
    """How much better each picture is than the others of its group.

    Attributes:
        values: (group, picture), clipped to +-`MOST_ADVANTAGE`; 0 where a picture has no reward.
        informative: (group,), whether the rewards of a group differ at all; other groups have nothing to teach.
        spread: (reward, group), standard deviation of each reward within each group; 0 in a group with at most one.
    """

    values: Tensor
    informative: Tensor
    spread: Tensor


def compute_advantages(rewards: Tensor, weights: Tensor) -> Advantages:
    """Compare each picture with its group: (reward - mean) / standard deviation, for each reward by itself.

    Args:
        rewards: (reward, group, picture), float64; NaN where a picture has none.
        weights: (reward,), positive; advantages by several rewards are averaged with them.
    """
    # Means over those pictures of a group that have a reward.
    known = ~rewards.isnan()
    count = known.sum(-1, keepdim=True).clamp(min=1)
    filled = torch.where(known, rewards, 0)
    centred = torch.where(known, rewards - filled.sum(-1, keepdim=True) / count, 0)
    spread = (centred.square().sum(-1, keepdim=True) / count).sqrt()
    # A reward that is the same for the whole group says nothing, and its rounding errors mustn't be blown up.
    varied = spread > LEAST_SPREAD
    each = torch.where(varied, centred / spread.clamp(min=LEAST_SPREAD), 0)
    values = torch.einsum("r,rgp->gp", weights / weights.sum(), each).clamp(-MOST_ADVANTAGE, MOST_ADVANTAGE)
    return Advantages(values, varied.squeeze(-1).any(0), spread.squeeze(-1))


def compute_preferences(advantages: Tensor) -> Tensor:
    """Compute r in [0, 1], how much a picture is to be approached, of advantages of any shape."""
    return (advantages / (2 * MOST_ADVANTAGE) + 0.5).clamp(0, 1)


def compute_nft_loss(
    velocity: Tensor, old: Tensor, path: NoisyLatents, latents: Tensor, preference: Tensor, options: "NFTOptions"
) -> Tensor:
    """Compute the loss of DiffusionNFT for each picture, in float32.

    Args:
        velocity: (picture, channel, height, width), predicted by the policy that trains.
        old: the same shape, predicted by the policy that drew the pictures.
        path: where on the path from the pictures to noise both were predicted.
        latents: the same shape, of the pictures.
        preference: (picture,), r.
        options: beta, and whether errors are weighted.

    Returns:
        (picture,).
    """
    beta, velocity, old = options.beta, velocity.float(), old.float()
    towards = compute_latents(path.noisy, beta * velocity + (1 - beta) * old, path.sigma)
    away = compute_latents(path.noisy, (1 + beta) * old - beta * velocity, path.sigma)
    errors = [_measure_error(implied, latents, options.weigh_errors) for implied in (towards, away)]
    preference = preference.float()
    return (preference * errors[0] + (1 - preference) * errors[1]) / beta


def _measure_error(implied: Tensor, latents: Tensor, weigh: bool) -> Tensor:
    """Measure the mean squared distance of each picture, perhaps divided by its mean distance: (picture,)."""
    difference = (implied - latents).float()
    error = difference.square().mean(dim=(1, 2, 3))
    if not weigh:
        return error
    return error / difference.detach().abs().mean(dim=(1, 2, 3)).clamp(min=LEAST_ERROR)


def compute_distance(velocity: Tensor, reference: Tensor) -> Tensor:
    """Compute the mean squared distance of two predictions of the same pictures, in float32: (picture,).

    It is the KL divergence of the two policies' steps up to a factor that depends on the noise level.
    """
    return (velocity.float() - reference.float()).square().mean(dim=(1, 2, 3))


@dataclass(frozen=True)
class NFTOptions:
    """Options of the loss.

    Args:
        beta: how far the two implied policies are from the old one, in units of the change so far.
        weigh_errors: divide each squared error by the picture's mean error, as the authors do.
        kl_weight: weight of the distance to the policy that the stage began with; 0 keeps no copy of it.

    Raises:
        ValueError: naming the field and its value.
    """

    beta: float = 1.0
    weigh_errors: bool = True
    kl_weight: float = 1e-4

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"stage.reinforce.loss.beta must be positive, got {self.beta}")
        if not self.kl_weight >= 0:
            raise ValueError(f"stage.reinforce.loss.kl_weight must be at least 0, got {self.kl_weight}")
