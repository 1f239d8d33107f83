"""The options of `stage.reinforce`."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from tbac.reinforcement import NFTOptions
from tbac.training.groups import DrawingOptions
from tbac.training.rewarding import FROM_REWARDS, Patience


@dataclass(frozen=True)
class Rounds:
    """When the old policy follows the one that trains.

    Args:
        steps: optimizer steps of a round; the old policy, which draws the pictures, stays the same within it.
        decay: greatest share of the old policy that remains after a round.
        decay_growth: the share is this times the number of rounds so far, until it reaches `decay`.

    Raises:
        ValueError: naming the field and its value.
    """

    steps: int = 1
    decay: float = 0.5
    decay_growth: float = 0.001

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"stage.reinforce.rounds.steps must be at least 1, got {self.steps}")
        if not 0 <= self.decay < 1:
            raise ValueError(f"stage.reinforce.rounds.decay must be at least 0 and below 1, got {self.decay}")
        if not self.decay_growth >= 0:
            raise ValueError(f"stage.reinforce.rounds.decay_growth must be at least 0, got {self.decay_growth}")

    def compute_decay(self, number: int) -> float:
        """Compute the share of the old policy that remains after the round of this number, counted from 0."""
        return min(self.decay, self.decay_growth * number)


@dataclass(frozen=True)
class ReinforceOptions:
    """How a stage learns from rewards. Parts may be given as mappings, as in a YAML.

    Args:
        prompts: `rewards`, those that the rewards can score; `shards`, the captions of the stage's shards; or a file,
            one prompt a line, or JSON lines with `prompt`.
        drawing: how pictures are drawn.
        loss: DiffusionNFT's.
        rounds: when the old policy follows.
        patience: how long a failing reward is waited for.
        supervised_weight: weight of the usual loss on the batch of the shards; 0 leaves it out.

    Raises:
        ValueError: naming the field and its value.
    """

    prompts: str = FROM_REWARDS
    drawing: DrawingOptions = field(default_factory=DrawingOptions)
    loss: NFTOptions = field(default_factory=NFTOptions)
    rounds: Rounds = field(default_factory=Rounds)
    patience: Patience = field(default_factory=Patience)
    supervised_weight: float = 0.0

    def __post_init__(self) -> None:
        kinds = {"drawing": DrawingOptions, "loss": NFTOptions, "rounds": Rounds, "patience": Patience}
        for name, kind in kinds.items():
            object.__setattr__(self, name, read_options(kind, getattr(self, name), f"stage.reinforce.{name}"))
        if not self.supervised_weight >= 0:
            raise ValueError(f"stage.reinforce.supervised_weight must be at least 0, got {self.supervised_weight}")


def read_options(kind: type, value: Any, option: str) -> Any:
    """Make a dataclass of options from a mapping; one that is made already is returned.

    Raises:
        ValueError: for what is neither, and for a name that is no option.
    """
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"{option} must be a mapping of its options, got {value!r}")
    known = [one.name for one in fields(kind)]
    unknown = [str(name) for name in value if name not in known]
    if unknown:
        raise ValueError(f"{option}.{unknown[0]} isn't an option; there are {', '.join(known)}")
    return kind(**value)
