"""Captions with what is true of each, concept by concept: what a probe learns from and is asked about."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tbac.files import ForeignFileError, expand_path, parse_json, read_csv, read_lines, shorten

SPLITS = ("train", "seen", "unseen")
TEXT, SPLIT = "caption", "split"
TESTED_SHARE = 0.3  # of the captions of a table that doesn't say which are tested


@dataclass(frozen=True)
class LabelledCaption:
    """A caption, and its class for each concept that it says something about.

    Attributes:
        text: the caption.
        labels: concept -> class, such as `{"colour": "red"}`.
        split: `train`; `seen`: tested, in words that occur in training; `unseen`: tested, in words that don't.

    Raises:
        ValueError: for an empty caption and another split.
    """

    text: str
    labels: Mapping[str, str]
    split: str = "train"

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise ValueError("a caption must have words")
        if self.split not in SPLITS:
            raise ValueError(f"{SPLIT} must be one of {', '.join(SPLITS)}; got {self.split!r}")


def list_concepts(captions: Sequence[LabelledCaption]) -> list[str]:
    """List the concepts that can be probed, in the order in which they occur.

    Raises:
        ValueError: naming a concept of one class, without captions to learn from or to test, or with a class that is
            tested and never learnt.
    """
    concepts = list(dict.fromkeys(concept for caption in captions for concept in caption.labels))
    if not concepts:
        raise ValueError("no caption has a label, so there is nothing to probe")
    for concept in concepts:
        classes: dict[str, set[str]] = {split: set() for split in SPLITS}
        for caption in captions:
            if concept in caption.labels:
                classes[caption.split].add(caption.labels[concept])
        tested = classes["seen"] | classes["unseen"]
        if len(classes["train"]) < 2 or not tested:
            raise ValueError(
                f"{concept} needs captions of at least two classes to learn from and some to test; it has the classes "
                f"{sorted(classes['train'])} of split train, and {sorted(tested)} of seen and unseen"
            )
        unknown = sorted(tested - classes["train"])
        if unknown:
            raise ValueError(f"{concept}: the classes {unknown} are tested, and no caption of split train has them")
    return concepts


def read_table(path: str | Path) -> list[LabelledCaption]:
    """Read captions and labels of your own.

    Args:
        path: a CSV file with a header, or JSON lines. The column `caption` has the texts, `split` (which may be
            missing: then three tenths are tested, chosen by the caption) one of train, seen and unseen, and each other
            column is a concept; an empty cell says nothing about it.

    Raises:
        ValueError: naming the file and the row.
    """
    file = expand_path(str(path), "captions.path")
    if file.suffix == ".csv":
        rows: list[dict[str, Any]] = list(read_csv(file))
    else:
        lines = enumerate(read_lines(file), start=1)
        rows = [parse_json(line, f"{file}:{number}", dict) for number, line in lines if line.strip()]
    captions = []
    for number, row in enumerate(rows, start=1):
        if not isinstance(row.get(TEXT), str):
            raise ForeignFileError(f"{file}, row {number}: {TEXT} must be a text, got {shorten(row.get(TEXT))}")
        concepts = [name for name in row if name not in (TEXT, SPLIT)]
        labels = {name: str(row[name]) for name in concepts if row[name] not in (None, "")}
        try:
            captions.append(LabelledCaption(row[TEXT], labels, row.get(SPLIT) or choose_split(row[TEXT])))
        except ValueError as error:
            raise ForeignFileError(f"{file}, row {number}: {error}") from None
    if not captions:
        raise ForeignFileError(f"{file} has no rows")
    return captions


def choose_split(text: str) -> str:
    """Choose whether a caption is learnt from or tested, by its text alone."""
    number = int.from_bytes(hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:8], "big")
    return "seen" if number / 2**64 < TESTED_SHARE else "train"
