"""A training stage: what is trained, how, and when it is over."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from torch import nn

from tbac.flow import check_scheme
from tbac.models.lora import is_adapter, is_trained_beside_adapters

TRAINABLE = ("queries", "connector", "denoiser")


@dataclass(frozen=True)
class FlowOptions:
    """How noise is drawn in training.

    Args:
        scheme: distribution of noise levels, one of those that `tbac.flow.sample_sigma` knows.
        shift: flow shift of noise levels, as in SD3 and SANA; 1 changes nothing.
        noise_samples_per_prompt: draws of noise and sigma for each sample of a step; the MLLM reads a prompt only once
            for all of its draws.
    """

    scheme: str = "uniform"
    shift: float = 1.0
    noise_samples_per_prompt: int = 1

    def __post_init__(self) -> None:
        check_scheme(self.scheme, self.shift)
        if self.noise_samples_per_prompt < 1:
            raise ValueError(f"flow.noise_samples_per_prompt must be at least 1, got {self.noise_samples_per_prompt}")


@dataclass(frozen=True)
class Stage:
    """One stage of training, apart from its data.

    It is over after `steps`, after `samples`, or when `patience` validations in a row brought no better loss,
    whichever comes first.

    Args:
        name: its name in checkpoints and logs, which the noise depends on too.
        optimizer: parameter groups -> optimizer.
        scheduler: optimizer, total_steps -> learning-rate scheduler, stepped after each optimizer step.
        steps: optimizer steps, rejected ones not counted.
        samples: samples drawn by all processes together, those of rejected steps included.
        patience: validations in a row without a better loss after which the stage ends; None ignores the loss.
        min_delta: by how much a validation loss must be below the best one to count as better.
        flow: how noise levels are drawn.
        weight_decay: of matrices; norms, biases and queries have none.
        clip: global gradient norm above which gradients are scaled down to it; None doesn't clip.
        accumulate: batches per optimizer step.
        val_every: optimizer steps between validations; there is one before the first step and one after the last.
        trainable: some of `queries`, `connector` (with the mix of taps), `denoiser`.
        keep_optimizer: start with the optimizer's state at the end of the stage before, for what trains in both.
        callbacks: those of this stage; each stage has its own, as separate jobs would.
        config: what checkpoints of this stage keep as their config.

    Raises:
        ValueError: naming the field and its value.
    """

    name: str
    optimizer: Callable[..., torch.optim.Optimizer]
    scheduler: Callable[..., Any]
    steps: int | None = None
    samples: int | None = None
    patience: int | None = None
    min_delta: float = 0.0
    flow: FlowOptions = FlowOptions()
    weight_decay: float = 0.0
    clip: float | None = None
    accumulate: int = 1
    val_every: int = 1000
    trainable: Sequence[str] = TRAINABLE
    keep_optimizer: bool = False
    callbacks: Sequence[L.Callback] = ()
    config: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("steps", "samples", "patience", "accumulate", "val_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"stage.{name} must be at least 1, got {value}")
        if self.steps is None and self.samples is None:
            raise ValueError(f"stage {self.name} has no end: give stage.steps or stage.samples")
        others = [type(callback).__name__ for callback in self.callbacks if not isinstance(callback, L.Callback)]
        if others:
            raise ValueError(f"callbacks: {', '.join(others)} isn't a callback of Lightning")
        if not isinstance(self.flow, FlowOptions):
            raise ValueError(f"flow must be made by FlowOptions, got {type(self.flow).__name__}")
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"stage.clip must be positive or null, got {self.clip}")
        if not self.trainable or not set(self.trainable) <= set(TRAINABLE):
            raise ValueError(f"stage.trainable must be some of {list(TRAINABLE)}, got {list(self.trainable)}")

    def count_steps(self, samples_per_step: int) -> int:
        """Count the optimizer steps of the whole stage, which is the length of its schedule."""
        by_samples = math.inf if self.samples is None else math.ceil(self.samples / samples_per_step)
        return int(min(math.inf if self.steps is None else self.steps, by_samples))

    def is_over(self, steps: int, samples: int, stale: int) -> bool:
        """Whether the stage has reached one of its ends.

        Args:
            steps: optimizer steps taken in this stage.
            samples: samples drawn in this stage.
            stale: validations in a row that brought no better loss.
        """
        reached = ((steps, self.steps), (samples, self.samples), (stale, self.patience))
        return any(end is not None and count >= end for count, end in reached)

    def apply_trainable(self, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Freeze what this stage doesn't train."""
        listed = list(named_parameters)
        adapted = any(is_adapter(name) for name, _ in listed)
        for name, parameter in listed:
            part = find_trainable_part(name)
            # Where the denoiser has adapters, these and what was added to it train in its place.
            frozen = adapted and part == "denoiser" and not is_trained_beside_adapters(name)
            parameter.requires_grad_(part in self.trainable and not frozen)


def find_trainable_part(name: str) -> str:
    """Return which of `TRAINABLE` a parameter of the training module belongs to."""
    if name.endswith("ladder.queries"):
        return "queries"
    return "connector" if name.startswith("ladder.") else "denoiser"
