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


def sample_seed(seed: int, prompt: str, sample: int) -> int:
    """Seed of a sample's noise, in [0, 2^63)."""
    text = json.dumps([seed, prompt, sample])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def geneval_targets(rows: Sequence[Mapping], samples: int = 4) -> list[Target]:
    """`{i:05d}/samples/{k:05d}.png`, as GenEval's `evaluate_images.py` reads them."""
    return [
        Target(f"{i:05d}/samples/{k:05d}.png", f"{i:05d}", row["prompt"], (k,))
        for i, row in enumerate(rows)
        for k in range(samples)
    ]


def write_geneval_metadata(rows: Sequence[Mapping], root: Path) -> None:
    """`{i:05d}/metadata.jsonl` with each prompt's row."""
    for i, row in enumerate(rows):
        folder = root / f"{i:05d}"
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "metadata.jsonl", json.dumps(row).encode(), records_of(root))


def dpg_targets(prompts: Mapping[str, str]) -> list[Target]:
    """`<stem>.png`, four samples in a grid, as DPG-Bench's scorer cuts them apart.

    Args:
        prompts: stem of the prompt's file -> prompt.
    """
    return [Target(f"{stem}.png", stem, prompt, (0, 1, 2, 3)) for stem, prompt in prompts.items()]


def edit_targets(edits: Mapping[str, tuple[str, Path]]) -> list[Target]:
    """`<key>.png`, as ImgEdit's scorer reads them.

    Args:
        edits: key -> instruction and source picture.
    """
    return [Target(f"{key}.png", key, instruction, (0,), (image,)) for key, (instruction, image) in edits.items()]


def read_prompt_folder(path: str | Path) -> dict[str, str]:
    """Name -> prompt: the lines of a text file, by their numbers, or the text files of a folder, by their stems.

    Raises:
        ValueError: when there is nothing, or no text in it.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        prompts = {file.stem: file.read_text(encoding="utf-8").strip() for file in sorted(path.glob("*.txt"))}
    elif path.is_file():
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        prompts = {f"{i:05d}": line for i, line in enumerate(line for line in lines if line)}
    else:
        raise ValueError(f"benchmark.file={path} is neither a text file of prompts nor a folder of such files")
    if empty := [name for name, text in prompts.items() if not text]:
        raise ValueError(f"benchmark.file={path}: {empty[0]}.txt is empty; it must hold a prompt")
    if not prompts:
        raise ValueError(f"benchmark.file={path} holds no prompt")
    return prompts


def folder_targets(prompts: Mapping[str, str], samples: int = 1) -> list[Target]:
    """`<name>.png`, or `<name>_<k>.png` with several samples."""
    names = [(name, f"{name}_{k}.png" if samples > 1 else f"{name}.png", k) for name in prompts for k in range(samples)]
    return [Target(path, name, prompts[name], (k,)) for name, path, k in names]


def readable(path: Path) -> bool:
    """Whether a picture file decodes to its end."""
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError, ValueError):
        return False
    return True


def grid_of(pictures: Sequence[Image.Image]) -> Image.Image:
    """One picture as it is; four as rows of two."""
    if len(pictures) == 1:
        return pictures[0]
    width, height = pictures[0].size
    whole = Image.new("RGB", (2 * width, height * -(-len(pictures) // 2)))
    for i, picture in enumerate(pictures):
        whole.paste(picture, (i % 2 * width, i // 2 * height))
    return whole


def records_of(root: Path) -> Path:
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
        self.records = records_of(root)

    def _record(self, target: Target) -> Path:
        return self.records / f"{target.path}.json"

    def _expected(self, target: Target) -> dict:
        sources = [hashlib.sha256(path.read_bytes()).hexdigest() for path in target.images]
        return {"prompt": target.prompt, "samples": list(target.samples), "images": sources, **self.settings}

    def made(self, target: Target) -> bool:
        """Whether this very picture is there.

        Raises:
            TreeError: when another one is, and `overwrite` is off.
        """
        path, record = self.root / target.path, self._record(target)
        if not path.is_file() or not readable(path):
            return False
        known = json.loads(record.read_text()) if record.is_file() else None
        expected = self._expected(target)
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
        path, record = self.root / target.path, self._record(target)
        for file in (path, record):
            file.parent.mkdir(parents=True, exist_ok=True)
        record.unlink(missing_ok=True)
        made = io.BytesIO()
        grid_of(pictures).save(made, format="PNG")
        write_whole(path, made.getvalue(), self.records)
        write_whole(record, json.dumps(self._expected(target)).encode())


@dataclass(frozen=True)
class Work:
    """An item of which something is to be made.

    Attributes:
        targets: all of its targets.
        missing: those that aren't made yet.
    """

    targets: Sequence[Target]
    missing: Sequence[Target]


def pending(tree: Tree, targets: Sequence[Target], rank: int = 0, world_size: int = 1) -> list[Work]:
    """What is left to do for one of several processes.

    Raises:
        TreeError: as `Tree.made`.
    """
    items: dict[str, list[Target]] = {}
    for target in targets:
        items.setdefault(target.item, []).append(target)
    own = [(item, [t for t in item if not tree.made(t)]) for item in list(items.values())[rank::world_size]]
    return [Work(item, missing) for item, missing in own if missing]


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
        drawn = draw(first.prompt, first.images, [sample_seed(seed, first.prompt, k) for _, k in samples])
        for target in item.missing:
            tree.write(target, [p for (owner, _), p in zip(samples, drawn, strict=True) if owner == target])
            yield target
