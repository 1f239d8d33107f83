"""Trees of pictures, exactly as a benchmark's own scorer reads them.

A target is one file of the tree: one sample of a prompt, or a grid of several. A sample's seed follows from the base
seed, the prompt and its number alone, so pictures don't depend on the number of processes or the order. Files appear
whole or not at all. What we note about them lies beside the tree, in `<tree>.records/`, never inside.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from tbac.files import write_whole


@dataclass(frozen=True)
class Target:
    """A picture file that a benchmark wants.

    Attributes:
        path: in the tree, with forward slashes.
        item: what it belongs to: the targets of one item have one prompt and are drawn together.
        prompt: what to draw.
        samples: numbers of the samples that it shows: one, or four as a grid of two by two.
        images: input pictures, for edits.
    """

    path: str
    item: str
    prompt: str
    samples: tuple[int, ...] = (0,)
    images: tuple[Path, ...] = ()


class TreeError(ValueError):
    """A tree that holds something else than what is to be made."""


def derive_seed(seed: int, prompt: str, sample: int) -> int:
    """Seed of a sample's noise, in [0, 2^63)."""
    text = json.dumps([seed, prompt, sample])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def is_readable(path: Path) -> bool:
    """Whether a picture file decodes to its end."""
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError, ValueError):
        return False
    return True


def join_grid(pictures: Sequence[Image.Image]) -> Image.Image:
    """One picture as it is; four as rows of two."""
    if len(pictures) == 1:
        return pictures[0]
    width, height = pictures[0].size
    whole = Image.new("RGB", (2 * width, height * -(-len(pictures) // 2)))
    for i, picture in enumerate(pictures):
        whole.paste(picture, (i % 2 * width, i // 2 * height))
    return whole


def name_records_folder(root: Path) -> Path:
    """The folder beside a tree for what we note about it."""
    return root.with_name(f"{root.name}.records")


class Tree:
    """A folder of targets that are made now, or were made before with the same settings.

    Args:
        root: the benchmark's tree.
        settings: what the pictures depend on besides prompt, sample and input pictures: sampling options, seed, digest
            of the checkpoint. A picture made with others is refused.
        overwrite: make such pictures anew instead.
    """

    def __init__(self, root: Path, settings: Mapping, overwrite: bool = False) -> None:
        self.root, self.overwrite = root, overwrite
        self.settings = json.loads(json.dumps(settings, sort_keys=True))
        self.records = name_records_folder(root)

    def _name_record(self, target: Target) -> Path:
        return self.records / f"{target.path}.json"

    def _describe_target(self, target: Target) -> dict:
        sources = [hashlib.sha256(path.read_bytes()).hexdigest() for path in target.images]
        return {"prompt": target.prompt, "samples": list(target.samples), "images": sources, **self.settings}

    def is_made(self, target: Target) -> bool:
        """Whether this very picture is there.

        Raises:
            TreeError: when another one is, and `overwrite` is off.
        """
        path, record = self.root / target.path, self._name_record(target)
        if not path.is_file() or not is_readable(path):
            return False
        known = json.loads(record.read_text()) if record.is_file() else None
        expected = self._describe_target(target)
        if known == expected:
            return True
        if self.overwrite:
            return False
        if known is None:
            raise TreeError(f"{path} wasn't made here; give another folder, or overwrite=true")
        changed = [f"{k} {known.get(k)} -> {v}" for k, v in expected.items() if known.get(k) != v]
        raise TreeError(f"{path} was made otherwise ({', '.join(changed)}); give another folder, or overwrite=true")

    def write(self, target: Target, pictures: Sequence[Image.Image]) -> None:
        """Write a target's samples, and then its record."""
        path, record = self.root / target.path, self._name_record(target)
        for file in (path, record):
            file.parent.mkdir(parents=True, exist_ok=True)
        record.unlink(missing_ok=True)
        made = io.BytesIO()
        join_grid(pictures).save(made, format="PNG")
        write_whole(path, made.getvalue(), self.records)
        write_whole(record, json.dumps(self._describe_target(target)).encode())


@dataclass(frozen=True)
class Work:
    """An item of which something is to be made.

    Attributes:
        targets: all of its targets.
        missing: those that aren't made yet.
    """

    targets: Sequence[Target]
    missing: Sequence[Target]


def list_pending(tree: Tree, targets: Sequence[Target], rank: int = 0, world_size: int = 1) -> list[Work]:
    """What is left to do for one of several processes.

    Raises:
        TreeError: as `Tree.is_made`.
    """
    items: dict[str, list[Target]] = {}
    for target in targets:
        items.setdefault(target.item, []).append(target)
    # Whole items are shared out, since all samples of an item are drawn together.
    work = []
    for of_item in list(items.values())[rank::world_size]:
        missing = [target for target in of_item if not tree.is_made(target)]
        if missing:
            work.append(Work(of_item, missing))
    return work


Draw = Callable[[str, Sequence[Path], Sequence[int]], Sequence[Image.Image]]


def generate(tree: Tree, work: Sequence[Work], draw: Draw, seed: int) -> Iterator[Target]:
    """Make what is pending, and yield each target when it is written.

    All samples of an item are drawn together and those of others apart, whatever is missing: what else is in a batch
    would change the last bits, since prompts are padded to the longest.

    Args:
        tree: where they go.
        work: from `pending`.
        draw: prompt, input pictures and a seed for each sample -> pictures.
        seed: base of each sample's seed.
    """
    for item in work:
        first = item.targets[0]
        samples = [(target, sample) for target in item.targets for sample in target.samples]
        drawn = draw(first.prompt, first.images, [derive_seed(seed, first.prompt, k) for _, k in samples])
        for target in item.missing:
            tree.write(target, [p for (owner, _), p in zip(samples, drawn, strict=True) if owner == target])
            yield target
