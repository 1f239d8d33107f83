"""Turns a batch plan into a batch: reads, decodes, drops conditions and collates; replaces and counts corrupt samples.

Why this is written here: no library that this repository uses has an indexed, exactly resumable reader of tars.
WebDataset's pipeline drops a corrupt sample, and then every later batch holds other samples. Here a plan says which
samples a batch holds, and the position of a draw decides what replaces a corrupt one, so a batch is the same in every
run.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from torch import Tensor
from torch.utils.data import Dataset

from tbac.data.decoding import CorruptSampleError, decode_picture_alone, decode_sample
from tbac.data.order import BatchPlan, Draw
from tbac.data.shards import DataError
from tbac.data.tars import ShardChangedError, TarReader
from tbac.data.transforms import ConditionDropout
from tbac.types import Batch, Sample

log = logging.getLogger(__name__)
ATTEMPTS = 1000  # to find another sample for the place of a corrupt one


class NoSubstituteError(DataError):
    """There is no other sample of the same bucket for the place of a corrupt one."""


@dataclass
class Tally:
    """Counts of one reader.

    Attributes:
        seen: samples that it has tried to read.
        bad: those that it refused.
        kinds: what was wrong -> how many were refused for it.
    """

    seen: int = 0
    bad: int = 0
    kinds: Counter[str] = field(default_factory=Counter)


def check_bad_share(share: float) -> None:
    """Raise ValueError for a share of refused samples outside [0, 1]."""
    if not 0 <= share <= 1:
        raise ValueError(f"data.max_bad_share must be between 0 and 1, got {share}")


def _has_aspect_ratio(latents: Tensor, size: tuple[int, int]) -> bool:
    """Whether latents (channel, height, width) have the aspect ratio of a (height, width)."""
    return latents.shape[1] * size[1] == latents.shape[2] * size[0]


@dataclass(eq=False)
class ShardReader(Dataset[Batch]):
    """Reads the batch that a plan describes.

    What a batch holds depends on its plan alone. Another sample of the same source, chosen by the position of the draw,
    takes the place of a corrupt one.

    Args:
        shards: for each source, its tars.
        sizes: for each source, how many samples each tar has.
        seed: of dropout and of replacements.
        collate: joins samples, whose targets have a given (height, width), into a batch.
        size: (height, width) of targets in pixels, for plans that give none.
        dropout: condition dropout; None keeps everything.
        use_latents: take cached latents instead of target images where there are any.
        max_bad_share: greatest share of samples that may be refused.
        min_seen: the number of samples that the share is taken of is rounded up to a multiple of this; at most the
            number of samples of a pass.
        reducing_gap: JPEGs much larger than needed are decoded at a half, a quarter or an eighth of their size, as long
            as that is at least this many times what is kept; None decodes in full.
        reconstruct: for each source, whether its pictures alone are read, as prompts and targets; empty for none.
        latent_form: channels of latents, and pixels that one of them stands for on each side; cached ones of another
            shape are refused. None takes them as they are.

    Attributes:
        tally: how many samples were seen and refused.
        tars: reads the samples of tars.
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
    latent_form: tuple[int, int] | None = None
    reconstruct: Sequence[bool] = ()
    tally: Tally = field(default_factory=Tally, init=False)
    tars: TarReader = field(default_factory=TarReader, init=False)

    def __post_init__(self) -> None:
        check_bad_share(self.max_bad_share)
        self.min_seen = min(self.min_seen, sum(map(sum, self.sizes)))
        # How many samples each tar should have, until it is compared with how many it has.
        self._counts: dict[Path, int] = {}
        for tars, sizes in zip(self.shards, self.sizes, strict=True):
            self._counts |= dict(zip(tars, sizes, strict=True))

    def __getitem__(self, plan: BatchPlan) -> Batch:
        batch = self.collate(self.read_samples(plan), plan.size or self.size)
        batch.positions = [draw.position for draw in plan.draws]
        batch.after = dict(plan.after)
        return batch

    def read_samples(self, plan: BatchPlan) -> list[Sample]:
        """Read the samples of a batch.

        Where a bucket is so rare that nothing can take the place of a corrupt sample, the others of the batch repeat.

        Raises:
            DataError: when a shard is gone, too many samples are corrupt, or the batch has no usable sample.
        """
        samples: list[Sample] = []
        for draw in plan.draws:
            try:
                samples.append(self.read_sample(draw, plan.size))
            except NoSubstituteError as error:
                last_error = error
        if not samples:
            raise last_error
        return [samples[i % len(samples)] for i in range(len(plan.draws))]

    def read_sample(self, draw: Draw, bucket: tuple[int, int] | None = None) -> Sample:
        """Read the sample of a draw, or one that takes its place.

        Args:
            draw: says where the sample lies.
            bucket: (height, width) that its target is cropped to; cached latents of another aspect ratio are replaced.

        Raises:
            DataError: when a shard is gone, too many samples are corrupt, or none of a source can be used.
        """
        # The position of the draw decides which samples are tried in its place, so every run takes the same one.
        sizes = self.sizes[draw.source]
        substitutes = Random(f"substitute/{self.seed}/{draw.position}")
        shard, index = draw.shard, draw.sample
        for _ in range(ATTEMPTS):
            path = self.shards[draw.source][shard]
            self.tally.seen += 1
            try:
                sample = self._read_and_decode(path, index, bucket or self.size, draw)
                usable = bucket is None or sample.latents is None or _has_aspect_ratio(sample.latents, bucket)
                if usable and sample.latents is not None:
                    self._check_shape(sample.latents, bucket or self.size)
            except CorruptSampleError as error:
                self._count_refused(f"sample {index} of {path}", error)
                usable = False
            if usable:
                return self._drop_conditions(sample, draw)
            # Any sample of the source may take the place; a shard is chosen by how many it holds, so all are as likely.
            shard = substitutes.choices(range(len(sizes)), sizes)[0]
            index = substitutes.randrange(sizes[shard])
        # A rare bucket may have no other sample, which the rest of the batch can make up for.
        folder = self.shards[draw.source][0].parent
        error_class = NoSubstituteError if bucket else DataError
        raise error_class(f"{folder} gave no usable sample in {ATTEMPTS} attempts")

    def _drop_conditions(self, sample: Sample, draw: Draw) -> Sample:
        """Return the sample after dropout, which depends on the seed, its key and the pass, not on the reader."""
        if self.dropout is None:
            return sample
        return self.dropout(sample, Random(f"dropout/{self.seed}/{draw.source}/{draw.passes}/{sample.key}"))

    def _read_and_decode(self, path: Path, index: int, size: tuple[int, int], draw: Draw) -> Sample:
        """Read and decode the sample at a place, as the source of a draw asks.

        Raises:
            CorruptSampleError: when it can't be read or decoded.
            DataError: when the shard is gone.
        """
        try:
            self._compare_count(path)
            raw = self.tars.read(path, index)
        except (FileNotFoundError, ShardChangedError) as error:
            state = "is gone" if isinstance(error, FileNotFoundError) else "was written over"
            raise DataError(
                f"shard {path} was there when training began and {state}; put it back and start again to go on from "
                "the newest checkpoint"
            ) from None
        except OSError as error:
            raise CorruptSampleError(
                f"the shard can't be read ({error.strerror or error})", "unreadable shard"
            ) from None
        except IndexError:
            reason = self.tars.read_index(path).broken or "its manifest says more"
            raise CorruptSampleError(f"the shard holds fewer samples ({reason})", "unreadable shard") from None
        try:
            if self.reconstruct and self.reconstruct[draw.source]:
                rng = Random(f"picture/{self.seed}/{draw.source}/{draw.passes}/{raw['__key__']}")
                return decode_picture_alone(raw, rng, self.use_latents, size)
            return decode_sample(raw, self.use_latents, size, self.reducing_gap)
        except CorruptSampleError as error:
            raise CorruptSampleError(f"{raw['__key__']!s}: {error}", error.kind) from None

    def _compare_count(self, path: Path) -> None:
        """Warn, once for each tar, when it holds another number of samples than is drawn from it."""
        if (expected := self._counts.pop(path, None)) is None:
            return
        found = len(self.tars.read_index(path).samples)
        if found != expected:
            log.warning("%s holds %d samples, its manifest says %d", path, found, expected)

    def _check_shape(self, latents: Tensor, size: tuple[int, int]) -> None:
        """Raise CorruptSampleError for latents that aren't of the model's shape for a (height, width) in pixels."""
        if self.latent_form is None:
            return
        channels, pixels = self.latent_form
        expected = (channels, size[0] // pixels, size[1] // pixels)
        if tuple(latents.shape) != expected:
            raise CorruptSampleError(
                f"cached latents have shape {tuple(latents.shape)} instead of {expected}; are data.buckets and "
                "stage.image_size those that they were cached with?",
                "latents of another shape",
            )

    def _count_refused(self, what: str, why: CorruptSampleError) -> None:
        """Count and log a refused sample.

        Raises:
            DataError: when too many were refused.
        """
        tally = self.tally
        tally.bad += 1
        tally.kinds[why.kind] += 1
        log.warning("skipped %s: %s (%d bad of %d)", what, str(why).split("\n")[0], tally.bad, tally.seen)
        # At the beginning a few bad samples say little about the share, so the number seen is rounded up.
        rounded_up = math.ceil(tally.seen / self.min_seen) * self.min_seen
        if tally.bad > self.max_bad_share * rounded_up:
            raise DataError(
                f"{tally.bad} of {tally.seen} samples were corrupt or incomplete, more than "
                f"data.max_bad_share={self.max_bad_share}; the log names each of them"
            )
