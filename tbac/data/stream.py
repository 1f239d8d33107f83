"""Streaming samples: shards split over readers, shuffled, mixed; corrupt samples skipped and counted.

The order is a function of the seed, the shards and the reader (rank and worker). Every reader opens only its own
shards. What is dropped from a sample's condition depends on seed, pass and key alone, so not on the world size.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import webdataset as wds
from torch.utils.data import IterableDataset, get_worker_info

from tbac.data.decoding import CorruptSampleError, decode_sample
from tbac.data.shards import DataError, Source, ends_properly, list_shards
from tbac.data.transforms import ConditionDropout
from tbac.types import Sample

log = logging.getLogger(__name__)


@dataclass
class Tally:
    """Samples seen and refused by one reader."""

    seen: int = 0
    bad: int = 0


class ShardStream(IterableDataset):
    """An endless (or one-pass) stream of decoded samples.

    Args:
        sources: mixture; each draw picks a source by weight.
        seed: of shard order, shuffle buffer, mixture and dropout.
        shuffle_buffer: samples held back per source to shuffle among; 0 keeps the order of the tars.
        dropout: condition dropout; None keeps everything.
        rank: of this process.
        world_size: number of processes.
        repeat: go on for ever (training); False makes one pass in a fixed order (validation).
        use_latents: take cached latents instead of target images where there are any.
        max_bad_share: greatest share of refused samples that is tolerated.
        min_seen: samples to see before the share is judged (it is always judged at the end of a pass).
        check_manifest: compare shards with their manifest at the start; without one, whether they end as tars do.

    Raises:
        DataError: for absent, empty or altered sources, too few shards for the readers, or too many bad samples.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        seed: int,
        shuffle_buffer: int = 1000,
        dropout: ConditionDropout | None = None,
        rank: int = 0,
        world_size: int = 1,
        repeat: bool = True,
        use_latents: bool = True,
        max_bad_share: float = 0.05,
        min_seen: int = 200,
        check_manifest: bool = True,
    ) -> None:
        if not sources:
            raise DataError("stage.sources is empty; name at least one folder of shards")
        if not 0 <= max_bad_share <= 1:
            raise ValueError(f"data.max_bad_share must be between 0 and 1, got {max_bad_share}")
        self.sources = list(sources)
        self.shards = [list_shards(source, check_manifest) for source in sources]
        self.seed, self.shuffle_buffer, self.dropout = seed, shuffle_buffer, dropout
        self.rank, self.world_size, self.repeat = rank, world_size, repeat
        self.use_latents, self.max_bad_share, self.min_seen = use_latents, max_bad_share, min_seen

    def check_readers(self, num_workers: int) -> None:
        """Raise DataError when a source has fewer shards than readers, who then couldn't read disjoint parts."""
        readers = self.world_size * max(1, num_workers)
        for source, shards in zip(self.sources, self.shards, strict=True):
            if len(shards) < readers:
                raise DataError(
                    f"{source.path} has {len(shards)} {source.split} shards for {readers} readers "
                    f"({self.world_size} processes x {max(1, num_workers)} workers); use fewer data.num_workers or "
                    "write more shards"
                )

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        workers = worker.num_workers if worker else 1
        if self.repeat:
            self.check_readers(workers)
        reader = self.rank * workers + (worker.id if worker else 0)
        readers = self.world_size * workers
        tally = Tally()
        streams = [self._read_source(i, reader, readers, tally) for i in range(len(self.sources))]
        if not self.repeat:
            for stream in streams:
                yield from stream
            return
        weights = [s.weight for s in self.sources]
        mixture = Random(f"mixture/{self.seed}/{reader}")
        while True:
            yield next(mixture.choices(streams, weights)[0])

    def _read_source(self, index: int, reader: int, readers: int, tally: Tally) -> Iterator[Sample]:
        """Decoded samples of this reader's shards of one source, shuffled within the buffer."""
        samples = self._decode_passes(index, reader, readers, tally)
        if not self.repeat or self.shuffle_buffer < 2:
            return samples
        rng = Random(f"buffer/{self.seed}/{index}/{reader}")
        initial = min(self.shuffle_buffer, 100)
        return wds.filters._shuffle(samples, bufsize=self.shuffle_buffer, initial=initial, rng=rng)

    def _decode_passes(self, index: int, reader: int, readers: int, tally: Tally) -> Iterator[Sample]:
        passes = 0
        while True:
            order = list(self.shards[index])
            if self.repeat:
                Random(f"shards/{self.seed}/{index}/{passes}").shuffle(order)
            good_before = tally.seen - tally.bad
            # Training readers own shards; a validation pass has few shards, so its readers take samples in turn.
            for raw in self._raw_samples(order[reader::readers] if self.repeat else order, tally):
                tally.seen += 1
                if not self.repeat and tally.seen % readers != reader:
                    continue
                try:
                    sample = decode_sample(raw, self.use_latents)
                except CorruptSampleError as error:
                    self._refuse(tally, f"sample {raw['__key__']} of {raw['__url__']}", str(error))
                    continue
                if self.dropout is not None:
                    sample = self.dropout(sample, Random(f"dropout/{self.seed}/{index}/{passes}/{sample.key}"))
                yield sample
            passes += 1
            self._judge(tally)
            if tally.seen - tally.bad == good_before:
                raise DataError(f"{self.sources[index].path} gave no usable sample in a whole pass")
            if not self.repeat:
                return

    def _raw_samples(self, shards: Sequence[Path], tally: Tally) -> Iterator[dict[str, Any]]:
        """Undecoded samples; a tar that breaks off loses its last sample and is counted as one bad sample."""
        for shard in shards:
            broken: list[BaseException] = []

            def note(error: BaseException, broken: list[BaseException] = broken) -> bool:
                broken.append(error)
                return True

            previous: dict[str, Any] | None = None
            opened = wds.tariterators.url_opener([{"url": str(shard)}], handler=note)
            files = wds.tariterators.tar_file_expander(opened, handler=note)
            for raw in wds.tariterators.group_by_keys(files, handler=note):
                if previous is not None:
                    yield previous
                previous = raw
            if not broken and not ends_properly(shard):
                broken.append(EOFError("it has no end mark"))
            if broken:
                tally.seen += 1
                self._refuse(tally, f"the end of {shard}", f"the tar breaks off: {broken[0]}")
            elif previous is not None:
                yield previous

    def _refuse(self, tally: Tally, what: str, why: str) -> None:
        tally.bad += 1
        log.warning("skipped %s: %s (%d bad of %d)", what, why.split("\n")[0], tally.bad, tally.seen)
        if tally.seen >= self.min_seen:
            self._judge(tally)

    def _judge(self, tally: Tally) -> None:
        if tally.bad > self.max_bad_share * tally.seen:
            raise DataError(
                f"{tally.bad} of {tally.seen} samples were corrupt or incomplete, more than "
                f"data.max_bad_share={self.max_bad_share}; the log names each of them"
            )
