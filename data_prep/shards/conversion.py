"""Converts the files of a dataset into shards: in parallel, resuming after a kill, and counting every sample.

A dataset is cut into units that are converted independently of each other, each into separate tars in the hidden folder
of `resumable.py`. At the end the tars get their numbers in the order of the units. So the bytes of the shards are the
same, whatever the number of processes and however often the conversion was killed.
"""

import hashlib
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from data_prep.shards.resumable import Result, ResumableWork
from data_prep.shards.writer import ShardWriter
from tbac.data.decoding import CorruptSampleError, decode_sample, decode_text
from tbac.data.shards import DataError, check_shards
from tbac.files import describe_error, spell_out, write_whole
from tbac.pictures import UNREADABLE

NAME = "conversion"  # name of this work in manifests
SPLITS = ("train", "val")
NUMBERING = "numbering"  # file that is there while tars get their numbers
NAMED = 20  # how many rejected samples of each kind a report names


@dataclass(frozen=True)
class Record:
    """One sample of a dataset.

    Attributes:
        key: any text; characters that a shard's key may not have are replaced.
        fields: extension -> bytes, as in the shard.
    """

    key: str
    fields: Mapping[str, bytes]


@dataclass(frozen=True)
class Rejected:
    """A sample that can't be converted: its name, and the reason in words that are the same for all such samples."""

    name: str
    reason: str


class Dataset(Protocol):
    """A dataset in the layout in which it is published: what the class needs that `dataset._target_` names.

    Attributes:
        name: of the dataset, for the manifest.
        expected: number of samples of the whole dataset, or None where it isn't known.
    """

    name: str
    expected: int | None

    def list_units(self) -> Sequence[str]:
        """List the names of its parts, in an order that doesn't change."""
        ...

    def read(self, unit: str, scratch: Path) -> Iterator[Record | Rejected]:
        """Read the samples of a part, always in the same order; `scratch` is a folder for what has to be unpacked."""
        ...


@dataclass(frozen=True)
class ConversionOptions:
    """How shards are made.

    Args:
        samples_per_shard: how many samples a tar holds at most.
        val_samples: how many samples of the first unit go into the split `val` at most.
        val_share: share of these that does so at most, or one sample.
        check_images: decode every picture, and reject what training would refuse.

    Raises:
        ValueError: for numbers that make no shard.
    """

    samples_per_shard: int = 10000
    val_samples: int = 256
    val_share: float = 0.05
    check_images: bool = True

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1 or self.val_samples < 0:
            raise ValueError(
                f"samples_per_shard must be at least 1 and val_samples at least 0, got {self.samples_per_shard} and "
                f"{self.val_samples}"
            )
        if not 0 < self.val_share <= 0.5:
            raise ValueError(f"options.val_share must be above 0 and at most 0.5, got {self.val_share}")


@dataclass
class Counts:
    """How many samples were written and rejected.

    Attributes:
        read: number of all samples.
        written: split -> number of samples.
        rejected: reason -> number of samples.
        named: reason -> names of some of them.
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
        reason = spell_out(reason)
        self.rejected[reason] = self.rejected.get(reason, 0) + 1
        names = self.named.setdefault(reason, [])
        if len(names) < NAMED:
            names.append(spell_out(name))

    def add(self, other: "Counts") -> None:
        """Add the counts of other samples."""
        self.read += other.read
        self.written = dict(Counter(self.written) + Counter(other.written))
        self.rejected = dict((Counter(self.rejected) + Counter(other.rejected)).most_common())
        for reason, names in other.named.items():
            named = self.named.setdefault(reason, [])
            named += names[: NAMED - len(named)]


def clean_key(text: str) -> str:
    """Make a shard's key of a text: letters, digits, `_` and `-` stay, any run of others becomes one `_`."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", text).strip("_")


def make_key(text: str, taken: Mapping[str, str]) -> str:
    """Make the key of a sample that no other one has.

    Names that differ only in what a key can't hold, such as those in other letters than A to Z, are told apart by a
    digest of the whole name.

    Args:
        text: name of the sample.
        taken: keys of the other samples -> their names.
    """
    key = clean_key(text)
    if not key or taken.get(key, text) != text:
        digest = hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:12]
        key = f"{key}_{digest}" if key else digest
    return key


def convert(dataset: Dataset, out: Path, options: ConversionOptions, processes: int = 1) -> Counts:
    """Convert a dataset into shards with a manifest, or resume where that stopped.

    Args:
        dataset: lists and reads the samples.
        out: folder of the shards.
        options: of the shards.
        processes: how many units are converted at the same time.

    Raises:
        DataError: when the folder holds other shards, or nothing could be converted.
    """
    units = list(dataset.list_units())
    # Names of files may be no Unicode, which no manifest may hold.
    named = [spell_out(unit) for unit in units]
    work = ResumableWork(out, NAME, {"dataset": dataset.name, "units": named, **asdict(options)})
    manifest = work.read_finished()
    if manifest is not None:
        return _read_counts(manifest[NAME], out)
    parts = {f"unit-{index:06d}": (index, unit) for index, unit in enumerate(units)}
    work.make_parts(parts, partial(convert_unit, dataset, options, work.folder), processes, partial(_is_whole, work))
    results = work.read_results(parts)
    assert results is not None, "all units were converted here"
    return _number_tars(dataset, work, results)


def convert_unit(
    dataset: Dataset, options: ConversionOptions, folder: Path, stem: str, unit: tuple[int, str]
) -> Result:
    """Convert one unit into tars `<stem>.<split>-{000000}.tar`.

    Args:
        dataset: lists and reads the samples.
        options: of the shards.
        folder: of the tars.
        stem: beginning of their names.
        unit: index and name of the unit.

    Returns:
        `counts`, and `shards`: split -> entries of its tars.
    """
    index, name = unit
    # An attempt that was killed may have left files.
    for stale in folder.glob(f"{stem}.*"):
        shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
    scratch = folder / f"{stem}.scratch"
    scratch.mkdir()
    # Validation samples come from the first unit, so they don't depend on what other units hold.
    writer = _UnitWriter(folder / stem, options, options.val_samples if index == 0 else 0)
    for record in dataset.read(name, scratch):
        writer.take(record)
    shutil.rmtree(scratch)
    return {"counts": asdict(writer.counts), "shards": writer.close()}


class _UnitWriter:
    """Writes the samples of one unit, and counts what was written and rejected.

    Args:
        stem: beginning of the paths of the tars.
        options: of the shards.
        val_samples: how many samples of this unit go into `val` at most.
    """

    def __init__(self, stem: Path, options: ConversionOptions, val_samples: int) -> None:
        self.stem, self.options, self.val_samples = stem, options, val_samples
        self.counts = Counts(written=dict.fromkeys(SPLITS, 0))
        self._names: dict[str, str] = {}  # key -> name of the sample
        self._open: dict[str, ShardWriter] = {}
        self._closed: dict[str, list[Result]] = {split: [] for split in SPLITS}

    def take(self, record: Record | Rejected) -> None:
        """Write a sample, or count why it was rejected."""
        self.counts.read += 1
        if isinstance(record, Rejected):
            self.counts.reject(record.name, record.reason)
            return
        key = make_key(record.key, self._names)
        if not record.key or key in self._names:
            self.counts.reject(record.key, "a key that another sample has" if record.key else "no key")
            return
        # Training would refuse it too, only much later.
        try:
            decode_text(record.fields)
            if self.options.check_images:
                decode_sample({"__key__": key, **record.fields}, use_latents=False)
        except CorruptSampleError as error:
            self.counts.reject(f"{record.key}: {error}", error.kind)
            return
        self._names[key] = record.key
        self._write(key, record.fields)

    def _write(self, key: str, fields: Mapping[str, bytes]) -> None:
        """Write a sample into the tar of its split."""
        # Validation gets one sample of every so many, until it has enough; the first one is for training.
        written = self.counts.written
        share = max(1, int(self.options.val_share * (self.counts.total + 1)))
        is_val = written["train"] > 0 and written["val"] < min(self.val_samples, share)
        split = "val" if is_val else "train"
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


def _read_counts(kept: Mapping[str, Any], out: Path) -> Counts:
    """Read the counts that a manifest keeps.

    Raises:
        DataError: when they aren't counts.
    """
    try:
        counts = Counts(**kept["counts"])
        format_counts(counts)
    except UNREADABLE as error:
        raise DataError(f"{out} holds counts of another form ({describe_error(error)})") from None
    return counts


def _is_whole(work: ResumableWork, result: Result) -> bool:
    """Whether the tars of a unit are there as its result says, unless they have their numbers already."""
    if (work.folder / NUMBERING).exists():
        return True
    tars = [tar for tars_of_split in result["shards"].values() for tar in tars_of_split]
    files = [(work.folder / tar["file"], tar["bytes"]) for tar in tars]
    return all(file.is_file() and file.stat().st_size == size for file, size in files)


def _number_tars(dataset: Dataset, work: ResumableWork, results: Sequence[Result]) -> Counts:
    """Give the tars their numbers and write the manifest, or resume where that stopped."""
    total = Counts(expected=dataset.expected)
    for result in results:
        total.add(Counts(**result["counts"]))
    if not total.total:
        raise DataError(f"no sample of {dataset.name} could be converted: {total.rejected or 'it is empty'}")
    shards: dict[str, Result] = {}
    write_whole(work.folder / NUMBERING, b"")
    for split in SPLITS:
        tars = [shard for result in results for shard in result["shards"][split]]
        for number, shard in enumerate(tars):
            name = f"{split}-{number:06d}.tar"
            unnumbered = work.folder / shard["file"]
            if unnumbered.is_file():  # else an attempt that was killed has renamed it already
                unnumbered.rename(work.out / name)
            shards[name] = {k: v for k, v in shard.items() if k != "file"}
    check_shards([work.out / name for name in shards], shards, f"remove {work.out} and convert again")
    work.finish(shards, {"provenance": {"dataset": dataset.name}}, {"counts": asdict(total)})
    return total


def format_counts(counts: Counts) -> str:
    """Format the counts for people to read."""
    lines = [f"read      {counts.read:>12,}"]
    lines += [f"written   {n:>12,}  {split}" for split, n in counts.written.items()]
    for reason, n in counts.rejected.items():
        lines.append(f"rejected  {n:>12,}  {reason}, such as {counts.named[reason][0]}")
    if counts.expected is not None and counts.read != counts.expected:
        lines.append(f"expected  {counts.expected:>12,}  samples are in the whole dataset")
    return "\n".join(lines)
