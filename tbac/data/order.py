"""The order of training samples: a pure function of the seed, the shards and a position.

One sequence of draws serves the whole job. Draw n is the same sample whatever the number of processes, workers or
restarts; a step of `global batch` samples takes the next so many draws, and each process its own run of them. Going on
from a position therefore needs no reading, and another world size neither repeats nor loses a sample.

- Mixture: draw n picks a source by weight, from a counter-based generator.
- Passes: each source is gone through again and again. For each pass its shards are permuted, and the samples are
  permuted within consecutive windows of `shuffle_buffer` samples, so that few shards are in use at a time.
- Buckets: draws wait, by the bucket of their sample, until there are enough for a batch of one size. What waits is part
  of the position, and every process works it out for all of them, so none has fewer batches than another.

Why this is written here: no library that this repository uses has a sampler whose sequence is a function of a position.
torch's DistributedSampler shares out one epoch by the number of processes, and WebDataset shuffles what a process
happens to have read; neither can go on exactly, or with another number of processes.
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
    """One place in the sequence.

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
        draws: its samples.
        after: state of the sequence after the batches of all processes: `position`, samples taken; `drawn`, those of
            each source; with buckets `waiting`, the draws that wait, as (position, source, number within the source).
        size: (height, width) of its targets in pixels; None where all batches have the same.
    """

    draws: list[Draw]
    after: Mapping[str, Any]
    size: tuple[int, int] | None = None


class BucketOf(Protocol):
    """Says the bucket of a draw, and the (height, width) of each bucket."""

    @property
    def sizes(self) -> Sequence[tuple[int, int]]: ...

    def __call__(self, draw: Draw) -> int: ...


def philox(*names: object) -> np.random.Generator:
    """A generator that is a function of `names` alone."""
    key = int.from_bytes(sha256("/".join(map(str, names)).encode()).digest()[:16], "big")
    return np.random.Generator(np.random.Philox(key=key))


class SourceOrder:
    """The order of one source: item n is (pass, shard, sample).

    Args:
        sizes: samples of each shard.
        name: seeds this order, together with `seed`.
        seed: of the order.
        window: samples to shuffle among; 0 keeps the order within shards.
    """

    def __init__(self, sizes: Sequence[int], name: object, seed: int, window: int) -> None:
        self.sizes, self.name, self.seed, self.window = list(sizes), name, seed, window
        self.total = sum(self.sizes)
        self._pass: tuple[int, np.ndarray, list[int]] | None = None
        self._window: tuple[tuple[int, int], np.ndarray] | None = None

    def __getitem__(self, n: int) -> tuple[int, int, int]:
        passes, offset = divmod(n, self.total)
        if self._pass is None or self._pass[0] != passes:
            shards = philox("shards", self.seed, self.name, passes).permutation(len(self.sizes))
            ends = list(accumulate(self.sizes[i] for i in shards))
            self._pass = (passes, shards, ends)
        _, shards, ends = self._pass
        if self.window > 1:
            window, inner = divmod(offset, self.window)
            if self._window is None or self._window[0] != (passes, window):
                size = min(self.window, self.total - window * self.window)
                permuted = philox("window", self.seed, self.name, passes, window).permutation(size)
                self._window = ((passes, window), permuted)
            offset = window * self.window + int(self._window[1][inner])
        place = bisect_right(ends, offset)
        return passes, int(shards[place]), offset - (ends[place - 1] if place else 0)


@dataclass(frozen=True)
class Mixture:
    """What decides the sequence of draws.

    Args:
        sizes: per source, the samples of each shard.
        weights: of the sources.
        seed: of the sequence.
        window: samples to shuffle among, per source (`shuffle_buffer`).

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
        state: where to go on, from `BatchPlan.after`; None is the beginning.
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

    def sources(self, start: int, stop: int) -> np.ndarray:
        """The source of each draw from `start` to `stop`."""
        if len(self.orders) == 1:
            return np.zeros(stop - start, int)
        blocks = range(start // BLOCK, -(-stop // BLOCK))
        drawn = np.concatenate([philox("mixture", self.seed, b).random(BLOCK) for b in blocks])
        chosen = np.searchsorted(self.bounds[:-1], drawn, side="right")
        return chosen[start - blocks[0] * BLOCK : stop - blocks[0] * BLOCK]

    def __iter__(self) -> Iterator[BatchPlan]:
        position, drawn = self.state["position"], np.array(self.state["drawn"])
        step, first = self.batch_size * self.world_size, self.rank * self.batch_size
        while True:
            # (draw, source): how many of each source this step has drawn up to and with each draw.
            sources = self.sources(position, position + step)
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

    Batches are filled in the order of the draws, whatever the number of processes: that, and the size of a batch, are
    all that decides them.

    Args:
        bucket_of: the bucket of each draw.
        mixture: decides the sequence.
        batch_size: of each process.
        rank: of this process.
        world_size: number of processes.
        state: where to go on, from `BatchPlan.after`; None is the beginning.
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
        upcoming = self._sources_from(position)
        while True:
            # Going on with a smaller batch size, some piles hold whole batches already.
            batches = self._take_whole_batches(piles)
            # Draw until every process has a batch; all processes work out the batches of all.
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
            # What still waits belongs to the position: whoever goes on from it begins with these draws.
            taken += self.batch_size * self.world_size
            waiting = sorted([draw.position, draw.source, n] for pile in piles.values() for draw, n in pile)
            counts = list(drawn)
            for _, source, _ in waiting:
                counts[source] -= 1
            bucket, pile = batches[self.rank]
            after = {"position": taken, "drawn": counts, "waiting": waiting}
            yield BatchPlan([draw for draw, _ in pile], after, self.bucket_of.sizes[bucket])

    def _restore_piles(self) -> tuple[dict[int, Pile], list[int]]:
        """The draws that wait, by bucket, and how many of each source were drawn, those that wait counted."""
        piles: dict[int, Pile] = {}
        drawn = list(self.state["drawn"])
        for position, source, n in self.state.get("waiting", ()):
            draw = Draw(position, source, *self.orders[source][n])
            piles.setdefault(self.bucket_of(draw), []).append((draw, n))
            drawn[source] += 1
        return piles, drawn

    def _take_whole_batches(self, piles: dict[int, Pile]) -> list[tuple[int, Pile]]:
        """Take batches, at most one for each process, out of piles that hold enough for them."""
        batches: list[tuple[int, Pile]] = []
        for bucket, pile in piles.items():
            while len(pile) >= self.batch_size and len(batches) < self.world_size:
                batches.append((bucket, pile[: self.batch_size]))
                del pile[: self.batch_size]
        return batches

    def _sources_from(self, position: int) -> Iterator[int]:
        """The sources of all draws from a position on."""
        while True:
            yield from self.sources(position, position + BLOCK).tolist()
            position += BLOCK


class ValidationOrder(Sampler[BatchPlan]):
    """The first samples of all sources in the order of the shards, each process its own; one pass.

    All processes have equally many samples, so none waits for another: up to `world_size - 1` samples are left out.
    With buckets they have equally many batches instead, of which some are smaller.

    Args:
        sizes: per source, the samples of each shard.
        count: samples of all processes together, at most.
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
        # All processes take part equally, so none waits for another in what they compute together.
        draws = draws[: len(draws) // world_size * world_size]
        if bucket_of is None:
            own = draws[rank::world_size]
            self.plans = [BatchPlan(batch, {}) for batch in _cut(own, batch_size)]
            return
        # A batch is of one bucket.
        piles: dict[int, list[Draw]] = {}
        for draw in draws:
            piles.setdefault(bucket_of(draw), []).append(draw)
        batches = [(bucket, batch) for bucket, pile in sorted(piles.items()) for batch in _cut(pile, batch_size)]
        # The largest batches are halved until every process can have equally many.
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


def _cut(draws: list[Draw], size: int) -> list[list[Draw]]:
    """Runs of `size` draws; the last one may be shorter."""
    return [draws[i : i + size] for i in range(0, len(draws), size)]
