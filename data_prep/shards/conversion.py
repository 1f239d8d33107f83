"""From a dataset's own files to shards: in parallel, going on after a kill, with every sample counted.

A dataset is cut into units that are converted independently of each other, each into tars of its own in a folder
`.conversion` beside the shards. A unit that was finished is never done again, one that was cut off is done from its
beginning; at the end the tars get their numbers in the order of the units. So the shards are the same bytes whatever
the number of processes and however often the conversion was killed.
"""

import json
import logging
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from data_prep.shards.resumable import Work
from data_prep.shards.writer import ShardWriter
from tbac.data.decoding import CorruptSampleError, decode_sample
from tbac.data.shards import SCHEMA_VERSION, DataError
from tbac.files import write_whole

log = logging.getLogger(__name__)
WORK = ".conversion"
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
    """Files of a dataset, as it is published.

    Attributes:
        name: of the dataset, for the manifest.
        expected: number of samples that it has when it is whole, or None where nobody knows.
    """

    name: str
    expected: int | None

    def units(self) -> Sequence[str]:
        """Names of its parts, in an order that doesn't change."""
        ...

    def read(self, unit: str, scratch: Path) -> Iterator[Record | Rejected]:
        """The samples of a part, always in the same order; `scratch` is a folder for what has to be unpacked."""
        ...


@dataclass(frozen=True)
class Options:
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
    """What became of the samples."""

    read: int = 0
    written: dict[str, int] = field(default_factory=dict)
    rejected: dict[str, int] = field(default_factory=dict)
    named: dict[str, list[str]] = field(default_factory=dict)
    expected: int | None = None

    @property
    def total(self) -> int:
        """Samples written, of all splits."""
        return sum(self.written.values())


def safe_key(text: str) -> str:
    """Letters, digits, `_` and `-`; everything else becomes one `_`."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", text).strip("_")


def convert(dataset: Dataset, out: Path, options: Options, processes: int = 1) -> Counts:
    """Convert a dataset into shards with a manifest; goes on where it stopped.

    Args:
        dataset: its files.
        out: folder of the shards.
        options: how they are made.
        processes: units converted at a time.

    Raises:
        DataError: when the folder holds other shards, or nothing could be converted.
    """
    recipe = {"dataset": dataset.name, "units": list(dataset.units()), **asdict(options)}
    work = Work(out, WORK, recipe, "conversion")
    if (manifest := work.finished()) is not None:
        log.info("%s is there already", out)
        return Counts(**manifest["conversion"]["counts"])
    work.begin()
    units = recipe["units"]
    left = [i for i in range(len(units)) if not work.state(_stem(i)).is_file()]
    log.info("%d of %d parts of %s to convert", len(left), len(units), dataset.name)
    bar = tqdm(total=len(units), initial=len(units) - len(left), unit="part", desc=f"converting {dataset.name}")
    if processes < 2:
        for i in left:
            convert_unit(dataset, i, units[i], work, options)
            bar.update()
    else:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            waiting = [pool.submit(convert_unit, dataset, i, units[i], work, options) for i in left]
            for done in as_completed(waiting):
                done.result()
                bar.update()
    bar.close()
    return _assemble(dataset, work)


def convert_unit(dataset: Dataset, index: int, unit: str, work: Work, options: Options) -> None:
    """Convert one unit; its state file says that it is complete."""
    stem = _stem(index)
    for stale in work.folder.glob(f"{stem}.*"):
        shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
    scratch = work.folder / f"{stem}.scratch"
    scratch.mkdir()
    counts = Counts()
    rejected: Counter[str] = Counter()
    writers: dict[str, ShardWriter] = {}
    shards: dict[str, list[dict[str, Any]]] = {"train": [], "val": []}
    keys: set[str] = set()

    def reject(name: str, reason: str) -> None:
        rejected[reason] += 1
        if len(named := counts.named.setdefault(reason, [])) < NAMED:
            named.append(name)

    def finish(split: str) -> None:
        writer = writers.pop(split)
        shards[split].append({"file": writer.path.name, **writer.close()})

    for record in dataset.read(unit, scratch):
        counts.read += 1
        if isinstance(record, Rejected):
            reject(record.name, record.reason)
            continue
        key = safe_key(record.key)
        if not key or key in keys:
            reject(record.key, "no key" if not key else "a key that another sample has")
            continue
        try:
            if options.check_images:
                decode_sample({"__key__": key, **record.fields}, use_latents=False)
        except CorruptSampleError as error:
            reject(f"{record.key}: {str(error).splitlines()[0]}", error.kind)
            continue
        keys.add(key)
        done = {split: counts.written.get(split, 0) for split in ("train", "val")}
        split = "val" if index == 0 and done["val"] < min(options.val_samples, done["train"]) else "train"
        if split not in writers:
            writers[split] = ShardWriter(work.folder / f"{stem}.{split}-{len(shards[split]):06d}.tar")
        writers[split].add(key, record.fields)
        counts.written[split] = done[split] + 1
        if writers[split].samples == options.samples_per_shard:
            finish(split)
    for split in list(writers):
        finish(split)
    shutil.rmtree(scratch)
    counts.rejected = dict(rejected)
    write_whole(work.state(stem), json.dumps({"counts": asdict(counts), "shards": shards}).encode())


def _stem(index: int) -> str:
    return f"unit-{index:06d}"


def _assemble(dataset: Dataset, work: Work) -> Counts:
    """Give the tars their numbers, and write the manifest; goes on where it stopped as well."""
    states = [json.loads(work.state(_stem(i)).read_text()) for i in range(len(work.recipe["units"]))]
    total = Counts(expected=dataset.expected)
    rejected: Counter[str] = Counter()
    shards: dict[str, dict[str, Any]] = {}
    for state in states:
        counts = state["counts"]
        total.read += counts["read"]
        rejected.update(counts["rejected"])
        for reason, names in counts["named"].items():
            own = total.named.setdefault(reason, [])
            own += names[: NAMED - len(own)]
    total.rejected = dict(rejected.most_common())
    for split in ("train", "val"):
        tars = [shard for state in states for shard in state["shards"][split]]
        for number, shard in enumerate(tars):
            name = f"{split}-{number:06d}.tar"
            if (made := work.folder / shard["file"]).is_file():
                made.rename(work.out / name)
            shards[name] = {k: v for k, v in shard.items() if k != "file"}
        if tars:
            total.written[split] = sum(shard["samples"] for shard in tars)
    if not total.total:
        raise DataError(f"no sample of {dataset.name} could be converted: {total.rejected or 'it is empty'}")
    provenance = {"dataset": dataset.name}
    manifest = {"schema_version": SCHEMA_VERSION, "shards": shards, "provenance": provenance}
    work.finish(manifest, {"counts": asdict(total)})
    return total


def table(counts: Counts) -> str:
    """The counts for people."""
    lines = [f"read      {counts.read:>12,}"]
    lines += [f"written   {n:>12,}  {split}" for split, n in counts.written.items()]
    for reason, n in counts.rejected.items():
        lines.append(f"rejected  {n:>12,}  {reason}, such as {counts.named[reason][0]}")
    if counts.expected is not None and counts.read != counts.expected:
        lines.append(f"expected  {counts.expected:>12,}  samples are in the whole dataset")
    return "\n".join(lines)
