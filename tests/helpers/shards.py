"""Writes, reads and damages shards."""

import io
import tarfile
from pathlib import Path
from typing import Any

from data_prep.shards.writer import write_shards
from tbac.data.order import Draw
from tbac.data.reader import ShardReader
from tbac.data.shards import Source, SourceShards
from tbac.types import Sample
from tests.helpers.pictures import make_noise_image


def make_reader(*sources: Source, check_manifest: bool = True, **options: Any) -> ShardReader:
    """Make a reader whose batches are lists of samples."""
    shards = [SourceShards(source, check_manifest) for source in sources]
    usual = {"seed": 0, "collate": lambda samples, size: samples, "size": (8, 8)}
    tars, samples = [part.tars for part in shards], [part.samples for part in shards]
    return ShardReader(tars, samples, **(usual | options))


def read_samples(reader: ShardReader, passes: int = 1) -> list[Sample]:
    """Read all samples in the order of the shards, `passes` times."""
    places = [
        (k, p, i, n)
        for p in range(passes)
        for k, sizes in enumerate(reader.sizes)
        for i, size in enumerate(sizes)
        for n in range(size)
    ]
    return [reader.read_sample(Draw(position, *place)) for position, place in enumerate(places)]


def break_members(tar: Path, broken: dict[str, bytes | None]) -> None:
    """Rewrite a tar: the contents of the given members are replaced, those whose content is None are left out."""
    with tarfile.open(tar) as old:
        members = [(m.name, old.extractfile(m).read()) for m in old]  # type: ignore[union-attr]
    with tarfile.open(tar, "w") as new:
        for name, data in members:
            content = broken.get(name, data)
            if content is not None:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                new.addfile(info, io.BytesIO(content))


def write_mixed_sizes(folder: str, count: int = 24) -> None:
    """Write text-to-image shards of the split `train` whose pictures have five sizes."""
    sides = [(24, 24), (40, 20), (20, 40), (64, 30), (90, 100)]
    samples = [
        (f"s{i:03d}", {"png": make_noise_image(i, sides[i % 5]), "txt": f"a {'red' if i % 2 else 'blue'} circle"})
        for i in range(count)
    ]
    write_shards(Path(folder), "train", samples, 10)
