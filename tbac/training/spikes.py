"""Rules that tell a spike of the gradient norm from ordinary training."""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol


@dataclass(frozen=True)
class Verdict:
    """What a rule says of one step.

    Attributes:
        reason: why the step must not be taken, or None.
        threshold: greatest norm that would have passed; infinite during the warm-up.
    """

    reason: str | None
    threshold: float


class SpikeRule(Protocol):
    """Judges norm and loss of each step before it is taken; learns only from what it lets pass."""

    def judge(self, norm: float, loss: float) -> Verdict: ...

    def reset(self) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def describe_not_finite(norm: float, loss: float) -> str | None:
    """Describe the value that isn't finite; None if both are."""
    for name, value in (("loss", loss), ("gradient norm", norm)):
        if not math.isfinite(value):
            return f"{name} is {value}"
    return None


class RobustRule:
    """Rejects a norm or a loss far above the median of recent ones, on a logarithmic scale.

    The spread is 1.4826 times the median absolute deviation, which for a normal distribution is its standard deviation.
    Median and spread stay sound until half of the window is spikes, and rejected steps never enter the window. Values
    that aren't finite are rejected from the first step on.

    Args:
        window: accepted steps that the statistics look back on.
        warmup: accepted steps before anything finite is judged.
        deviations: tolerated distance from the median, in spreads.
        min_ratio: a value up to this multiple of the median always passes.
    """

    def __init__(self, window: int = 256, warmup: int = 32, deviations: float = 10.0, min_ratio: float = 5.0) -> None:
        if not 2 <= warmup <= window:
            raise ValueError(f"guard.warmup={warmup} must be between 2 and guard.window={window}")
        if deviations <= 0:
            raise ValueError(f"guard.deviations must be positive, got {deviations}")
        if min_ratio < 1:
            raise ValueError(f"guard.min_ratio must be at least 1, got {min_ratio}")
        self.warmup, self.deviations, self.min_ratio = warmup, deviations, min_ratio
        self.norms: deque[float] = deque(maxlen=window)
        self.losses: deque[float] = deque(maxlen=window)

    def judge(self, norm: float, loss: float) -> Verdict:
        """Judge a step, and add it to the statistics if it passes."""
        threshold, loss_threshold = self._threshold(self.norms), self._threshold(self.losses)
        reason = describe_not_finite(norm, loss)
        if reason is None and norm > threshold:
            reason = f"gradient norm {norm:.4g} is above {threshold:.4g}"
        if reason is None and loss > loss_threshold:
            reason = f"loss {loss:.4g} is above {loss_threshold:.4g}"
        if reason is None:
            self.norms.append(_log(norm))
            self.losses.append(_log(loss))
        return Verdict(reason, threshold)

    def _threshold(self, logs: deque[float]) -> float:
        if len(logs) < self.warmup:
            return math.inf
        middle = median(logs)
        spread = 1.4826 * median(abs(x - middle) for x in logs)
        exponent = middle + max(self.deviations * spread, math.log(self.min_ratio))
        return math.exp(min(exponent, 700.0))

    def reset(self) -> None:
        """Forget everything: another stage has another scale."""
        self.norms.clear()
        self.losses.clear()

    def state_dict(self) -> dict[str, Any]:
        return {"norms": list(self.norms), "losses": list(self.losses)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.reset()
        self.norms.extend(state["norms"])
        self.losses.extend(state["losses"])


class RunningMeanRule:
    """The released rule with its defects mended: running means, which only accepted steps enter.

    A step is rejected when its loss exceeds `loss_ratio` times its mean, or its norm exceeds `norm_ratio` times its
    mean and `min_norm`, or is above `max_norm`.

    Args:
        decay: of the running means.
        loss_ratio: a loss above this multiple of its mean is a spike.
        norm_ratio: a norm above this multiple of its mean is one, if it is also above `min_norm`.
        min_norm: a norm up to this is none.
        max_norm: a norm above this always is one.
    """

    def __init__(
        self,
        decay: float = 0.99,
        loss_ratio: float = 20.0,
        norm_ratio: float = 25.0,
        min_norm: float = 1.0,
        max_norm: float = 1.0e6,
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"guard.decay must be in [0, 1), got {decay}")
        self.decay, self.loss_ratio, self.norm_ratio = decay, loss_ratio, norm_ratio
        self.min_norm, self.max_norm = min_norm, max_norm
        self.mean_norm: float | None = None
        self.mean_loss: float | None = None

    def judge(self, norm: float, loss: float) -> Verdict:
        """Judge a step, and add it to the means if it passes."""
        threshold, reason = self.max_norm, describe_not_finite(norm, loss)
        if self.mean_norm is not None and self.mean_loss is not None:
            threshold = min(threshold, max(self.norm_ratio * self.mean_norm, self.min_norm))
            if reason is None and loss > self.loss_ratio * self.mean_loss:
                reason = f"loss {loss:.4g} is above {self.loss_ratio * self.mean_loss:.4g}"
        if reason is None and norm > threshold:
            reason = f"gradient norm {norm:.4g} is above {threshold:.4g}"
        if reason is None:
            self.mean_norm, self.mean_loss = self._mean(self.mean_norm, norm), self._mean(self.mean_loss, loss)
        return Verdict(reason, threshold)

    def _mean(self, mean: float | None, value: float) -> float:
        return value if mean is None else self.decay * mean + (1 - self.decay) * value

    def reset(self) -> None:
        """Forget everything: another stage has another scale."""
        self.mean_norm = self.mean_loss = None

    def state_dict(self) -> dict[str, Any]:
        return {"mean_norm": self.mean_norm, "mean_loss": self.mean_loss}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.mean_norm, self.mean_loss = state["mean_norm"], state["mean_loss"]


def _log(value: float) -> float:
    return math.log(max(value, 1e-300))
