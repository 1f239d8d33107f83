"""Trees of pictures: the same for any number of processes, whole or absent, and never mixed up."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tbac.evaluation.benchmarks.base import list_edit_targets
from tbac.evaluation.benchmarks.dpg import list_dpg_targets
from tbac.evaluation.benchmarks.geneval import list_geneval_targets, write_geneval_metadata
from tbac.evaluation.picture_tree import (
    Target,
    Tree,
    TreeError,
    derive_seed,
    generate,
    is_readable,
    join_grid,
    list_pending,
)
from tbac.files import write_whole

ROWS = [{"tag": "single_object", "prompt": f"a photo of {i} cats", "include": []} for i in range(7)]
SETTINGS = {"seed": 1, "checkpoint": "abc"}


def draw(prompt: str, images: Sequence[Path], seeds: Sequence[int]) -> list[Image.Image]:
    """Pictures that follow from their seeds and from what is drawn together."""
    first = np.random.default_rng(sum(seeds)).integers(0, 255, dtype=np.uint8)
    pixels = [np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8) ^ first for seed in seeds]
    return [Image.fromarray(p) for p in pixels]


def make(root: Path, targets: Sequence[Target], world_size: int = 1, stop: int = 10**9) -> None:
    """Make a tree with several processes, of which each stops after so many files."""
    for rank in range(world_size):
        tree = Tree(root, SETTINGS)
        for count, _ in enumerate(generate(tree, list_pending(tree, targets, rank, world_size), draw, 1), 1):
            if count == stop:
                break


def missing(tree: Tree, targets: Sequence[Target]) -> list[Target]:
    return [target for work in list_pending(tree, targets) for target in work.missing]


def content(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "targets", [list_geneval_targets(ROWS), list_dpg_targets({f"p{i}": f"text {i}" for i in range(5)})]
)
@pytest.mark.parametrize("world_size", [2, 3, 50])
def test_the_tree_doesnt_depend_on_the_number_of_processes(
    tmp_path: Path, targets: list[Target], world_size: int
) -> None:
    make(tmp_path / "one", targets)
    make(tmp_path / "many", targets, world_size)
    assert content(tmp_path / "many") == content(tmp_path / "one")
    assert len(content(tmp_path / "one")) == len(targets)


@pytest.mark.parametrize("stop", [1, 5, 12])
def test_an_interrupted_tree_is_completed(tmp_path: Path, stop: int) -> None:
    targets = list_geneval_targets(ROWS)
    make(tmp_path / "whole", targets)
    make(tmp_path / "cut", targets, stop=stop)
    assert len(content(tmp_path / "cut")) == stop
    tree = Tree(tmp_path / "cut", SETTINGS)
    assert len(missing(tree, targets)) == len(targets) - stop
    make(tmp_path / "cut", targets)
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


def test_the_layouts_are_those_of_the_scorers(tmp_path: Path) -> None:
    write_geneval_metadata(ROWS, tmp_path)
    make(tmp_path, list_geneval_targets(ROWS, 2))
    assert sorted(content(tmp_path))[:3] == [
        "00000/metadata.jsonl",
        "00000/samples/00000.png",
        "00000/samples/00001.png",
    ]
    assert [t.path for t in list_dpg_targets({"a b": "x"})] == ["a b.png"]
    source = tmp_path / "source.png"
    assert list_edit_targets({"12": ("make it red", source)}) == [
        Target("12.png", "12", "make it red", (0,), (source,))
    ]


def test_nothing_of_ours_lies_in_the_tree(tmp_path: Path) -> None:
    make(tmp_path / "tree", list_geneval_targets(ROWS, 1))
    assert {Path(name).suffix for name in content(tmp_path / "tree")} == {".png"}
    assert len(content(tmp_path / "tree.records")) == len(ROWS)


def test_a_corrupt_picture_is_made_anew(tmp_path: Path) -> None:
    targets = list_geneval_targets(ROWS, 1)
    make(tmp_path / "tree", targets)
    before, broken = content(tmp_path / "tree"), tmp_path / "tree" / targets[3].path
    broken.write_bytes(broken.read_bytes()[:60])
    assert not is_readable(broken)
    assert missing(Tree(tmp_path / "tree", SETTINGS), targets) == [targets[3]]
    make(tmp_path / "tree", targets)
    assert content(tmp_path / "tree") == before


def test_pictures_made_otherwise_are_refused(tmp_path: Path) -> None:
    targets = list_geneval_targets(ROWS, 1)
    make(tmp_path / "tree", targets)
    other = Tree(tmp_path / "tree", SETTINGS | {"checkpoint": "def"})
    with pytest.raises(TreeError, match=r"was made otherwise \(checkpoint abc -> def\); give another folder"):
        list_pending(other, targets)
    changed = [Target(targets[0].path, targets[0].item, "another prompt")]
    with pytest.raises(TreeError, match="prompt a photo of 0 cats -> another prompt"):
        list_pending(Tree(tmp_path / "tree", SETTINGS), changed)
    (tmp_path / "tree.records" / f"{targets[0].path}.json").unlink()
    with pytest.raises(TreeError, match="wasn't made here"):
        list_pending(Tree(tmp_path / "tree", SETTINGS), targets)
    assert len(list_pending(Tree(tmp_path / "tree", SETTINGS | {"checkpoint": "def"}, overwrite=True), targets)) == 7


def test_another_source_picture_is_noticed(tmp_path: Path) -> None:
    source = tmp_path / "source.png"
    Image.new("RGB", (4, 4), "red").save(source)
    targets = list_edit_targets({"a": ("make it blue", source)})
    make(tmp_path / "tree", targets)
    assert list_pending(Tree(tmp_path / "tree", SETTINGS), targets) == []
    Image.new("RGB", (4, 4), "green").save(source)
    with pytest.raises(TreeError, match="images"):
        list_pending(Tree(tmp_path / "tree", SETTINGS), targets)


def test_a_grid_is_read_row_by_row() -> None:
    colors = ["red", "lime", "blue", "white"]
    whole = join_grid([Image.new("RGB", (3, 2), c) for c in colors])
    assert whole.size == (6, 4)
    corners = [whole.getpixel(place) for place in ((0, 0), (5, 0), (0, 3), (5, 3))]
    assert corners == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]


def test_seeds_are_functions_of_seed_prompt_and_sample() -> None:
    seeds = {derive_seed(s, p, k) for s in (0, 1) for p in ("a", "b") for k in (0, 1)}
    assert len(seeds) == 8
    assert derive_seed(0, "a", 0) == derive_seed(0, "a", 0)
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("path", ["../a.png", "a/../../b.png", "/tmp/a.png", "", "..", "a/"])
def test_a_picture_stays_inside_its_tree(path: str) -> None:
    with pytest.raises(ValueError, match="must stay inside its folder"):
        Target(path, "item", "a red circle", (0,))


def test_a_picture_whose_writing_was_cut_off_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between picture and record, which leaves a picture without one."""
    tree, target = Tree(tmp_path / "tree", {"seed": 1}), Target("a.png", "item", "a red circle", (0,))
    written = []

    def write_one(path: Path, *arguments: Any) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(path)
        write_whole(path, *arguments)

    monkeypatch.setattr("tbac.evaluation.picture_tree.write_whole", write_one)
    with pytest.raises(KeyboardInterrupt):
        tree.write(target, [Image.new("RGB", (8, 8))])
    monkeypatch.undo()
    assert (tmp_path / "tree/a.png").is_file()
    assert not tree.is_made(target)
    tree.write(target, [Image.new("RGB", (8, 8))])
    assert tree.is_made(target)
