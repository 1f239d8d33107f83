"""The order of training: every sample once a pass, one sequence whatever the world size, going on without reading."""

import itertools
from collections import Counter
from typing import Any

import pytest

from tbac.data.order import BLOCK, Draw, Mixture, TrainingOrder, ValidationOrder

SIZES = [[7, 5, 9, 4], [3, 8]]
TOTAL = [25, 11]


def order_of(rank: int = 0, world_size: int = 1, batch_size: int = 6, state: Any = None, **options) -> TrainingOrder:
    mixture = Mixture(**{"sizes": SIZES, "weights": [3.0, 1.0], "seed": 5, "window": 10} | options)
    return TrainingOrder(mixture, batch_size, rank, world_size, state)


def draws(order: TrainingOrder, count: int) -> list[Draw]:
    flat = itertools.chain.from_iterable(plan.draws for plan in order)
    return list(itertools.islice(flat, count))


def places(found: list[Draw], source: int) -> list[tuple[int, int]]:
    return [(d.shard, d.sample) for d in found if d.source == source]


@pytest.mark.parametrize("window", [0, 3, 10, 1000])
def test_each_pass_holds_every_sample_once(window: int) -> None:
    found = draws(order_of(window=window), 2000)
    for source, total in enumerate(TOTAL):
        own = places(found, source)
        everything = {(i, n) for i, size in enumerate(SIZES[source]) for n in range(size)}
        passes = [own[i : i + total] for i in range(0, len(own) - total, total)]
        assert len(passes) > 10
        assert all(set(p) == everything for p in passes)
        assert len({tuple(p) for p in passes}) == len(passes) or window == 0  # no pass repeats another's order


def test_the_passes_are_counted() -> None:
    found = [d for d in draws(order_of(), 2000) if d.source == 1]
    assert [d.passes for d in found] == [i // TOTAL[1] for i in range(len(found))]


def test_shuffling_stays_within_its_window() -> None:
    order = order_of(sizes=[[50] * 8], weights=[1.0], window=100)
    for first in range(0, 400, 100):
        assert len({d.shard for d in draws(order, 400)[first : first + 100]}) == 2  # a window holds two whole shards
    assert places(draws(order, 400), 0) != sorted(places(draws(order, 400), 0))


def test_without_a_window_only_the_shards_are_permuted() -> None:
    found = places(draws(order_of(sizes=[[4] * 5], weights=[1.0], window=0), 20), 0)
    assert [n for _, n in found] == [0, 1, 2, 3] * 5


def test_the_seed_decides() -> None:
    first, again, other = (draws(order_of(seed=s), 200) for s in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize(("world_size", "batch_size"), [(2, 3), (3, 2), (6, 1)])
def test_processes_share_out_the_batches_of_one(world_size: int, batch_size: int) -> None:
    alone = list(itertools.islice(order_of(batch_size=world_size * batch_size), 50))
    parts = [list(itertools.islice(order_of(r, world_size, batch_size), 50)) for r in range(world_size)]
    for step, plan in enumerate(alone):
        assert list(itertools.chain.from_iterable(p[step].draws for p in parts)) == plan.draws
        assert all(p[step].after == plan.after for p in parts)


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 6), (4, 1), (2, 10)])
def test_going_on_anywhere_neither_repeats_nor_loses(world_size: int, batch_size: int) -> None:
    whole = draws(order_of(), 1200)
    for stop in (1, 7, 99):
        state = next(itertools.islice(order_of(), stop - 1, None)).after
        parts = [
            list(itertools.islice(order_of(r, world_size, batch_size, state=state), 20)) for r in range(world_size)
        ]
        rest = [d for step in zip(*parts, strict=True) for plan in step for d in plan.draws]
        assert whole[: stop * 6] + rest == whole[: stop * 6 + len(rest)]


def test_the_mixture_follows_the_weights_also_across_blocks() -> None:
    found = Counter(d.source for d in draws(order_of(batch_size=512), 4 * BLOCK))
    # Binomial: standard deviation 0.0034 of the share.
    assert abs(found[0] / sum(found.values()) - 0.75) < 0.014
    middle = order_of().choose_sources(BLOCK - 3, BLOCK + 3)
    assert middle.tolist() == [
        *order_of().choose_sources(BLOCK - 3, BLOCK),
        *order_of().choose_sources(BLOCK, BLOCK + 3),
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_validation_is_one_pass_in_order_and_even(world_size: int) -> None:
    orders = [ValidationOrder(SIZES, 1000, 4, rank, world_size) for rank in range(world_size)]
    parts = [[d for plan in order for d in plan.draws] for order in orders]
    assert {len(order) for order in orders} == {len(orders[0])}
    assert {len(part) for part in parts} == {36 // world_size}
    together = [d for step in zip(*parts, strict=True) for d in step]
    everything = [(k, i, n) for k, shards in enumerate(SIZES) for i, size in enumerate(shards) for n in range(size)]
    assert [(d.source, d.shard, d.sample) for d in together] == everything[: 36 // world_size * world_size]


def test_validation_is_bounded() -> None:
    assert sum(len(plan.draws) for plan in ValidationOrder(SIZES, 10, 4)) == 10
