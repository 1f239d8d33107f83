"""Examines shards sample by sample: finds what training would refuse, and counts what may be worth knowing."""

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from data_prep.shards.geneval_captions import is_geneval_template
from tbac.data.buckets import write_sizes
from tbac.data.decoding import CorruptSampleError, decode_sample
from tbac.data.shards import check_regular, check_shards, read_manifest
from tbac.data.tars import NOWHERE, TOO_LARGE, TarIndex, TarReader
from tbac.files import spell_out
from tbac.pictures import IMAGE_EXTENSIONS

log = logging.getLogger(__name__)
NAMED = 20  # how many samples with the same kind of fault are named
OF_A_SAMPLE = ("a second", "a field that is too large")  # refused members that are counted with their samples


@dataclass
class Facts:
    """What the examined shards hold.

    Attributes:
        samples: number of all samples, with and without faults.
        faults: kind -> number: what training would refuse, and shards that aren't as their manifest says.
        named: kind -> names of some samples or shards with this fault.
        widths: of target images.
        heights: of target images.
        lengths: of captions, in tokens or words.
        captions: digest of a caption -> how often it occurs.
        images: digest of a target image's bytes -> how often it occurs.
        geneval: number of captions of GenEval's templates.
        geneval_named: some of these captions, with the names of their samples.
        edits: number of samples with input images.
        cached: number of samples with cached latents.
        schemas: fields of a sample -> number of samples that have them.
        shapes: shape of cached latents -> names of the samples that have it.
    """

    samples: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    named: dict[str, list[str]] = field(default_factory=dict)
    widths: list[int] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    captions: Counter[bytes] = field(default_factory=Counter)
    images: Counter[bytes] = field(default_factory=Counter)
    geneval: int = 0
    geneval_named: list[str] = field(default_factory=list)
    edits: int = 0
    cached: int = 0
    schemas: Counter[str] = field(default_factory=Counter)
    shapes: dict[tuple[int, ...], list[str]] = field(default_factory=dict)

    def count_fault(self, kind: str, name: str, count: int = 1) -> None:
        """Count a fault."""
        self.faults[kind] += count
        name = spell_out(name)
        named = self.named.setdefault(kind, [])
        if len(named) < NAMED:
            named.append(name)

    def add(self, other: "Facts") -> None:
        """Add the facts of other shards."""
        for name in ("samples", "geneval", "edits", "cached"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("widths", "heights", "lengths"):
            getattr(self, name).extend(getattr(other, name))
        for name in ("faults", "captions", "images", "schemas"):
            getattr(self, name).update(getattr(other, name))
        for kind, names in other.named.items():
            named = self.named.setdefault(kind, [])
            named += names[: NAMED - len(named)]
        for shape, names in other.shapes.items():
            self.shapes.setdefault(shape, []).extend(names)
        self.geneval_named += other.geneval_named[: NAMED - len(self.geneval_named)]

    @property
    def good(self) -> int:
        """Number of samples that training would take."""
        return len(self.lengths)


def examine_tar(tar: Path, listed: Mapping[str, Any] | None, count_tokens: Callable[[str], int]) -> Facts:
    """Read every sample of a tar.

    Args:
        tar: the file.
        listed: its entry of the manifest, or None.
        count_tokens: counts the tokens of a caption.
    """
    # First the tar as a whole: its bytes, and whether it can be read to its end.
    facts, reader = Facts(), TarReader()
    if listed is not None:
        _check_bytes(facts, tar, listed)
    try:
        index = reader.read_index(tar)
    except OSError as error:
        facts.count_fault("unreadable shard", f"{tar.name}: {error.strerror or error}")
        return facts
    _check_tar(facts, tar, index, listed)
    # A sample that can't be told apart, or whose fields are ambiguous, is a fault before anything is decoded.
    keys: set[str] = set()
    for number, (key, members) in enumerate(index.samples):
        name = f"{tar.name}: {key}"
        facts.samples += 1
        if key in keys:
            facts.count_fault("a key that another sample has", name)
        keys.add(key)
        if "/" in key:
            facts.count_fault("a key with a slash", name)
        if NOWHERE in members.values():
            facts.count_fault("a field that a sample has twice", name)
            continue
        if TOO_LARGE in members.values():
            facts.count_fault("a field that is too large", name)
            continue
        try:
            raw = reader.read(tar, number)
        except CorruptSampleError as error:
            facts.count_fault(error.kind, name)
            continue
        except OSError as error:
            facts.count_fault("unreadable shard", f"{name}: {error.strerror or error}")
            continue
        _examine_sample(facts, name, raw, count_tokens)
    reader.close()
    return facts


def _check_bytes(facts: Facts, tar: Path, listed: Mapping[str, Any]) -> None:
    """Count a fault if a tar doesn't have the size and the bytes that its manifest says."""
    size = tar.stat().st_size
    if size != listed.get("bytes"):
        kind = "a shard of another size than its manifest says"
        facts.count_fault(kind, f"{tar.name}: {size} bytes instead of {listed.get('bytes')}")
    elif "sha256" in listed:
        with tar.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != listed["sha256"]:
            facts.count_fault("a shard whose bytes aren't those of its manifest", tar.name)


def _check_tar(facts: Facts, tar: Path, index: TarIndex, listed: Mapping[str, Any] | None) -> None:
    """Count the faults of a tar as a whole."""
    if index.broken is not None:
        facts.count_fault("a shard that breaks off", f"{tar.name}: {index.broken}")
    for damage in index.damage:
        facts.count_fault("a shard with a damaged header", f"{tar.name}: {damage}")
    for kind, count in index.refused.items():
        if not kind.startswith(OF_A_SAMPLE):
            facts.count_fault(f"a member that is {kind}", tar.name, count)
    if listed is not None and listed.get("samples") != len(index.samples):
        facts.count_fault(
            "a shard with another number of samples than its manifest says",
            f"{tar.name}: {len(index.samples)} instead of {listed.get('samples')}",
        )


def _examine_sample(facts: Facts, name: str, raw: Mapping[str, Any], count_tokens: Callable[[str], int]) -> None:
    """Count what one sample holds, or its fault."""
    fields = sorted(field for field in raw if not field.startswith("__"))
    targets = [f for f in fields if f.rsplit(".", 1)[-1] in IMAGE_EXTENSIONS and not f.startswith("source")]
    cached = any(field.endswith("latent.safetensors") for field in fields)
    # Training reads the latents or the picture, as its options say, so both must be readable.
    try:
        if cached:
            latents = decode_sample(raw, use_latents=True).latents
            if latents is not None:
                facts.shapes.setdefault(tuple(latents.shape), []).append(name)
        sample = decode_sample(raw, use_latents=cached and not targets)
    except CorruptSampleError as error:
        facts.count_fault(error.kind, f"{name}: {error}")
        return
    # Shards with unlike samples are easy to overlook, so the kinds of samples are counted.
    facts.schemas[" ".join(map(strip_format, fields))] += 1
    facts.edits += bool(sample.sources)
    facts.cached += cached
    # Captions that repeat, or that a benchmark asks for, make scores look better than they are.
    facts.lengths.append(count_tokens(sample.text))
    facts.captions[_compute_short_digest(sample.text.strip().encode())] += 1
    if is_geneval_template(sample.text):
        facts.geneval += 1
        if len(facts.geneval_named) < NAMED:
            facts.geneval_named.append(f"{name}: {sample.text}")
    # The sizes of pictures decide which buckets are of use.
    if isinstance(sample.target, Image.Image):
        facts.widths.append(sample.target.width)
        facts.heights.append(sample.target.height)
        facts.images[_compute_short_digest(raw[targets[0]])] += 1


def _compute_short_digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()[:12]


def strip_format(name: str) -> str:
    """Strip the format from a field's name, so that it is the same for all formats of images."""
    return re.sub(r"\.(?:jpg|jpeg|png|webp)$", "", re.sub(r"^(?:jpg|jpeg|png|webp)$", "image", name))


def count_words(text: str) -> int:
    """Count the words of a text."""
    return len(text.split())


class TokenCounter:
    """Counts the tokens of a text, with a tokenizer that each process opens for itself.

    Args:
        source: folder or hub id of the tokenizer.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self._tokenizer: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self.source, "_tokenizer": None}

    def __call__(self, text: str) -> int:
        if self._tokenizer is None:
            from transformers import AutoTokenizer  # takes seconds to import, and counting words doesn't need it

            self._tokenizer = AutoTokenizer.from_pretrained(self.source, trust_remote_code=False)
        return len(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def list_tars(folder: Path) -> list[Path]:
    """List all tars of a folder, in the order of their names.

    Raises:
        ValueError: when there is none.
    """
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise ValueError(f"path={folder} holds no *.tar")
    check_regular(tars)
    return tars


def verify(folder: Path, tokenizer: str | None, processes: int) -> Facts:
    """Examine all shards of a folder.

    Args:
        folder: of the shards and their manifest.
        tokenizer: folder or hub id; None counts words.
        processes: how many shards are examined at the same time.
    """
    tars, manifest = list_tars(folder), read_manifest(folder) or {"shards": {}}
    listed = manifest["shards"]
    facts = Facts()
    for name in sorted(set(listed) - {tar.name for tar in tars}):
        facts.count_fault("a shard that is in the manifest and absent", name)
    count_tokens = TokenCounter(tokenizer) if tokenizer else count_words
    examine = partial(_examine_quietly, listed=listed, count_tokens=count_tokens)
    for facts_of_tar in _process_tars(examine, tars, processes, "verifying"):
        facts.add(facts_of_tar)
    _check_shapes(facts, manifest)
    return facts


def _check_shapes(facts: Facts, manifest: Mapping[str, Any]) -> None:
    """Count a fault for cached latents of another shape than those of the others, which training can't join to them.

    With buckets there are several shapes, of the sides that the manifest lists. Where it doesn't say, latents of other
    aspect ratios may belong to a bucket, but none of other channels or of a very different area.
    """
    if not facts.shapes:
        return
    channels, height, width = max(facts.shapes, key=lambda shape: len(facts.shapes[shape]))
    sizes = manifest.get("buckets") or []
    if manifest.get("image_size") and not sizes:
        sizes = [[manifest["image_size"]] * 2]
    pixels = {side // height for side, other in sizes if side * width == other * height and side >= height}
    accepted = {(channels, side // n, other // n) for side, other in sizes for n in pixels}
    for shape, names in facts.shapes.items():
        area = shape[1] * shape[2] / (height * width)
        is_usual = shape in accepted if accepted else shape[0] == channels and 0.5 <= area <= 2
        for name in () if is_usual else names:
            facts.count_fault("latents of another shape than the others", f"{name}: {shape}")


def write_all_sizes(folder: Path, processes: int) -> None:
    """Write the sizes of targets beside all shards of a folder, read from headers alone."""
    tars, manifest = list_tars(folder), read_manifest(folder) or {"shards": {}}
    check_shards(tars, manifest["shards"])
    counts = list(_process_tars(write_sizes, tars, processes, "reading sizes"))
    log.info("%s: the sizes of %d samples in %d shards are kept beside them", folder, sum(counts), len(tars))


def _process_tars(function: Callable[[Path], Any], tars: Sequence[Path], processes: int, title: str) -> Iterator[Any]:
    """Call a function for each tar, in several processes, with a progress bar; yields the results in order."""
    if processes == 1:
        yield from tqdm(map(function, tars), total=len(tars), unit="shard", desc=title)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from tqdm(pool.map(function, tars), total=len(tars), unit="shard", desc=title)


def _examine_quietly(tar: Path, listed: Mapping[str, Any], count_tokens: Callable[[str], int]) -> Facts:
    """Examine a tar without logging the members that are passed over, since the report lists them."""
    logger = logging.getLogger("tbac.data.tars")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return examine_tar(tar, listed.get(tar.name), count_tokens)
    finally:
        logger.setLevel(level)
