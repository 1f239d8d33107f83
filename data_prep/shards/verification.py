"""What shards hold, looked at sample by sample: what training would refuse, and what nobody may have noticed."""

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
from tbac.data.decoding import IMAGE_EXTENSIONS, CorruptSampleError, decode_sample
from tbac.data.shards import read_manifest
from tbac.data.tars import NOWHERE, TarIndex, TarReader

log = logging.getLogger(__name__)
NAMED = 20  # samples of each kind of fault that are named


@dataclass
class Facts:
    """What was seen.

    Attributes:
        samples: all, also those with faults.
        faults: kind -> number: what training would refuse, and shards that aren't as their manifest says.
        named: kind -> some of them.
        widths: of target images.
        heights: of target images.
        lengths: of captions, in tokens or words.
        captions: digest of a caption -> how often it occurs.
        images: digest of a target image's bytes -> how often it occurs.
        geneval: captions of GenEval's templates.
        geneval_named: some of them.
        edits: samples with input images.
        cached: samples with cached latents.
        schemas: fields of a sample -> number.
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

    def count_fault(self, kind: str, name: str, count: int = 1) -> None:
        """Count a fault."""
        self.faults[kind] += count
        named = self.named.setdefault(kind, [])
        if len(named) < NAMED:
            named.append(name)

    def add(self, other: "Facts") -> None:
        """Take over what was seen elsewhere."""
        for name in ("samples", "geneval", "edits", "cached"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("widths", "heights", "lengths"):
            getattr(self, name).extend(getattr(other, name))
        for name in ("faults", "captions", "images", "schemas"):
            getattr(self, name).update(getattr(other, name))
        for kind, names in other.named.items():
            own = self.named.setdefault(kind, [])
            own += names[: NAMED - len(own)]
        self.geneval_named += other.geneval_named[: NAMED - len(self.geneval_named)]

    @property
    def good(self) -> int:
        """Samples that training would take."""
        return len(self.lengths)


def examine_tar(tar: Path, listed: Mapping[str, Any] | None, count_tokens: Callable[[str], int]) -> Facts:
    """Read every sample of a tar.

    Args:
        tar: the file.
        listed: its entry of the manifest, or None.
        count_tokens: length of a caption.
    """
    facts, reader = Facts(), TarReader()
    if listed is not None:
        _check_bytes(facts, tar, listed)
    try:
        index = reader.read_index(tar)
    except OSError as error:
        facts.count_fault("unreadable shard", f"{tar.name}: {error.strerror or error}")
        return facts
    _check_tar(facts, tar, index, listed)
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
        _examine_sample(facts, name, reader.read(tar, number), count_tokens)
    reader.close()
    return facts


def _check_bytes(facts: Facts, tar: Path, listed: Mapping[str, Any]) -> None:
    """Whether a tar has the size and the bytes that its manifest says."""
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
    """Faults of a tar as a whole."""
    if index.broken is not None:
        facts.count_fault("a shard that breaks off", f"{tar.name}: {index.broken}")
    for kind, count in index.refused.items():
        if not kind.startswith("a second"):  # a field that a sample has twice is counted with the sample
            facts.count_fault(f"a member that is {kind}", tar.name, count)
    if listed is not None and listed.get("samples") != len(index.samples):
        facts.count_fault(
            "a shard with another number of samples than its manifest says",
            f"{tar.name}: {len(index.samples)} instead of {listed.get('samples')}",
        )


def _examine_sample(facts: Facts, name: str, raw: Mapping[str, Any], count_tokens: Callable[[str], int]) -> None:
    fields = sorted(field for field in raw if not field.startswith("__"))
    targets = [f for f in fields if f.rsplit(".", 1)[-1] in IMAGE_EXTENSIONS and not f.startswith("source")]
    cached = any(field.endswith("latent.safetensors") for field in fields)
    # Training reads the latents or the picture, as its options say, so both must be readable.
    try:
        if cached:
            decode_sample(raw, use_latents=True)
        sample = decode_sample(raw, use_latents=cached and not targets)
    except CorruptSampleError as error:
        facts.count_fault(error.kind, f"{name}: {str(error).splitlines()[0]}")
        return
    # What it is made of.
    facts.schemas[" ".join(map(strip_format, fields))] += 1
    facts.edits += bool(sample.sources)
    facts.cached += cached
    # Its caption: length, whether others have it, and whether a benchmark asks for the like.
    facts.lengths.append(count_tokens(sample.text))
    facts.captions[_compute_short_digest(sample.text.strip().encode())] += 1
    if is_geneval_template(sample.text):
        facts.geneval += 1
        if len(facts.geneval_named) < NAMED:
            facts.geneval_named.append(f"{name}: {sample.text}")
    # Its picture: size, and whether others have it.
    if isinstance(sample.target, Image.Image):
        facts.widths.append(sample.target.width)
        facts.heights.append(sample.target.height)
        facts.images[_compute_short_digest(raw[targets[0]])] += 1


def _compute_short_digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()[:12]


def strip_format(name: str) -> str:
    """The name of a field, the same for all formats of images."""
    return re.sub(r"\.(?:jpg|jpeg|png|webp)$", "", re.sub(r"^(?:jpg|jpeg|png|webp)$", "image", name))


def count_words(text: str) -> int:
    """Words of a text."""
    return len(text.split())


class TokenCounter:
    """Counts the tokens of a text, by a tokenizer that each process opens for itself.

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
            from transformers import AutoTokenizer  # takes seconds, and without a tokenizer words are counted

            self._tokenizer = AutoTokenizer.from_pretrained(self.source)
        return len(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def list_tars(folder: Path) -> list[Path]:
    """All tars of a folder, in the order of their names.

    Raises:
        ValueError: when there is none.
    """
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise ValueError(f"path={folder} holds no *.tar")
    return tars


def verify(folder: Path, tokenizer: str | None, processes: int) -> Facts:
    """Look at all shards of a folder.

    Args:
        folder: of the shards and their manifest.
        tokenizer: folder or hub id; None counts words.
        processes: shards looked at at a time.
    """
    tars, listed = list_tars(folder), (read_manifest(folder) or {"shards": {}})["shards"]
    facts = Facts()
    for name in sorted(set(listed) - {tar.name for tar in tars}):
        facts.count_fault("a shard that is in the manifest and absent", name)
    look = partial(_examine_quietly, listed=listed, count_tokens=TokenCounter(tokenizer) if tokenizer else count_words)
    for found in _process_tars(look, tars, processes, "verifying"):
        facts.add(found)
    return facts


def write_all_sizes(folder: Path, processes: int) -> None:
    """Write the sizes of targets beside all shards of a folder, from their headers."""
    tars = list_tars(folder)
    counts = list(_process_tars(write_sizes, tars, processes, "reading sizes"))
    log.info("%s: the sizes of %d samples in %d shards are kept beside them", folder, sum(counts), len(tars))


def _process_tars(function: Callable[[Path], Any], tars: Sequence[Path], processes: int, title: str) -> Iterator[Any]:
    """What a function gives for each tar, in order, with a bar that shows how far it is."""
    if processes == 1:
        yield from tqdm(map(function, tars), total=len(tars), unit="shard", desc=title)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from tqdm(pool.map(function, tars), total=len(tars), unit="shard", desc=title)


def _examine_quietly(tar: Path, listed: Mapping[str, Any], count_tokens: Callable[[str], int]) -> Facts:
    """Look at a tar without a log of what reading it passes over: that is in the report."""
    logger = logging.getLogger("tbac.data.tars")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return examine_tar(tar, listed.get(tar.name), count_tokens)
    finally:
        logger.setLevel(level)
