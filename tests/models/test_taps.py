"""Laws of the tap rules."""

import pytest

from tbac.models.taps import RULES, TapRule


def test_the_released_model_s_taps() -> None:
    plan = TapRule("last_n").resolve(36, 20)
    assert plan.layers == tuple(range(37))[-21:-1] == tuple(range(16, 36))
    assert plan.assignment == tuple(range(20))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("num_layers", "num_blocks"), [(36, 20), (28, 20), (6, 4), (6, 5)])
def test_every_block_gets_a_tap_in_range(rule: str, num_layers: int, num_blocks: int) -> None:
    layers = tuple(range(1, num_blocks + 1)) if rule == "explicit" else None
    plan = TapRule(rule, layers).resolve(num_layers, num_blocks)
    assert plan.num_blocks == num_blocks
    assert list(plan.layers) == sorted(set(plan.layers))
    assert all(0 <= tap <= num_layers for tap in plan.layers)
    assert plan.mixed or (len(plan.assignment) == num_blocks and set(plan.layer_of_block()) == set(plan.layers))


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("last_n", [2, 3, 4, 5]),
        ("reversed", [5, 4, 3, 2]),
        ("first", [1, 2, 3, 4]),
        ("middle", [1, 2, 3, 4]),
        ("uniform", [1, 2, 4, 5]),
        ("single", [3, 3, 3, 3]),
        ("final", [6, 6, 6, 6]),
    ],
)
def test_rules_on_six_layers_and_four_blocks(rule: str, expected: list[int]) -> None:
    assert TapRule(rule).resolve(6, 4).layer_of_block() == expected


def test_uniform_is_increasing_and_reaches_both_ends() -> None:
    layers = TapRule("uniform").resolve(36, 20).layer_of_block()
    assert layers[0] == 1
    assert layers[-1] == 35
    assert layers == sorted(set(layers))


def test_explicit_taps_keep_the_block_order() -> None:
    assert TapRule("explicit", (5, 1, 3, 1)).resolve(6, 4).layer_of_block() == [5, 1, 3, 1]


def test_fewer_taps_with_a_stated_assignment() -> None:
    plan = TapRule("explicit", (2, 5), assignment=(0, 0, 1, 1)).resolve(6, 4)
    assert plan.layer_of_block() == [2, 2, 5, 5]
    assert plan.layers == (2, 5)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (TapRule("explicit", (1, 2)), ["2 taps", "4 denoiser blocks"]),
        (TapRule("explicit", (1, 2, 3, 4, 5)), ["5 taps", "4 denoiser blocks"]),
        (TapRule("explicit", (1, 2, 3, 7)), ["tap index 7", "6 layers", "0 (embeddings)"]),
        (TapRule("explicit", (-1, 2, 3, 4)), ["tap index -1"]),
        (TapRule("explicit"), ["taps.layers", "empty"]),
        (TapRule("explicit", (2, 5), assignment=(0, 1)), ["taps.assignment", "4 positions"]),
        (TapRule("explicit", (2, 5), assignment=(0, 0, 0, 0)), ["unused"]),
        (TapRule("explicit", (2, 5), assignment=(0, 1, 2, 0)), ["between 0 and 1"]),
        (TapRule("single", layer=9), ["tap index 9"]),
        (TapRule("learned_mix", (1, 9)), ["tap index 9"]),
        (TapRule("deepest"), ["taps.rule", "last_n", "'deepest'"]),
    ],
)
def test_what_doesn_t_fit_is_an_error_that_says_how_many_of_which(rule: TapRule, words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"taps|tap index") as error:
        rule.resolve(6, 4)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_more_blocks_than_states_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"needs 6 taps.*has 5 states"):
        TapRule("last_n").resolve(6, 6)
