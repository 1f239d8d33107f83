"""Rules that tell a spike of the gradient norm from ordinary training."""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol

NOTHING = 1e-12  # a norm or a loss up to this is as good as 0
KEPT = "kept"  # the part of a rule's state that outlasts a return to an earlier checkpoint


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
    """Judges norm and loss of each step before it is taken; learns only from what it lets pass.

    When the guard goes back to an earlier checkpoint, so does the state of the rule, apart from what is under `KEPT`:
    what the rule knows of the steps that led to it.
    """

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

    What is common isn't a spike: once `common` of the last `window` values were above the threshold, further ones
    pass and enter the statistics, up to `common_ratio` times the median. So a level that lasts, and a kind of sample
    that comes again and again, are accepted after `common` rejected steps. Beyond `max_ratio` times the median nothing
    passes, however wide the spread is, which catches a growth that the spread would grow with.

    A value of 0 says nothing of the scale: it passes, and doesn't enter the window.

    Args:
        window: accepted steps that the statistics look back on.
        warmup: accepted steps before anything finite is judged.
        deviations: tolerated distance from the median, in spreads.
        min_ratio: a value up to this multiple of the median always passes.
        max_ratio: a value above this multiple of the median never does.
        common: how many of the last `window` values above the threshold are no spikes any more.
        common_ratio: a value above this multiple of the median is a spike, however common it is.
    """

    def __init__(
        self,
        window: int = 256,
        warmup: int = 32,
        deviations: float = 10.0,
        min_ratio: float = 5.0,
        max_ratio: float = 100.0,
        common: int = 8,
        common_ratio: float = 20.0,
    ) -> None:
        if not 2 <= warmup <= window:
            raise ValueError(f"guard.warmup={warmup} must be between 2 and guard.window={window}")
        if not deviations > 0:
            raise ValueError(f"guard.deviations must be positive, got {deviations}")
        if not 1 <= min_ratio <= max_ratio:
            raise ValueError(f"guard.min_ratio={min_ratio} must be at least 1 and at most guard.max_ratio={max_ratio}")
        if common < 1:
            raise ValueError(f"guard.common must be at least 1, got {common}")
        if not 1 <= common_ratio <= max_ratio:
            raise ValueError(f"guard.common_ratio={common_ratio} must be between 1 and guard.max_ratio={max_ratio}")
        self.warmup, self.deviations, self.min_ratio, self.max_ratio = warmup, deviations, min_ratio, max_ratio
        self.common, self.common_ratio = common, common_ratio
        self.norms: deque[float] = deque(maxlen=window)
        self.losses: deque[float] = deque(maxlen=window)
        # Which of the last values were above the threshold, those beyond `common_ratio` left out.
        self.high_norms: deque[bool] = deque(maxlen=max(common, window))
        self.high_losses: deque[bool] = deque(maxlen=max(common, window))

    def judge(self, norm: float, loss: float) -> Verdict:
        """Judge a step, and add it to the statistics if it passes."""
        threshold, loss_threshold = self._threshold(self.norms), self._threshold(self.losses)
        reason = describe_not_finite(norm, loss)
        if reason is not None:
            return Verdict(reason, threshold)
        # What is far beyond the others is a spike, and says nothing of what is common.
        seen = (
            ("gradient norm", norm, threshold, self.norms, self.high_norms),
            ("loss", loss, loss_threshold, self.losses, self.high_losses),
        )
        for name, value, limit, logs, _ in seen:
            if value > limit and value > self.common_ratio * math.exp(median(logs)):
                return Verdict(f"{name} {value:.4g} is above {limit:.4g}", threshold)
        for _, value, limit, _, high in seen:
            high.append(value > limit)
        for name, value, limit, _, high in seen:
            if value > limit and sum(high) <= self.common:
                return Verdict(f"{name} {value:.4g} is above {limit:.4g}", threshold)
        for value, logs in ((norm, self.norms), (loss, self.losses)):
            if value > NOTHING:
                logs.append(math.log(value))
        return Verdict(None, threshold)

    def _threshold(self, logs: deque[float]) -> float:
        if len(logs) < self.warmup:
            return math.inf
        middle = median(logs)
        spread = 1.4826 * median(abs(x - middle) for x in logs)
        distance = max(self.deviations * spread, math.log(self.min_ratio))
        return math.exp(min(middle + min(distance, math.log(self.max_ratio)), 700.0))

    def reset(self) -> None:
        """Forget everything: another stage has another scale."""
        for values in (self.norms, self.losses, self.high_norms, self.high_losses):
            values.clear()

    def state_dict(self) -> dict[str, Any]:
        high = {"norms": list(self.high_norms), "losses": list(self.high_losses)}
        return {"norms": list(self.norms), "losses": list(self.losses), KEPT: high}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.reset()
        self.norms.extend(state["norms"])
        self.losses.extend(state["losses"])
        high = state.get(KEPT, {})  # checkpoints of before haven't it
        self.high_norms.extend(high.get("norms", ()))
        self.high_losses.extend(high.get("losses", ()))


class RunningMeanRule:
    """The released rule with its defects mended: running means, which only accepted steps enter.

    A step is rejected when its loss exceeds `loss_ratio` times its mean, or its norm exceeds `norm_ratio` times its
    mean and `min_norm`. Means follow a steady growth, so a norm above `max_norm` or a loss above `max_loss` is rejected
    as well. A value of 0 says nothing of the scale, and doesn't enter the mean.

    Args:
        decay: of the running means.
        loss_ratio: a loss above this multiple of its mean is a spike.
        norm_ratio: a norm above this multiple of its mean is one, if it is also above `min_norm`.
        min_norm: a norm up to this is none.
        max_norm: a norm above this always is one.
        max_loss: a loss above this always is one.
    """

    def __init__(
        self,
        decay: float = 0.99,
        loss_ratio: float = 20.0,
        norm_ratio: float = 25.0,
        min_norm: float = 1.0,
        max_norm: float = 1.0e6,
        max_loss: float = 1.0e4,
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"guard.decay must be in [0, 1), got {decay}")
        self.decay, self.loss_ratio, self.norm_ratio = decay, loss_ratio, norm_ratio
        self.min_norm, self.max_norm, self.max_loss = min_norm, max_norm, max_loss
        self.mean_norm: float | None = None
        self.mean_loss: float | None = None

    def judge(self, norm: float, loss: float) -> Verdict:
        """Judge a step, and add it to the means if it passes."""
        threshold, reason = self.max_norm, describe_not_finite(norm, loss)
        if self.mean_norm is not None:
            threshold = min(threshold, max(self.norm_ratio * self.mean_norm, self.min_norm))
        mean_loss = math.inf if self.mean_loss is None else self.mean_loss
        loss_threshold = min(self.max_loss, self.loss_ratio * mean_loss)
        if reason is None and loss > loss_threshold:
            reason = f"loss {loss:.4g} is above {loss_threshold:.4g}"
        if reason is None and norm > threshold:
            reason = f"gradient norm {norm:.4g} is above {threshold:.4g}"
        if reason is None:
            self.mean_norm, self.mean_loss = self._mean(self.mean_norm, norm), self._mean(self.mean_loss, loss)
        return Verdict(reason, threshold)

    def _mean(self, mean: float | None, value: float) -> float | None:
        if value <= NOTHING:
            return mean
        return value if mean is None else self.decay * mean + (1 - self.decay) * value

    def reset(self) -> None:
        """Forget everything: another stage has another scale."""
        self.mean_norm = self.mean_loss = None

    def state_dict(self) -> dict[str, Any]:
        return {"mean_norm": self.mean_norm, "mean_loss": self.mean_loss}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.mean_norm, self.mean_loss = state["mean_norm"], state["mean_loss"]
