"""Trees of pictures, exactly as a benchmark's published scorer reads them.

A target is one file of the tree: one sample of a prompt, or a grid of several. A sample's seed follows from the base
seed, the prompt and its number alone, so pictures don't depend on the order or the number of processes. Files appear
whole or not at all. The records of how they were made lie beside the tree, in `<tree>.records/`, never inside.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from tbac.files import ForeignFileError, is_valid_text, read_json, shorten, write_whole
from tbac.pictures import PictureError, open_picture

# Bytes; the longest name of a file that is made beside a picture, in its records, has 45 more. Most systems take 255.
LONGEST_NAME, LONGEST_PATH = 200, 1000


@dataclass(frozen=True)
class Target:
    """A picture file that a benchmark wants.

    Attributes:
        path: in the tree, with forward slashes.
        item: of the benchmark; all targets of an item have the same prompt and are drawn together.
        prompt: what to draw.
        samples: numbers of the samples that it shows: one, or four in a grid of two by two.
        images: input pictures, for edits.

    Raises:
        ValueError: for a path that leads out of the tree or can't name a file, and for a prompt that is no text.
    """

    path: str
    item: str
    prompt: str
    samples: tuple[int, ...] = (0,)
    images: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        # Names of pictures come from benchmark files, which may come from anywhere.
        path = PurePosixPath(self.path)
        if not self.path or path.is_absolute() or ".." in path.parts or path.name != self.path.split("/")[-1]:
            raise ValueError(f"a picture's name must stay inside its folder, got {shorten(self.path)!r}")
        if not is_valid_text(self.path) or not self.path.isprintable() or path.name.startswith("."):
            raise ValueError(f"a picture's name must be of signs that can be seen, got {shorten(ascii(self.path))}")
        longest = max(len(part.encode()) for part in path.parts)
        if longest > LONGEST_NAME or len(self.path.encode()) > LONGEST_PATH:
            raise ValueError(
                f"a picture's name may have {LONGEST_NAME} bytes and its path {LONGEST_PATH}, got {longest} and "
                f"{len(self.path.encode())} in {shorten(self.path)!r}"
            )
        if not is_valid_text(self.prompt) or not self.prompt.strip():
            raise ValueError(f"the prompt of {self.path} must be a text, got {shorten(ascii(self.prompt))}")


class TreeError(ValueError):
    """A tree holds another picture in the place of one that should be made."""


def derive_seed(seed: int, prompt: str, sample: int) -> int:
    """Derive the seed of a sample's noise, in [0, 2^63)."""
    text = json.dumps([seed, prompt, sample])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def is_readable(path: Path) -> bool:
    """Whether a picture file decodes to its end."""
    try:
        open_picture(path)
    except PictureError:
        return False
    return True


def join_grid(pictures: Sequence[Image.Image]) -> Image.Image:
    """Join pictures into rows of two; a single picture stays as it is."""
    if len(pictures) == 1:
        return pictures[0]
    width, height = pictures[0].size
    num_rows = (len(pictures) + 1) // 2
    grid = Image.new("RGB", (2 * width, num_rows * height))
    for i, picture in enumerate(pictures):
        grid.paste(picture, (i % 2 * width, i // 2 * height))
    return grid


def name_records_folder(root: Path) -> Path:
    """Name the folder beside a tree that holds the records of its pictures."""
    return root.with_name(f"{root.name}.records")


def describe_wish(target: Target) -> dict[str, Any]:
    """Describe what a benchmark wants of a picture, as its record keeps it."""
    sources = [hashlib.sha256(path.read_bytes()).hexdigest() for path in target.images]
    return {"prompt": target.prompt, "samples": list(target.samples), "images": sources}


def describe_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Describe in what settings differ: the name of each, the value of before and the one of now."""
    names = [name for name in now if before.get(name) != now[name]] + [name for name in before if name not in now]
    return ", ".join(f"{name} {shorten(before.get(name))} -> {shorten(now.get(name))}" for name in names)


def read_settings(root: Path, targets: Sequence[Target]) -> dict[str, Any] | None:
    """Read the settings that all pictures of a tree were made with, from their records.

    Returns:
        The settings; None for pictures from elsewhere, of which none has a record.

    Raises:
        TreeError: when two pictures were made with different settings, one was made for another prompt, or one has no
            record, or a torn one, where others have theirs.
    """
    advice = "steps=[generate] says in what, and draws it anew with overwrite=true"
    records = name_records_folder(root)
    settings: dict[str, Any] | None = None
    of: Path | None = None  # the picture that has these settings
    strangers = []
    for target in targets:
        path, record = root / target.path, records / f"{target.path}.json"
        if not path.is_file():
            continue
        if not record.is_file():
            strangers.append(path)
            continue
        recorded = read_json(record, kind=dict)
        # It shows what the benchmark wants there, and was made as the others were.
        wish = describe_wish(target)
        wanted = {name: recorded.pop(name, None) for name in wish}
        if wanted != wish:
            raise TreeError(f"{path} was made for something else ({describe_changes(wanted, wish)}); {advice}")
        if settings is not None and recorded != settings:
            changes = describe_changes(settings, recorded)
            raise TreeError(f"{path} was made otherwise than {of} ({changes}); {advice}")
        settings, of = recorded, path
    if settings is not None and strangers:
        raise TreeError(f"{strangers[0]} has no record of how it was made, as {of} has; {advice}")
    return settings


class Tree:
    """A folder of pictures that are made now, or were made before with the same settings.

    Args:
        root: folder of the tree.
        settings: what the pictures depend on besides prompt, sample and input pictures: sampling options, seed, digest
            of the checkpoint. A picture that was made with other settings is refused.
        overwrite: make such a picture again instead.
    """

    def __init__(self, root: Path, settings: Mapping, overwrite: bool = False) -> None:
        self.root, self.overwrite = root, overwrite
        self.settings = json.loads(json.dumps(settings, sort_keys=True))
        self.records = name_records_folder(root)

    def _name_record(self, target: Target) -> Path:
        return self.records / f"{target.path}.json"

    def _name_mark(self, target: Target) -> Path:
        """Name the file that is there while a picture and its record are being written."""
        return self.records / f"{target.path}.writing"

    def _describe_target(self, target: Target) -> dict:
        """Collect everything that the picture of a target depends on, as its record keeps it."""
        return {**describe_wish(target), **self.settings}

    def is_made(self, target: Target) -> bool:
        """Whether the picture of a target is there, made with these settings.

        Raises:
            TreeError: when it was made with other settings, or by something else, and `overwrite` is off.
        """
        path, record = self.root / target.path, self._name_record(target)
        # A process that was ended between picture and record leaves this mark, and no record.
        if not path.is_file() or not is_readable(path) or self._name_mark(target).is_file():
            return False
        expected = self._describe_target(target)
        recorded = None
        if record.exists():
            # A record that is torn says that the picture was made here, and not how: it is made anew.
            try:
                recorded = read_json(record, kind=dict)
            except ForeignFileError:
                return False
        if recorded == expected:
            return True
        if self.overwrite:
            return False
        if recorded is None:
            raise TreeError(f"{path} wasn't made here; give another folder, or overwrite=true")
        changed = describe_changes(recorded, expected)
        raise TreeError(f"{path} was made otherwise ({changed}); give another folder, or overwrite=true")

    def write(self, target: Target, pictures: Sequence[Image.Image]) -> None:
        """Write a target's samples as one picture, and then its record."""
        path, record = self.root / target.path, self._name_record(target)
        for file in (path, record):
            file.parent.mkdir(parents=True, exist_ok=True)
        # Between the two writes there must never be an old record beside a new picture, and a process that is ended
        # there must not leave a picture that seems to be somebody else's.
        mark = self._name_mark(target)
        mark.touch()
        record.unlink(missing_ok=True)
        png = io.BytesIO()
        join_grid(pictures).save(png, format="PNG")
        write_whole(path, png.getvalue(), self.records)
        write_whole(record, json.dumps(self._describe_target(target)).encode())
        mark.unlink()


@dataclass(frozen=True)
class Work:
    """An item with pictures that are still to be made.

    Attributes:
        targets: all targets of the item.
        missing: those that aren't made yet.
    """

    targets: Sequence[Target]
    missing: Sequence[Target]


def list_pending(tree: Tree, targets: Sequence[Target], rank: int = 0, world_size: int = 1) -> list[Work]:
    """List the items that one of several processes still has to draw something for.

    Raises:
        TreeError: when a picture was made with other settings.
    """
    items: dict[str, list[Target]] = {}
    for target in targets:
        items.setdefault(target.item, []).append(target)
    # Each process gets whole items, since all samples of an item are drawn together.
    work = []
    for item_targets in list(items.values())[rank::world_size]:
        missing = [target for target in item_targets if not tree.is_made(target)]
        if missing:
            work.append(Work(item_targets, missing))
    return work


Draw = Callable[[str, Sequence[Path], Sequence[int]], Sequence[Image.Image]]


def generate(tree: Tree, work: Sequence[Work], draw: Draw, seed: int) -> Iterator[Target]:
    """Draw what is missing, and yield each target when it is written.

    A batch holds all samples of one item and no others, even where only some are missing. Other samples in the batch
    would change the last bits of a picture, since prompts are padded to the longest one.

    Args:
        tree: gets the pictures.
        work: from `list_pending`.
        draw: takes a prompt, input pictures and a seed for each sample, and returns the pictures.
        seed: base of each sample's seed.
    """
    for item in work:
        first = item.targets[0]
        samples = [(target, sample) for target in item.targets for sample in target.samples]
        drawn = draw(first.prompt, first.images, [derive_seed(seed, first.prompt, k) for _, k in samples])
        for target in item.missing:
            tree.write(target, [p for (owner, _), p in zip(samples, drawn, strict=True) if owner == target])
            yield target
