"""Asking rewards for scores, pausing while they can't be had, and the prompts that they can score."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from tbac.distributed import find_max_over_ranks
from tbac.files import read_prompts, shorten
from tbac.redaction import hide_in_text
from tbac.types import PicturePrompt, Reward, RewardError

log = logging.getLogger(__name__)
FROM_REWARDS, FROM_SHARDS = "rewards", "shards"  # where prompts come from, besides files
BEAT = 1.0  # seconds of a pause between looks at whether the run shall end


@dataclass(frozen=True)
class WeightedReward:
    """One of the rewards that a stage learns from.

    Attributes:
        name: in logs and messages.
        reward: scores pictures.
        weight: of its advantages among those of the others.

    Raises:
        ValueError: for a weight that isn't positive, or an object that is no reward.
    """

    name: str
    reward: Reward
    weight: float = 1.0

    def __post_init__(self) -> None:
        missing = [name for name in ("list_prompts", "score") if not callable(getattr(self.reward, name, None))]
        if missing:
            kind = type(self.reward).__name__
            raise ValueError(f"reward.{self.name}: {kind} isn't a reward, it has no {', '.join(missing)}")
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise ValueError(f"reward.{self.name}.weight must be positive, got {self.weight}")

    def score(self, prompts: Sequence[PicturePrompt], pictures: Sequence[Image.Image]) -> list[float]:
        """Score pictures; NaN stands for a picture without a score.

        Raises:
            RewardError: when it may be asked again later.
            ValueError: for scores of another number, or one that isn't finite.
        """
        scores = [math.nan if score is None else float(score) for score in self.reward.score(prompts, pictures)]
        if len(scores) != len(pictures) or any(map(math.isinf, scores)):
            raise ValueError(
                f"reward.{self.name} must give a finite score for each of {len(pictures)} pictures, or None; "
                f"got {shorten(scores)}"
            )
        return scores


@dataclass(frozen=True)
class Patience:
    """How long a stage waits for a reward that fails: pauses double from the first to the longest.

    Args:
        first_seconds: the first pause.
        longest_seconds: the longest one.
        give_up_minutes: time of pauses in a row after which the stage ends.

    Raises:
        ValueError: for a value that isn't positive.
    """

    first_seconds: float = 10.0
    longest_seconds: float = 600.0
    give_up_minutes: float = 240.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"stage.reinforce.patience.{name} must be positive, got {value}")


class UnansweredError(ValueError):
    """A reward failed for longer than a stage waits."""


def score_pictures(
    rewards: Sequence[WeightedReward],
    prompts: Sequence[PicturePrompt],
    pictures: Sequence[Image.Image],
    patience: Patience,
    beat: Callable[[], None],
    device: torch.device,
) -> Tensor:
    """Score pictures by all rewards; every process waits until all of them have their scores.

    Args:
        rewards: what is asked.
        prompts: one of each picture.
        pictures: of this process.
        patience: how long it waits where one fails.
        beat: called about once a second during a pause, by all processes; what it raises ends the pause.
        device: where processes tell each other of failures.

    Returns:
        (reward, picture), float64; NaN where there is no score.

    Raises:
        UnansweredError: on all processes, when one of them has waited for too long.
    """
    scores: dict[str, list[float]] = {}
    waited, pause = 0.0, patience.first_seconds
    while True:
        problem = _ask_each(rewards, prompts, pictures, scores)
        if not find_max_over_ranks(int(bool(problem)), device):
            return torch.tensor([scores[each.name] for each in rewards], dtype=torch.float64)
        problem = problem or "a reward fails in another process"
        if waited >= 60 * patience.give_up_minutes:
            raise UnansweredError(
                f"{problem}; the stage has waited for {waited / 60:.3g} minutes, and "
                f"stage.reinforce.patience.give_up_minutes={patience.give_up_minutes:g}. Everything is saved; start it "
                "again to go on"
            )
        log.warning("training pauses for %.3g s: %s", pause, problem)
        _wait(pause, beat)
        waited, pause = waited + pause, min(2 * pause, patience.longest_seconds)


def _ask_each(
    rewards: Sequence[WeightedReward],
    prompts: Sequence[PicturePrompt],
    pictures: Sequence[Image.Image],
    scores: dict[str, list[float]],
) -> str:
    """Ask the rewards whose scores aren't known yet, and note them; returns the first problem, or nothing."""
    problem = ""
    for each in rewards:
        if each.name in scores:
            continue
        try:
            scores[each.name] = each.score(prompts, pictures)
        except RewardError as error:
            problem = problem or f"reward.{each.name} fails ({hide_in_text(str(error))})"
    return problem


def _wait(seconds: float, beat: Callable[[], None]) -> None:
    """Wait, in as many beats on every process."""
    for _ in range(math.ceil(seconds / BEAT)):
        beat()
        time.sleep(min(BEAT, seconds))


def collect_prompts(source: str, rewards: Sequence[WeightedReward]) -> list[PicturePrompt] | None:
    """Collect the prompts that a stage draws pictures for.

    Args:
        source: `rewards`, those that all rewards can score; `shards`, the captions of the stage's shards; or a file,
            one prompt a line, or JSON lines with `prompt`.
        rewards: what scores the pictures.

    Returns:
        The prompts, or None for those of the shards.

    Raises:
        ValueError: when there are none, or a reward can't score them.
    """
    listed = {each.name: each.reward.list_prompts() for each in rewards}
    limits = {name: dict.fromkeys(prompts) for name, prompts in listed.items() if prompts is not None}
    if source == FROM_SHARDS:
        if limits:
            raise ValueError(
                f"stage.reinforce.prompts=shards: reward.{next(iter(limits))} can score only prompts of its own; give "
                "stage.reinforce.prompts=rewards, or a reward that asks a judge about any prompt"
            )
        return None
    if source != FROM_REWARDS:
        prompts = [PicturePrompt(text) for text in read_prompts(source, "stage.reinforce.prompts")]
        for name, known in limits.items():
            unknown = next((prompt for prompt in prompts if prompt not in known), None)
            if unknown is not None:
                raise ValueError(
                    f"stage.reinforce.prompts={source}: reward.{name} can't score pictures of "
                    f"{shorten(unknown.text)!r}, only those of its own {len(known)} prompts"
                )
        return list(dict.fromkeys(prompts))
    if not limits:
        raise ValueError(
            "stage.reinforce.prompts=rewards: no reward has prompts of its own; give a file of prompts, or shards"
        )
    first, *others = limits.values()
    common = [prompt for prompt in first if all(prompt in known for known in others)]
    if not common:
        raise ValueError(
            f"stage.reinforce.prompts=rewards: {', '.join(limits)} have no prompt in common; give a file of prompts "
            "that all of them can score"
        )
    return common
