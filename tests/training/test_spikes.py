"""Spike rules: they learn only from what they let pass."""

import math
from random import Random

import pytest

from experiments.studies.guard.simulate import SCENARIOS, simulate
from tbac.training.spikes import KEPT, RobustRule, RunningMeanRule


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
    rule = RobustRule(window=5, warmup=3, deviations=4, min_ratio=1, max_ratio=1e6)
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
    [
        ({"warmup": 500}, "warmup"),
        ({"deviations": 0}, "deviations"),
        ({"deviations": math.nan}, "deviations"),
        ({"min_ratio": 0.5}, "min_ratio"),
        ({"max_ratio": 2}, "min_ratio"),
        ({"common": 0}, "common"),
        ({"common_ratio": 500}, "common_ratio"),
    ],
)
def test_impossible_settings_are_refused(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=f"guard.{words}"):
        RobustRule(**options)


# What is promised for lasting changes: the most steps that are rejected, or the steps after which the run is stopped.
ADAPTS = {
    "calm": 0, "wide": 0, "jump_6": 12, "jump_15": 12, "jump_both": 12, "drop": 0, "tenth_6": 12, "tenth_15": 12,
    "twentieth_6": 25, "half_6": 12, "rare_6": 20, "rare_1000": 20, "drift_1.01": 0, "zeros": 0, "all_zeros": 0,
}  # fmt: skip
STOPS = {
    "jump_1000": 60, "loss_1000": 60, "tenth_1000": 800, "drift_1.05": 400, "drift_1.2": 150, "loss_1.05": 400,
    "nan": 60,
}  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("make", [RobustRule, RunningMeanRule])
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_lasting_change_is_adapted_to_or_stops_the_run(name: str, make, seed: int) -> None:
    outcome = simulate(make(), SCENARIOS[name], seed)
    if name in STOPS or (name == "drift_1.01" and make is RunningMeanRule):  # which has a greatest norm
        assert outcome.stopped is not None
        assert outcome.stopped - 200 <= STOPS.get(name, 1500)
    else:
        assert outcome.stopped is None
        assert outcome.rejected <= ADAPTS[name]


@pytest.mark.parametrize("value", [0.0, 1e-300, 5e-324, 1e-13])
@pytest.mark.parametrize("make", [RobustRule, RunningMeanRule])
def test_nothing_says_nothing_of_the_scale(make, value: float) -> None:
    rule = make()
    assert all(rule.judge(value, value).reason is None for _ in range(1000))
    assert all(rule.judge(2.0 + i % 3, 1.0).reason is None for i in range(200))
    assert rule.judge(2000.0, 1.0).reason
    assert rule.judge(value, value).reason is None


def test_what_is_common_is_known_after_a_return_to_an_earlier_state() -> None:
    rule = warmed(RobustRule(), spread=0.05)
    before = rule.state_dict()
    assert all(rule.judge(14.0, 1.0).reason for _ in range(5))
    rule.load_state_dict({**before, KEPT: rule.state_dict()[KEPT]})
    assert sum(rule.judge(14.0, 1.0).reason is not None for _ in range(100)) == 3
