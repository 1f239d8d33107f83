"""The order of training samples: a pure function of the seed, the shards and a position.

One sequence of draws serves the whole job. Draw n is the same sample whatever the number of processes, workers or
restarts. Each step takes the next draws for the batches of all processes, and each process reads its part of them.
Resuming at a position therefore needs no reading, and another number of processes neither repeats nor loses a sample.

- Mixture: draw n picks a source by weight, from a counter-based generator.
- Passes: each source is read again and again. For each pass its shards are permuted, and the samples are permuted
  within consecutive windows of `shuffle_buffer` samples, so that few shards are in use at a time.
- Buckets: draws wait, sorted by the bucket of their sample, until there are enough for a batch of one size. The draws
  that wait are part of the position. Every process computes the batches of all processes, so all have equally many.

Why this is written here: no library that this repository uses has a sampler whose sequence is a function of a position.
torch's DistributedSampler divides one epoch by the number of processes, and WebDataset shuffles what a process happens
to have read. Neither can resume exactly, or with another number of processes.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import accumulate, islice
from typing import Any, Protocol

import numpy as np
from torch.utils.data import Sampler

BLOCK = 4096  # draws whose sources are chosen at a time


@dataclass(frozen=True)
class Draw:
    """One place in the sequence, and the sample that stands there.

    Attributes:
        position: number of the draw, from 0.
        source: index of the source.
        passes: complete passes over the source before this one.
        shard: index of the shard in the order of names.
        sample: index of the sample in the shard.
    """

    position: int
    source: int
    passes: int
    shard: int
    sample: int


@dataclass(frozen=True)
class BatchPlan:
    """One batch of one process.

    Attributes:
        draws: one for each sample.
        after: state of the sequence after this step of all processes: `position`, how many samples were taken; `drawn`,
            how many of each source; and with buckets `waiting`, the draws that wait, each as (position, source, number
            within the source).
        size: (height, width) of its targets in pixels; None where all batches have the same size.
    """

    draws: list[Draw]
    after: Mapping[str, Any]
    size: tuple[int, int] | None = None


class BucketOf(Protocol):
    """Tells the bucket of a draw, and the (height, width) of each bucket."""

    @property
    def sizes(self) -> Sequence[tuple[int, int]]: ...

    def __call__(self, draw: Draw) -> int: ...


def make_generator(*names: object) -> np.random.Generator:
    """Make a random generator that depends on `names` alone."""
    key = int.from_bytes(sha256("/".join(map(str, names)).encode()).digest()[:16], "big")
    return np.random.Generator(np.random.Philox(key=key))


class SourceOrder:
    """The order of one source: item n is (pass, shard, sample).

    Args:
        sizes: how many samples each shard has.
        name: tells this order from those of other sources with the same seed.
        seed: of the order.
        window: how many samples are shuffled among each other; 0 keeps the order within shards.
    """

    def __init__(self, sizes: Sequence[int], name: object, seed: int, window: int) -> None:
        self.sizes, self.name, self.seed, self.window = list(sizes), name, seed, window
        self.total = sum(self.sizes)
        self._pass: tuple[int, np.ndarray, list[int]] | None = None
        self._window: tuple[tuple[int, int], np.ndarray] | None = None

    def __getitem__(self, n: int) -> tuple[int, int, int]:
        passes, offset = divmod(n, self.total)
        # The permutation of the latest pass is kept, and so is that of the latest window: draws come in order.
        if self._pass is None or self._pass[0] != passes:
            shards = make_generator("shards", self.seed, self.name, passes).permutation(len(self.sizes))
            ends = list(accumulate(self.sizes[i] for i in shards))
            self._pass = (passes, shards, ends)
        _, shards, ends = self._pass
        if self.window > 1:
            window, inner = divmod(offset, self.window)
            if self._window is None or self._window[0] != (passes, window):
                size = min(self.window, self.total - window * self.window)
                permuted = make_generator("window", self.seed, self.name, passes, window).permutation(size)
                self._window = ((passes, window), permuted)
            offset = window * self.window + int(self._window[1][inner])
        place = bisect_right(ends, offset)
        start = ends[place - 1] if place else 0
        return passes, int(shards[place]), offset - start


@dataclass(frozen=True)
class Mixture:
    """Everything that decides the sequence of draws.

    Args:
        sizes: for each source, how many samples each shard has.
        weights: of the sources.
        seed: of the sequence.
        window: how many samples of a source are shuffled among each other (`shuffle_buffer`).

    Raises:
        ValueError: when sources and weights aren't equally many.
    """

    sizes: Sequence[Sequence[int]]
    weights: Sequence[float]
    seed: int
    window: int

    def __post_init__(self) -> None:
        if len(self.sizes) != len(self.weights):
            raise ValueError(f"{len(self.sizes)} sources have {len(self.weights)} weights")


class TrainingOrder(Sampler[BatchPlan]):
    """Endless batch plans of one process.

    Args:
        mixture: decides the sequence.
        batch_size: of each process.
        rank: of this process.
        world_size: number of processes.
        state: where to resume, from `BatchPlan.after`; None is the beginning.
    """

    def __init__(
        self,
        mixture: Mixture,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.orders = [SourceOrder(s, i, mixture.seed, mixture.window) for i, s in enumerate(mixture.sizes)]
        self.bounds = np.cumsum(np.asarray(mixture.weights, float) / sum(mixture.weights))
        self.seed, self.batch_size, self.rank, self.world_size = mixture.seed, batch_size, rank, world_size
        self.state: Mapping[str, Any] = state or {"position": 0, "drawn": [0] * len(self.orders)}

    def choose_sources(self, start: int, stop: int) -> np.ndarray:
        """Choose the source of each draw from `start` to `stop`; returns their indices."""
        if len(self.orders) == 1:
            return np.zeros(stop - start, int)
        # Random numbers come in whole blocks, each with a generator of its own, so any range can be computed directly.
        blocks = range(start // BLOCK, -(-stop // BLOCK))
        drawn = np.concatenate([make_generator("mixture", self.seed, b).random(BLOCK) for b in blocks])
        chosen = np.searchsorted(self.bounds[:-1], drawn, side="right")
        return chosen[start - blocks[0] * BLOCK : stop - blocks[0] * BLOCK]

    def __iter__(self) -> Iterator[BatchPlan]:
        position, drawn = self.state["position"], np.array(self.state["drawn"])
        step, first = self.batch_size * self.world_size, self.rank * self.batch_size
        while True:
            # (draw, source): how many of each source this step has drawn, up to and including each draw.
            sources = self.choose_sources(position, position + step)
            counted = np.cumsum(sources[:, None] == np.arange(len(drawn)), axis=0)
            draws = []
            for i in range(first, first + self.batch_size):
                source = int(sources[i])
                n = int(drawn[source] + counted[i, source]) - 1
                draws.append(Draw(position + i, source, *self.orders[source][n]))
            position, drawn = position + step, drawn + counted[-1]
            yield BatchPlan(draws, {"position": position, "drawn": drawn.tolist()})


Pile = list[tuple[Draw, int]]  # draws of one bucket that wait, each with its number within its source


class BucketedOrder(TrainingOrder):
    """Endless batch plans of one process, each of one bucket.

    Batches are filled in the order of the draws. The draws and the batch size alone decide them, not the number of
    processes.

    Args:
        bucket_of: the bucket of each draw.
        mixture: decides the sequence.
        batch_size: of each process.
        rank: of this process.
        world_size: number of processes.
        state: where to resume, from `BatchPlan.after`; None is the beginning.
    """

    def __init__(
        self,
        bucket_of: BucketOf,
        mixture: Mixture,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(mixture, batch_size, rank, world_size, state)
        self.bucket_of = bucket_of

    def __iter__(self) -> Iterator[BatchPlan]:
        piles, drawn = self._restore_piles()
        taken = self.state["position"]
        position = taken + sum(map(len, piles.values()))
        upcoming = self._iterate_sources(position)
        while True:
            # After resuming with a smaller batch size, some piles hold whole batches already.
            batches = self._take_whole_batches(piles)
            # Draw until there is a batch for every process; this process then takes the one of its rank.
            while len(batches) < self.world_size:
                source = next(upcoming)
                draw = Draw(position, source, *self.orders[source][drawn[source]])
                bucket = self.bucket_of(draw)
                pile = piles.setdefault(bucket, [])
                pile.append((draw, drawn[source]))
                drawn[source] += 1
                position += 1
                if len(pile) == self.batch_size:
                    batches.append((bucket, pile.copy()))
                    pile.clear()
            # The draws that still wait belong to the state, since resuming has to begin with them.
            taken += self.batch_size * self.world_size
            waiting = sorted([draw.position, draw.source, n] for pile in piles.values() for draw, n in pile)
            counts = list(drawn)
            for _, source, _ in waiting:
                counts[source] -= 1
            bucket, pile = batches[self.rank]
            after = {"position": taken, "drawn": counts, "waiting": waiting}
            yield BatchPlan([draw for draw, _ in pile], after, self.bucket_of.sizes[bucket])

    def _restore_piles(self) -> tuple[dict[int, Pile], list[int]]:
        """Sort the draws that wait into piles by bucket; also returns how many of each source were drawn so far."""
        piles: dict[int, Pile] = {}
        drawn = list(self.state["drawn"])
        for position, source, n in self.state.get("waiting", ()):
            draw = Draw(position, source, *self.orders[source][n])
            piles.setdefault(self.bucket_of(draw), []).append((draw, n))
            drawn[source] += 1
        return piles, drawn

    def _take_whole_batches(self, piles: dict[int, Pile]) -> list[tuple[int, Pile]]:
        """Take batches out of the piles that hold enough for one, at most one batch for each process."""
        batches: list[tuple[int, Pile]] = []
        for bucket, pile in piles.items():
            while len(pile) >= self.batch_size and len(batches) < self.world_size:
                batches.append((bucket, pile[: self.batch_size]))
                del pile[: self.batch_size]
        return batches

    def _iterate_sources(self, position: int) -> Iterator[int]:
        """Yield the sources of all draws from a position on, without end."""
        while True:
            yield from self.choose_sources(position, position + BLOCK).tolist()
            position += BLOCK


class ValidationOrder(Sampler[BatchPlan]):
    """One pass over the first samples of all sources, in the order of the shards, divided among the processes.

    All processes have equally many samples, so none waits for another; up to `world_size - 1` samples are left out.
    With buckets they have equally many batches instead, of which some are smaller.

    Args:
        sizes: for each source, how many samples each shard has.
        count: the most samples that all processes take together.
        batch_size: of each process.
        rank: of this process.
        world_size: number of processes.
        bucket_of: the bucket of each draw, for batches of one bucket.
    """

    def __init__(
        self,
        sizes: Sequence[Sequence[int]],
        count: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        bucket_of: BucketOf | None = None,
    ) -> None:
        places = ((k, i, n) for k, shards in enumerate(sizes) for i, size in enumerate(shards) for n in range(size))
        draws = [Draw(j, k, 0, i, n) for j, (k, i, n) in enumerate(islice(places, count))]
        # With equally many samples for each, no process waits for another in what they compute together.
        draws = draws[: len(draws) // world_size * world_size]
        if bucket_of is None:
            draws_of_rank = draws[rank::world_size]
            self.plans = [BatchPlan(batch, {}) for batch in _cut_into_batches(draws_of_rank, batch_size)]
            return
        # All pictures of a batch have one size, so a batch never mixes buckets.
        piles: dict[int, list[Draw]] = {}
        for draw in draws:
            piles.setdefault(bucket_of(draw), []).append(draw)
        batches = [
            (bucket, batch) for bucket, pile in sorted(piles.items()) for batch in _cut_into_batches(pile, batch_size)
        ]
        # With equally many batches for each, no process waits either; halving the largest ones gives the number needed.
        while len(batches) % world_size:
            bucket, largest = max(batches, key=lambda batch: len(batch[1]))
            batches.remove((bucket, largest))
            half = len(largest) // 2
            batches += [(bucket, largest[:half]), (bucket, largest[half:])]
        self.plans = [BatchPlan(batch, {}, bucket_of.sizes[bucket]) for bucket, batch in batches[rank::world_size]]

    def __len__(self) -> int:
        return len(self.plans)

    def __iter__(self) -> Iterator[BatchPlan]:
        return iter(self.plans)


def _cut_into_batches(draws: list[Draw], size: int) -> list[list[Draw]]:
    """Cut a list into batches of `size` draws; the last one may be smaller."""
    return [draws[i : i + size] for i in range(0, len(draws), size)]
