"""From a dataset's own files to shards: in parallel, going on after a kill, with every sample counted.

A dataset is cut into units that are converted independently of each other, each into tars of its own in the hidden
folder of `resumable.py`; at the end the tars get their numbers in the order of the units. So the shards are the same
bytes whatever the number of processes and however often the conversion was killed.
"""

import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from data_prep.shards.resumable import Result, ResumableWork
from data_prep.shards.writer import ShardWriter
from tbac.data.decoding import CorruptSampleError, decode_sample
from tbac.data.shards import DataError

NAME = "conversion"  # of this work, in manifests
SPLITS = ("train", "val")
NAMED = 20  # rejected samples of each kind that are named in the report


@dataclass(frozen=True)
class Record:
    """One sample of a dataset.

    Attributes:
        key: any text; what a shard's key may not hold is replaced.
        fields: extension -> bytes, as in the shard.
    """

    key: str
    fields: Mapping[str, bytes]


@dataclass(frozen=True)
class Rejected:
    """A sample that can't become one: its name, and why in a few words that others share."""

    name: str
    reason: str


class Dataset(Protocol):
    """Files of a dataset, as it is published: what a class that `dataset._target_` names has to have.

    Attributes:
        name: of the dataset, for the manifest.
        expected: number of samples that it has when it is whole, or None where nobody knows.
    """

    name: str
    expected: int | None

    def list_units(self) -> Sequence[str]:
        """Names of its parts, in an order that doesn't change."""
        ...

    def read(self, unit: str, scratch: Path) -> Iterator[Record | Rejected]:
        """The samples of a part, always in the same order; `scratch` is a folder for what has to be unpacked."""
        ...


@dataclass(frozen=True)
class ConversionOptions:
    """How shards are made.

    Args:
        samples_per_shard: at most.
        val_samples: how many go into a split `val` of their own: the first ones, but no more than every second.
        check_images: decode every picture, and reject what training would refuse.

    Raises:
        ValueError: for numbers that make no shard.
    """

    samples_per_shard: int = 10000
    val_samples: int = 256
    check_images: bool = True

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1 or self.val_samples < 0:
            raise ValueError(
                f"samples_per_shard must be at least 1 and val_samples at least 0, got {self.samples_per_shard} and "
                f"{self.val_samples}"
            )


@dataclass
class Counts:
    """What became of the samples.

    Attributes:
        read: all of them.
        written: split -> how many.
        rejected: reason -> how many.
        named: reason -> some of them.
        expected: number of samples of the whole dataset, where it is known.
    """

    read: int = 0
    written: dict[str, int] = field(default_factory=dict)
    rejected: dict[str, int] = field(default_factory=dict)
    named: dict[str, list[str]] = field(default_factory=dict)
    expected: int | None = None

    @property
    def total(self) -> int:
        """Samples written, of all splits."""
        return sum(self.written.values())

    def reject(self, name: str, reason: str) -> None:
        """Count a rejected sample."""
        self.rejected[reason] = self.rejected.get(reason, 0) + 1
        names = self.named.setdefault(reason, [])
        if len(names) < NAMED:
            names.append(name)

    def add(self, other: "Counts") -> None:
        """Take over what was counted elsewhere."""
        self.read += other.read
        self.written = dict(Counter(self.written) + Counter(other.written))
        self.rejected = dict((Counter(self.rejected) + Counter(other.rejected)).most_common())
        for reason, names in other.named.items():
            own = self.named.setdefault(reason, [])
            own += names[: NAMED - len(own)]


def clean_key(text: str) -> str:
    """Letters, digits, `_` and `-`; everything else becomes one `_`."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", text).strip("_")


def convert(dataset: Dataset, out: Path, options: ConversionOptions, processes: int = 1) -> Counts:
    """Convert a dataset into shards with a manifest; goes on where it stopped.

    Args:
        dataset: its files.
        out: folder of the shards.
        options: how they are made.
        processes: units converted at a time.

    Raises:
        DataError: when the folder holds other shards, or nothing could be converted.
    """
    units = list(dataset.list_units())
    work = ResumableWork(out, NAME, {"dataset": dataset.name, "units": units, **asdict(options)})
    manifest = work.read_finished()
    if manifest is not None:
        return Counts(**manifest[NAME]["counts"])
    parts = {f"unit-{index:06d}": (index, unit) for index, unit in enumerate(units)}
    work.make_parts(parts, partial(convert_unit, dataset, options, work.folder), processes)
    results = work.read_results(parts)
    assert results is not None, "all units were converted here"
    return _number_tars(dataset, work, results)


def convert_unit(
    dataset: Dataset, options: ConversionOptions, folder: Path, stem: str, unit: tuple[int, str]
) -> Result:
    """Convert one unit into tars `<stem>.<split>-{000000}.tar`.

    Args:
        dataset: its files.
        options: how shards are made.
        folder: of the tars.
        stem: beginning of their names.
        unit: index and name of the unit.

    Returns:
        `counts`, and `shards`: split -> entries of its tars.
    """
    index, name = unit
    # What an attempt that was killed has left is in the way.
    for stale in folder.glob(f"{stem}.*"):
        shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
    scratch = folder / f"{stem}.scratch"
    scratch.mkdir()
    # Validation samples are the first ones, so they don't depend on what other units hold.
    writer = _UnitWriter(folder / stem, options, options.val_samples if index == 0 else 0)
    for record in dataset.read(name, scratch):
        writer.take(record)
    shutil.rmtree(scratch)
    return {"counts": asdict(writer.counts), "shards": writer.close()}


class _UnitWriter:
    """Writes the samples of one unit and counts what becomes of them.

    Args:
        stem: beginning of the paths of the tars.
        options: how shards are made.
        val_samples: of this unit, at most.
    """

    def __init__(self, stem: Path, options: ConversionOptions, val_samples: int) -> None:
        self.stem, self.options, self.val_samples = stem, options, val_samples
        self.counts = Counts(written=dict.fromkeys(SPLITS, 0))
        self._keys: set[str] = set()
        self._open: dict[str, ShardWriter] = {}
        self._closed: dict[str, list[Result]] = {split: [] for split in SPLITS}

    def take(self, record: Record | Rejected) -> None:
        """Write a sample, or count why it isn't one."""
        self.counts.read += 1
        if isinstance(record, Rejected):
            self.counts.reject(record.name, record.reason)
            return
        key = clean_key(record.key)
        if not key or key in self._keys:
            self.counts.reject(record.key, "no key" if not key else "a key that another sample has")
            return
        # What training would refuse doesn't get into a shard.
        if self.options.check_images:
            try:
                decode_sample({"__key__": key, **record.fields}, use_latents=False)
            except CorruptSampleError as error:
                self.counts.reject(f"{record.key}: {str(error).splitlines()[0]}", error.kind)
                return
        self._keys.add(key)
        self._write(key, record.fields)

    def _write(self, key: str, fields: Mapping[str, bytes]) -> None:
        written = self.counts.written
        split = "val" if written["val"] < min(self.val_samples, written["train"]) else "train"
        if split not in self._open:
            number = len(self._closed[split])
            self._open[split] = ShardWriter(self.stem.with_name(f"{self.stem.name}.{split}-{number:06d}.tar"))
        self._open[split].add(key, fields)
        written[split] += 1
        if self._open[split].samples == self.options.samples_per_shard:
            self._close_tar(split)

    def _close_tar(self, split: str) -> None:
        writer = self._open.pop(split)
        self._closed[split].append({"file": writer.path.name, **writer.close()})

    def close(self) -> dict[str, list[Result]]:
        """Finish all tars; returns their entries by split."""
        for split in list(self._open):
            self._close_tar(split)
        return self._closed


def _number_tars(dataset: Dataset, work: ResumableWork, results: Sequence[Result]) -> Counts:
    """Give the tars their numbers, and write the manifest; goes on where it stopped as well."""
    total = Counts(expected=dataset.expected)
    for result in results:
        total.add(Counts(**result["counts"]))
    shards: dict[str, Result] = {}
    for split in SPLITS:
        tars = [shard for result in results for shard in result["shards"][split]]
        for number, shard in enumerate(tars):
            name = f"{split}-{number:06d}.tar"
            made = work.folder / shard["file"]
            if made.is_file():  # else it was renamed before a kill
                made.rename(work.out / name)
            shards[name] = {k: v for k, v in shard.items() if k != "file"}
    if not total.total:
        raise DataError(f"no sample of {dataset.name} could be converted: {total.rejected or 'it is empty'}")
    work.finish(shards, {"provenance": {"dataset": dataset.name}}, {"counts": asdict(total)})
    return total


def format_counts(counts: Counts) -> str:
    """The counts for people."""
    lines = [f"read      {counts.read:>12,}"]
    lines += [f"written   {n:>12,}  {split}" for split, n in counts.written.items()]
    for reason, n in counts.rejected.items():
        lines.append(f"rejected  {n:>12,}  {reason}, such as {counts.named[reason][0]}")
    if counts.expected is not None and counts.read != counts.expected:
        lines.append(f"expected  {counts.expected:>12,}  samples are in the whole dataset")
    return "\n".join(lines)
