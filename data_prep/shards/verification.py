"""What shards hold, looked at sample by sample: what training would refuse, and what nobody may have noticed."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from tbac.data.decoding import CorruptSampleError, decode_sample
from tbac.data.shards import read_manifest
from tbac.data.tars import NOWHERE, TarIndex, TarReader

NAMED = 20  # samples of each kind of fault that are named
COCO = (  # as GenEval names them
    "person|bicycle|car|motorcycle|airplane|bus|train|truck|boat|traffic light|fire hydrant|stop sign|"
    "parking meter|bench|bird|cat|dog|horse|sheep|cow|elephant|bear|zebra|giraffe|backpack|umbrella|handbag|tie|"
    "suitcase|frisbee|skis|snowboard|sports ball|kite|baseball bat|baseball glove|skateboard|surfboard|"
    "tennis racket|bottle|wine glass|cup|fork|knife|spoon|bowl|banana|apple|sandwich|orange|broccoli|carrot|"
    "hot dog|pizza|donut|cake|chair|couch|potted plant|bed|dining table|toilet|tv|laptop|computer mouse|"
    "tv remote|computer keyboard|cell phone|microwave|oven|toaster|sink|refrigerator|book|clock|vase|scissors|"
    "teddy bear|hair drier|toothbrush"
)
COLORS = "red|orange|yellow|green|blue|purple|pink|brown|black|white"
_OBJECT = rf"(?:an? )?(?:(?:{COLORS}) )?(?:{COCO})"
GENEVAL = re.compile(
    rf"a photo of (?:{_OBJECT}(?: (?:and|left of|right of|above|below) {_OBJECT})?|"
    rf"(?:two|three|four) (?:(?:{COCO})(?:e?s)?|people|knives|sheep|skis|scissors|benches|buses|zebras))\.?",
    re.IGNORECASE,
)


def geneval_template(caption: str) -> bool:
    """Whether a caption is of the form of GenEval's prompts: training on such makes its score say less."""
    return GENEVAL.fullmatch(caption.strip()) is not None


@dataclass
class Facts:
    """What was seen.

    Attributes:
        samples: all, also those with faults.
        faults: kind -> number: what training would refuse, and shards that aren't as their manifest says.
        named: kind -> some of them.
        widths: of target images.
        heights: ditto.
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

    def fault(self, kind: str, name: str, count: int = 1) -> None:
        """Count a fault."""
        self.faults[kind] += count
        if len(named := self.named.setdefault(kind, [])) < NAMED:
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

    @staticmethod
    def repeated(counts: Counter[bytes]) -> int:
        """How many samples have what another one has already."""
        return sum(n - 1 for n in counts.values())


def look_at(tar: Path, listed: Mapping[str, Any] | None, count_tokens: Callable[[str], int]) -> Facts:
    """Read every sample of a tar.

    Args:
        tar: the file.
        listed: its entry of the manifest, or None.
        count_tokens: length of a caption.
    """
    facts = Facts()
    if listed is not None:
        _compare(facts, tar, listed)
    try:
        index = TarIndex(tar)
    except OSError as error:
        facts.fault("unreadable shard", f"{tar.name}: {error.strerror or error}")
        return facts
    if index.broken is not None:
        facts.fault("a shard that breaks off", f"{tar.name}: {index.broken}")
    for kind, count in index.refused.items():
        if not kind.startswith("a second"):
            facts.fault(f"a member that is {kind}", tar.name, count)
    if listed is not None and listed.get("samples") != len(index.samples):
        facts.fault(
            "a shard with another number of samples than its manifest says",
            f"{tar.name}: {len(index.samples)} instead of {listed.get('samples')}",
        )
    reader, keys = TarReader(), set()
    for number, (key, members) in enumerate(index.samples):
        name = f"{tar.name}: {key}"
        facts.samples += 1
        if key in keys:
            facts.fault("a key that another sample has", name)
        keys.add(key)
        if "/" in key:
            facts.fault("a key with a slash", name)
        if NOWHERE in members.values():
            facts.fault("a field that a sample has twice", name)
            continue
        _look_at_sample(facts, name, reader.read(tar, number), count_tokens)
    reader.close()
    return facts


def _compare(facts: Facts, tar: Path, listed: Mapping[str, Any]) -> None:
    size = tar.stat().st_size
    if size != listed.get("bytes"):
        kind = "a shard of another size than its manifest says"
        facts.fault(kind, f"{tar.name}: {size} bytes instead of {listed.get('bytes')}")
    elif "sha256" in listed:
        digest = hashlib.sha256()
        with tar.open("rb") as file:
            while block := file.read(2**22):
                digest.update(block)
        if digest.hexdigest() != listed["sha256"]:
            facts.fault("a shard whose bytes aren't those of its manifest", tar.name)


def _look_at_sample(facts: Facts, name: str, raw: dict[str, Any], count_tokens: Callable[[str], int]) -> None:
    fields = sorted(f for f in raw if not f.startswith("__"))
    images = [f for f in fields if f.rsplit(".", 1)[-1] in ("jpg", "jpeg", "png", "webp")]
    try:
        cached = any(f.endswith("latent.safetensors") for f in fields)
        if cached:
            decode_sample(raw, use_latents=True)
        pictured = any(not f.startswith("source") for f in images)
        sample = decode_sample(raw, use_latents=cached and not pictured)
    except CorruptSampleError as error:
        facts.fault(error.kind, f"{name}: {str(error).splitlines()[0]}")
        return
    facts.schemas[" ".join(without_format(name) for name in fields)] += 1
    facts.edits += bool(sample.sources)
    facts.cached += cached
    facts.lengths.append(count_tokens(sample.text))
    facts.captions[hashlib.sha256(sample.text.strip().encode()).digest()[:12]] += 1
    if geneval_template(sample.text):
        facts.geneval += 1
        if len(facts.geneval_named) < NAMED:
            facts.geneval_named.append(f"{name}: {sample.text}")
    if isinstance(sample.target, Image.Image):
        facts.widths.append(sample.target.width)
        facts.heights.append(sample.target.height)
        target = next(f for f in images if not f.startswith("source"))
        facts.images[hashlib.sha256(raw[target]).digest()[:12]] += 1


def without_format(name: str) -> str:
    """The name of a field, the same for all formats of images."""
    return re.sub(r"\.(?:jpg|jpeg|png|webp)$", "", re.sub(r"^(?:jpg|jpeg|png|webp)$", "image", name))


def shards_of(folder: Path) -> tuple[list[Path], dict[str, Any]]:
    """All tars of a folder, and its manifest's entries.

    Raises:
        ValueError: when there is no tar, or the manifest isn't one.
    """
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise ValueError(f"path={folder} holds no *.tar")
    return tars, (read_manifest(folder) or {"shards": {}})["shards"]


def report_table(facts: Facts, unit: str) -> list[tuple[str, str]]:
    """The findings that aren't faults, for people."""

    def of_all(n: int) -> str:
        return f"{n:,} ({100 * n / max(1, facts.good):.2f} %)"

    lengths = sorted(facts.lengths) or [0]
    rows = [
        ("samples", f"{facts.samples:,}"),
        ("that training takes", f"{facts.good:,}"),
        ("of these edits", of_all(facts.edits)),
        ("with cached latents", of_all(facts.cached)),
        ("with the caption of another one", of_all(Facts.repeated(facts.captions))),
        ("with the target image of another one", of_all(Facts.repeated(facts.images))),
        ("with a caption of GenEval's templates", of_all(facts.geneval)),
        (f"caption length, {unit}", f"median {lengths[len(lengths) // 2]}, longest {lengths[-1]}"),
    ]
    if facts.widths:
        sizes = Counter(zip(facts.widths, facts.heights, strict=True))
        (width, height), count = sizes.most_common(1)[0]
        rows.append(("sizes of target images", f"{len(sizes):,}; most often {width} x {height} ({count:,})"))
    rows += [(f"fields: {names}", f"{n:,}") for names, n in facts.schemas.most_common(5)]
    return rows


def as_json(facts: Facts) -> str:
    """The findings for programs."""
    return json.dumps(
        {
            "samples": facts.samples,
            "good": facts.good,
            "faults": dict(facts.faults.most_common()),
            "named": facts.named,
            "repeated_captions": Facts.repeated(facts.captions),
            "repeated_images": Facts.repeated(facts.images),
            "geneval_templates": facts.geneval,
            "geneval_named": facts.geneval_named,
            "edits": facts.edits,
            "cached": facts.cached,
            "schemas": dict(facts.schemas.most_common()),
        },
        indent=2,
    )


def histograms(facts: Facts, unit: str, path: Path) -> None:
    """Sizes, aspect ratios and caption lengths as a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 2, figsize=(10, 7))
    pairs = list(zip(facts.widths, facts.heights, strict=True))
    series: Sequence[tuple[str, list[float]]] = (
        ("shorter side of the target, pixels", [float(min(pair)) for pair in pairs]),
        ("longer side of the target, pixels", [float(max(pair)) for pair in pairs]),
        ("width / height of the target", [w / h for w, h in pairs]),
        (f"caption, {unit}", [float(n) for n in facts.lengths]),
    )
    for axes, (label, values) in zip(panels.flat, series, strict=True):
        if values:
            axes.hist(values, bins=min(40, max(1, len(set(values)))), color="#4292c6")
        axes.set_xlabel(label)
        axes.set_ylabel("samples")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)
