"""Spike rules: they learn only from what they let pass."""

import math
from random import Random

import pytest

from tbac.training.spikes import RobustRule, RunningMeanRule


def warmed(rule: RobustRule | RunningMeanRule, steps: int = 200, spread: float = 0.3):
    rng = Random(0)
    for _ in range(steps):
        assert rule.judge(2.0 * math.exp(rng.gauss(0, spread)), math.exp(rng.gauss(0, 0.1))).reason is None
    return rule


@pytest.mark.parametrize("make", [RobustRule, RunningMeanRule])
@pytest.mark.parametrize("bad", [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, -math.inf)])
def test_what_isn_t_finite_is_rejected_from_the_first_step_and_leaves_no_trace(make, bad) -> None:
    rule = make()
    assert rule.judge(*bad).reason
    assert rule.state_dict() == make().state_dict()
    warmed(rule)
    before = rule.state_dict()
    assert rule.judge(*bad).reason
    assert rule.state_dict() == before


@pytest.mark.parametrize("make", [RobustRule, RunningMeanRule])
@pytest.mark.parametrize("bad", [(2000.0, 1.0), (2.0, 1000.0)])
def test_spikes_are_rejected_however_many_come_in_a_row(make, bad) -> None:
    rule = warmed(make())
    before = rule.state_dict()
    assert all(rule.judge(*bad).reason for _ in range(1000))
    assert rule.state_dict() == before
    assert rule.judge(2.0, 1.0).reason is None


def test_the_threshold_is_that_of_median_and_spread() -> None:
    rule = RobustRule(window=5, warmup=3, deviations=4, min_ratio=1)
    for norm in (1.0, math.e, math.e**2, math.e**3, math.e**4):
        rule.judge(norm, 1.0)
    assert rule.judge(1.0, 1.0).threshold == pytest.approx(math.exp(2 + 4 * 1.4826))


def test_the_window_forgets_and_the_warm_up_lets_pass() -> None:
    rule = RobustRule(window=10, warmup=5)
    assert all(rule.judge(10.0**i, 1.0).reason is None for i in range(5))
    for _ in range(10):
        rule.judge(1e-3, 1.0)
    assert rule.judge(1.0, 1.0).reason


def test_slow_growth_is_no_spike() -> None:
    rule = RobustRule()
    assert all(rule.judge(1.01**i, 1.0).reason is None for i in range(2000))


@pytest.mark.parametrize("make", [RobustRule, RunningMeanRule])
def test_the_state_goes_on(make) -> None:
    rule, other = warmed(make()), make()
    other.load_state_dict(rule.state_dict())
    rng = Random(1)
    for _ in range(300):
        values = math.exp(rng.gauss(0, 2)), math.exp(rng.gauss(0, 1))
        assert rule.judge(*values) == other.judge(*values)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"warmup": 500}, "warmup"), ({"deviations": 0}, "deviations"), ({"min_ratio": 0.5}, "min_ratio")],
)
def test_impossible_settings_are_refused(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=f"guard.{words}"):
        RobustRule(**options)
