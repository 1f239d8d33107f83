"""Laws of the tap rules."""

from functools import partial

import pytest

from tbac.models.taps import (
    TapPlan,
    TapRule,
    attend,
    bundle,
    explicit,
    final,
    first,
    last_n,
    last_n_reversed,
    learned_mix,
    middle,
    resolve_taps,
    single,
    uniform,
)

RULES = (last_n, uniform, first, middle, single, final, explicit, last_n_reversed, learned_mix, bundle, attend)


def test_the_released_model_s_taps() -> None:
    plan = resolve_taps(last_n, 36, 20)
    assert plan.layers == tuple(range(37))[-21:-1] == tuple(range(16, 36))
    assert plan.assignment == tuple(range(20))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("num_layers", "num_blocks"), [(36, 20), (28, 20), (6, 4), (6, 5)])
def test_every_block_gets_a_tap_in_range(rule: TapRule, num_layers: int, num_blocks: int) -> None:
    if rule is explicit:
        rule = partial(explicit, layers=tuple(range(1, num_blocks + 1)))
    plan = resolve_taps(rule, num_layers, num_blocks)
    assert plan.num_blocks == num_blocks
    assert list(plan.layers) == sorted(set(plan.layers))
    assert all(0 <= tap <= num_layers for tap in plan.layers)
    read = [plan.layers[position] for reading in plan.list_readings() for position in reading]
    assert len(plan.list_readings()) == num_blocks
    assert set(read) == set(plan.layers)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (last_n, [2, 3, 4, 5]),
        (last_n_reversed, [5, 4, 3, 2]),
        (first, [1, 2, 3, 4]),
        (middle, [1, 2, 3, 4]),
        (uniform, [1, 2, 4, 5]),
        (single, [3, 3, 3, 3]),
        (final, [6, 6, 6, 6]),
        (partial(bundle, size=2), [[1, 4], [2, 5], [2, 5], [3, 6]]),
        (bundle, [[1, 3, 5], [1, 3, 5], [2, 4, 6], [2, 4, 6]]),
        (partial(bundle, layers=[5, 1]), [[5, 1]] * 4),
        (partial(bundle, layers=[[1, 2], [3, 2], [4, 6], [5, 6]]), [[1, 2], [3, 2], [4, 6], [5, 6]]),
        (partial(bundle, layers=[3]), [3] * 4),
        (partial(learned_mix, layers="all"), [[1, 2, 3, 4, 5, 6]] * 4),
        (partial(learned_mix, layers=[6, 2], shared=True), [[2, 6]] * 4),
        (partial(learned_mix, layers=[2]), [2] * 4),
        (attend, [[1, 2, 3, 4, 5, 6]] * 4),
        # Chosen blocks: the rule is for their number, and the others read the final state.
        (partial(last_n, blocks=[2, 0]), [5, 6, 4, 6]),
        (partial(last_n, blocks=1), [6, 5, 6, 6]),
        (partial(explicit, layers=[3, 1], blocks=[0, 3]), [3, 6, 6, 1]),
        (partial(last_n_reversed, blocks=[3, 2, 1, 0]), [2, 3, 4, 5]),
        (partial(learned_mix, layers=[2, 3], blocks=[1]), [[6], [2, 3], [6], [6]]),
        (partial(attend, blocks=[1, 3]), [[6], [1, 2, 3, 4, 5, 6], [6], [1, 2, 3, 4, 5, 6]]),
        (partial(bundle, layers=[2, 4], blocks=[3]), [[6, 6], [6, 6], [6, 6], [2, 4]]),
    ],
)
def test_rules_on_six_layers_and_four_blocks(rule: TapRule, expected: list[int]) -> None:
    assert resolve_taps(rule, 6, 4).list_block_layers() == expected


def test_uniform_is_increasing_and_reaches_both_ends() -> None:
    layers = resolve_taps(uniform, 36, 20).list_block_layers()
    assert layers[0] == 1
    assert layers[-1] == 35
    assert layers == sorted(set(layers))


def test_explicit_taps_keep_the_block_order() -> None:
    assert resolve_taps(partial(explicit, layers=(5, 1, 3, 1)), 6, 4).list_block_layers() == [5, 1, 3, 1]


def test_fewer_taps_with_a_stated_assignment() -> None:
    plan = resolve_taps(partial(explicit, layers=(2, 5), assignment=(0, 0, 1, 1)), 6, 4)
    assert plan.list_block_layers() == [2, 2, 5, 5]
    assert plan.layers == (2, 5)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (partial(explicit, layers=(1, 2)), ["2 taps", "4 denoiser blocks"]),
        (partial(explicit, layers=(1, 2, 3, 4, 5)), ["5 taps", "4 denoiser blocks"]),
        (partial(explicit, layers=(1, 2, 3, 7)), ["tap index 7", "6 layers", "0 (embeddings)"]),
        (partial(explicit, layers=(-1, 2, 3, 4)), ["tap index -1"]),
        (explicit, ["taps.layers", "empty"]),
        (partial(explicit, layers=(2, 5), assignment=(0, 1)), ["taps.assignment", "4 positions"]),
        (partial(explicit, layers=(2, 5), assignment=(0, 0, 0, 0)), ["unused"]),
        (partial(explicit, layers=(2, 5), assignment=(0, 1, 2, 0)), ["between 0 and 1"]),
        (partial(single, layer=9), ["tap index 9"]),
        (partial(learned_mix, layers=(1, 9)), ["tap index 9"]),
        (partial(single, depth=9), ["tap rule", "'depth'"]),
        (partial(learned_mix, layers="every"), ["taps.layers", "all", "'every'"]),
        (partial(learned_mix, shared="yes"), ["taps.shared", "'yes'"]),
        (partial(attend, layers=[7]), ["tap index 7"]),
        (partial(bundle, layers=[1, 7]), ["tap index 7"]),
        (partial(bundle, layers=[[1, 2], [3, 4]]), ["4 lists", "same length"]),
        (partial(bundle, layers=[[1, 2], [3, 4], [5], [6]]), ["4 lists", "same length"]),
        (partial(bundle, layers=[[1, 2], 3, 4, 5]), ["4 lists"]),
        (partial(bundle, layers=[[], [], [], []]), ["4 lists"]),
        (partial(bundle, size=7), ["taps.size", "1 to 6", "got 7"]),
        (partial(bundle, size=0), ["taps.size"]),
        (partial(bundle, size=2, layers=[1, 2]), ["not both"]),
        (partial(last_n, blocks=[4]), ["taps.blocks", "0 to 3", "[4]"]),
        (partial(last_n, blocks=[]), ["taps.blocks"]),
        (partial(last_n, blocks=[1, 1]), ["taps.blocks", "different"]),
        (partial(last_n, blocks="12"), ["taps.blocks", "'12'"]),
        (partial(explicit, layers=[1, 2, 3, 4], blocks=[0, 1]), ["4 taps for 2"]),
        (lambda num_layers, num_blocks: [1, 2, 3, 4], ["tap rule", "TapPlan", "[1, 2, 3, 4]"]),
    ],
)
def test_what_doesn_t_fit_is_an_error_that_says_how_many_of_which(rule: TapRule, words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"taps|tap index|tap rule") as error:
        resolve_taps(rule, 6, 4)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_more_blocks_than_states_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"needs 6 taps.*has 5 states"):
        resolve_taps(last_n, 6, 6)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("options", [{}, {"blocks": [0, 3]}])
def test_a_plan_and_its_plain_values_are_the_same(rule: TapRule, options: dict) -> None:
    layers = {"layers": (5, 1) if options else (5, 1, 3, 1)} if rule is explicit else {}
    plan = resolve_taps(partial(rule, **layers, **options), 6, 4)
    assert TapPlan.from_dict(plan.to_dict()) == plan
    assert resolve_taps(plan, 6, 4) == plan


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layers": []}, "taps.layers must be ascending tap indices"),
        ({"layers": [2, 1, 3, 4]}, "taps.layers must be ascending"),
        ({"layers": [1, 2, 3, True]}, "taps.layers must be ascending"),
        ({"layers": "1234"}, "taps.layers must be a list of whole numbers"),
        ({"assignment": [0, 1, 2]}, "taps.assignment must hold 4 positions"),
        ({"assignment": [0, 1, 2, 4]}, "taps.assignment must hold 4 positions in taps.layers, which has 4"),
        ({"mixed": True}, "taps.assignment must hold 0 positions"),
        ({"mixed": True, "layers": [3], "assignment": []}, "taps.mixed needs at least two"),
        ({"mixed": True, "assignment": [[0, 1], [0, 2], 3, 3]}, "must mix the same ones"),
        ({"mixed": True, "assignment": [[0, 0], 1, 1, 1]}, "names a layer twice"),
        ({"mixed": True, "assignment": [[0, 9], 1, 1, 1]}, "taps.assignment must hold 4 positions"),
        ({"assignment": [[0, 1], [2, 3], 0, 1]}, "same number of layers to join"),
        ({"assignment": [[], [], [], []]}, "taps.assignment must hold 4 positions"),
        ({"mix": "attend"}, "taps.mix must be one of per_block, shared, attend"),
        ({"mixed": True, "assignment": [], "mix": ["attend"]}, "taps.mix must be one of"),
        ({"mixed": "no"}, "taps.mixed must be true or false, got 'no'"),
        ({"num_blocks": 0}, "taps.num_blocks must be at least 1, got 0"),
        ({"rule": "last_n"}, "taps must hold layers, assignment, mixed, num_blocks"),
    ],
)
def test_plain_values_that_are_no_plan_are_refused_by_name(change: dict, words: str) -> None:
    values = {"layers": [1, 2, 3, 4], "assignment": [0, 1, 2, 3], "mixed": False, "num_blocks": 4}
    with pytest.raises(ValueError, match=words):
        TapPlan.from_dict({**values, **change})


def test_a_plan_for_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="the taps are for 4 denoiser blocks, and this denoiser has 5"):
        resolve_taps(last_n(6, 4), 6, 5)
    with pytest.raises(ValueError, match="tap index 5 is out of range: the MLLM has 4 layers"):
        resolve_taps(last_n(6, 4), 4, 4)


def test_one_number_is_a_list_of_one() -> None:
    assert resolve_taps(partial(explicit, layers=3), 6, 1) == resolve_taps(partial(explicit, layers=[3]), 6, 1)
    rule = partial(explicit, layers=3, assignment=[0, 0])
    assert resolve_taps(rule, 6, 2).list_block_layers() == [3, 3]


def test_a_rule_that_fails_is_named_without_an_address() -> None:
    def broken(num_layers: int, num_blocks: int, depth: int) -> TapPlan:
        raise TypeError("no depth")

    with pytest.raises(ValueError, match=r"the tap rule \S*broken\(depth=2\) failed for 6 layers and 4 blocks"):
        resolve_taps(partial(broken, depth=2), 6, 4)
