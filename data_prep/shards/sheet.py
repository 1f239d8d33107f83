"""A sheet of some samples of a folder of shards: pictures with captions, the sources of edits beside their targets."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image, ImageOps

from tbac.data.decoding import CorruptSampleError, decode_sample
from tbac.data.tars import TarReader
from tbac.files import write_whole
from tbac.sampling.grid import encode_png, join_pictures
from tbac.types import Sample

SIDE = 192  # pixels of a picture on the sheet
SHOWN = 24  # samples
COLUMNS = 6  # pictures in a row: of edits, which mostly have one source, three


def draw_sheet(folder: Path, path: Path, count: int = SHOWN) -> int:
    """Draw samples that are spread over all tars; returns how many, and writes nothing if none has a picture.

    Args:
        folder: of the shards.
        path: of the sheet, a PNG file.
        count: how many samples at most.
    """
    pictures, captions = [], []
    samples = list(choose_samples(sorted(folder.glob("*-*.tar")), count))
    for sample in samples:
        shown = list_pictures(sample)
        pictures += shown
        captions += [*(["source"] * (len(shown) - 1)), sample.text]
    if not pictures:
        return 0
    sheet = join_pictures(pictures, columns=COLUMNS, captions=captions, wrap=SIDE // 7, font_size=12)
    write_whole(path, encode_png(sheet))
    return len(samples)


def choose_samples(tars: Sequence[Path], count: int) -> Iterator[Sample]:
    """Choose samples with a picture, evenly over the tars; those that training would refuse are passed over."""
    reader, left = TarReader(), count
    for number, tar in enumerate(tars):
        wanted = -(-left // (len(tars) - number))
        try:
            total = len(reader.read_index(tar).samples)
        except OSError:  # the report names it
            continue
        for place in range(0, total, max(1, total // max(1, wanted))):
            if not wanted:
                break
            try:
                sample = decode_sample(reader.read(tar, place), use_latents=False)
            except (CorruptSampleError, OSError):
                continue
            if sample.target is not None:
                wanted, left = wanted - 1, left - 1
                yield sample
    reader.close()


def list_pictures(sample: Sample) -> list[Image.Image]:
    """List the sources and the target of a sample, each as a square that holds all of it."""
    assert sample.target is not None
    return [ImageOps.pad(picture, (SIDE, SIDE), color="white") for picture in (*sample.sources, sample.target)]
