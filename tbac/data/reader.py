"""From a batch plan to a batch: reading, decoding, dropout, collation; corrupt samples replaced and counted.

Why this is written here: no library that this repository uses has an indexed, exactly resumable reader of tars.
WebDataset's pipeline drops a corrupt sample, after which every later batch holds other samples. Here a plan says which
samples a batch holds, and its position decides what replaces a corrupt one, so a batch is the same in every run.
"""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from torch import Tensor
from torch.utils.data import Dataset

from tbac.data.decoding import CorruptSampleError, decode_sample
from tbac.data.order import BatchPlan, Draw
from tbac.data.shards import DataError
from tbac.data.tars import TarReader
from tbac.data.transforms import ConditionDropout
from tbac.types import Batch, Sample

log = logging.getLogger(__name__)
ATTEMPTS = 1000  # at finding another sample in the place of a corrupt one


class NoSubstituteError(DataError):
    """A corrupt sample whose place no other of its bucket could take."""


@dataclass
class Tally:
    """Samples seen and refused by one reader, the latter also by kind."""

    seen: int = 0
    bad: int = 0
    kinds: Counter[str] = field(default_factory=Counter)


def check_bad_share(share: float) -> None:
    """Raise ValueError for a tolerated share of refused samples that isn't one."""
    if not 0 <= share <= 1:
        raise ValueError(f"data.max_bad_share must be between 0 and 1, got {share}")


def _alike(latents: Tensor, size: tuple[int, int]) -> bool:
    """Whether latents (channel, height, width) have the aspect ratio of a size."""
    return latents.shape[1] * size[1] == latents.shape[2] * size[0]


@dataclass(eq=False)
class ShardReader(Dataset[Batch]):
    """Batches by plan.

    What a batch holds depends on its plan alone. The place of a corrupt sample is taken by another sample of the same
    source and pass, which its position decides.

    Args:
        shards: per source, its tars.
        sizes: per source, the samples of each tar.
        seed: of dropout and of replacements.
        collate: samples and the (height, width) of their targets to a batch.
        size: (height, width) of targets in pixels, for plans that name none.
        dropout: condition dropout; None keeps everything.
        use_latents: take cached latents instead of target images where there are any.
        max_bad_share: greatest share of refused samples that is tolerated.
        min_seen: the share is judged over multiples of this many samples, or of a pass where that is less.
        reducing_gap: JPEGs much larger than needed are decoded at a half, a quarter or an eighth of their size, which
            stays at least this many times what is kept; None decodes in full.

    Attributes:
        tally: samples seen and refused.
        tars: what reads them.
    """

    shards: Sequence[Sequence[Path]]
    sizes: Sequence[Sequence[int]]
    seed: int
    collate: Callable[[Sequence[Sample], tuple[int, int]], Batch]
    size: tuple[int, int]
    dropout: ConditionDropout | None = None
    use_latents: bool = True
    max_bad_share: float = 0.05
    min_seen: int = 200
    reducing_gap: float | None = None
    tally: Tally = field(default_factory=Tally, init=False)
    tars: TarReader = field(default_factory=TarReader, init=False)

    def __post_init__(self) -> None:
        check_bad_share(self.max_bad_share)
        self.min_seen = min(self.min_seen, sum(map(sum, self.sizes)))

    def __getitem__(self, plan: BatchPlan) -> Batch:
        batch = self.collate(self.samples(plan), plan.size or self.size)
        batch.positions = [draw.position for draw in plan.draws]
        batch.after = dict(plan.after)
        return batch

    def samples(self, plan: BatchPlan) -> list[Sample]:
        """The samples of a batch. A corrupt one whose bucket is too rare for a substitute is replaced by the others.

        Raises:
            DataError: as `sample`.
        """
        found: list[Sample] = []
        for draw in plan.draws:
            try:
                found.append(self.sample(draw, plan.size))
            except NoSubstituteError as error:
                rare = error
        if not found:
            raise rare
        return [found[i % len(found)] for i in range(len(plan.draws))]

    def sample(self, draw: Draw, bucket: tuple[int, int] | None = None) -> Sample:
        """The sample of a draw, or its replacement.

        Args:
            draw: which.
            bucket: (height, width) that its target is cropped to; cached latents of another aspect ratio are passed by.

        Raises:
            DataError: when a shard is gone, too many samples are corrupt, or none of a source can be used.
        """
        sizes = self.sizes[draw.source]
        substitutes = Random(f"substitute/{self.seed}/{draw.position}")
        shard, index = draw.shard, draw.sample
        for _ in range(ATTEMPTS):
            path = self.shards[draw.source][shard]
            self.tally.seen += 1
            try:
                sample = self._decode(path, index, bucket or self.size)
                usable = bucket is None or sample.latents is None or _alike(sample.latents, bucket)
            except CorruptSampleError as error:
                self._refuse(f"sample {index} of {path}", error)
                usable = False
            if usable:
                return self._drop_conditions(sample, draw)
            # Any sample of the source may take the place: the position decides which, so every run takes the same.
            shard = substitutes.choices(range(len(sizes)), sizes)[0]
            index = substitutes.randrange(sizes[shard])
        folder = self.shards[draw.source][0].parent
        kind = NoSubstituteError if bucket else DataError
        raise kind(f"{folder} gave no usable sample in {ATTEMPTS} attempts")

    def _drop_conditions(self, sample: Sample, draw: Draw) -> Sample:
        """The sample after dropout, which its key and pass decide."""
        if self.dropout is None:
            return sample
        return self.dropout(sample, Random(f"dropout/{self.seed}/{draw.source}/{draw.passes}/{sample.key}"))

    def _decode(self, path: Path, index: int, size: tuple[int, int]) -> Sample:
        try:
            raw = self.tars.read(path, index)
        except FileNotFoundError:
            raise DataError(
                f"shard {path} was there when training began and is gone; put it back and start again to go on from "
                "the newest checkpoint"
            ) from None
        except OSError as error:
            raise CorruptSampleError(
                f"the shard can't be read ({error.strerror or error})", "unreadable shard"
            ) from None
        except IndexError:
            reason = self.tars.index(path).broken or "its manifest says more"
            raise CorruptSampleError(f"the shard holds fewer samples ({reason})", "unreadable shard") from None
        try:
            return decode_sample(raw, self.use_latents, size, self.reducing_gap)
        except CorruptSampleError as error:
            raise CorruptSampleError(f"{raw['__key__']!s}: {error}", error.kind) from None

    def _refuse(self, what: str, why: CorruptSampleError) -> None:
        tally = self.tally
        tally.bad += 1
        tally.kinds[why.kind] += 1
        log.warning("skipped %s: %s (%d bad of %d)", what, str(why).split("\n")[0], tally.bad, tally.seen)
        judged = -(-tally.seen // self.min_seen) * self.min_seen  # early on a few bad ones say little
        if tally.bad > self.max_bad_share * judged:
            raise DataError(
                f"{tally.bad} of {tally.seen} samples were corrupt or incomplete, more than "
                f"data.max_bad_share={self.max_bad_share}; the log names each of them"
            )
