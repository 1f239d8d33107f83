"""A checkpoint from anywhere is whole and of the right types, or it is named; the newest is found by its steps."""

import copy
import functools
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tbac.files import ForeignFileError
from tbac.models import UniImage
from tbac.models.checkpoint_file import compute_digests, list_tensors, read_checkpoint
from tbac.models.saved import read_saved_model
from tbac.training.checkpoints import check_resumable, find_newest_checkpoint, find_newest_readable, read_resumable

NEWEST = "t2i_pretrain-step=2.ckpt"


@functools.cache
def read_small(file: Path) -> dict[str, Any]:
    """A training's checkpoint with its first four parameters alone, so that hundreds can be written."""
    whole = torch.load(file, weights_only=True)
    kept = whole["tbac"]["optimized"][:4]
    whole["tbac"] |= {"optimized": kept}
    for part in ("state_dict", "current_model_state"):
        if part in whole:
            whole[part] = {name: whole[part][name].clone() for name in kept}
    optimizer = whole["optimizer_states"][0]
    optimizer["state"] = {index: optimizer["state"][index] for index in range(4)}
    unsigned = without_digests(whole)
    return unsigned | {"tbac": {**unsigned["tbac"], "digests": compute_digests(unsigned)}}


@pytest.fixture
def file(request: pytest.FixtureRequest, session_folder: Path) -> Path:
    """A checkpoint of two steps in the run folder `run`, with a link beside it."""
    trained = session_folder / "trained" / "run" / "checkpoints" / NEWEST
    if not trained.exists():
        request.getfixturevalue("trained_run")
        shutil.rmtree("run")
    file = Path("run", "checkpoints", NEWEST).absolute()
    file.parent.mkdir(parents=True)
    torch.save(read_small(trained), file)
    (file.parent / "last.ckpt").symlink_to(file.name)
    return file


def make_endless() -> list[Any]:
    values: list[Any] = []
    values.append(values)
    return values


def make_doubling() -> list[Any]:
    values: list[Any] = [0]
    for _ in range(60):
        values = [values, values]
    return values


# What may stand in place of something else. Each is a plain value that `weights_only` lets through.
VALUES: dict[str, Any] = {
    "null": None,
    "true": True,
    "negative": -1,
    "huge": 10**5000,
    "NaN": float("nan"),
    "text": "text",
    "list": [1, [2]],
    "empty list": [],
    "mapping": {"a": 1},
    "empty mapping": {},
    "endless": make_endless(),
    "doubling": make_doubling(),
    "tensor": torch.zeros(2),
    "sparse": torch.zeros(2, 2).to_sparse(),
    "complex": torch.zeros(2, dtype=torch.complex64),
    "whole numbers": torch.zeros(2, dtype=torch.int8),
    "much from little": torch.zeros(1).expand(2**40),
}
OPTIMIZER = ("optimizer_states", 0)
PROGRESS = ("callbacks", "StageTransition")
# Places in a checkpoint -> values that are fine there.
PLACES: dict[tuple[Any, ...], tuple[str, ...]] = {
    ("tbac",): (),
    ("tbac", "frozen"): ("empty mapping",),  # refused when the digests are compared
    ("tbac", "frozen", "mllm"): (),
    ("tbac", "config"): (),
    ("tbac", "config", "model"): (),
    ("tbac", "config", "model", "taps"): (),
    ("tbac", "config", "model", "ladder"): ("empty mapping",),
    ("tbac", "config", "model", "num_queries"): (),
    ("tbac", "config", "model", "mllm"): ("text",),
    ("tbac", "config", "model", "architecture"): ("null", "empty mapping"),
    ("tbac", "stage"): ("text",),
    ("tbac", "steps"): (),
    ("tbac", "optimized"): (),
    ("tbac", "random"): ("empty list",),
    ("tbac", "random", 0): (),
    ("tbac", "random", 0, "torch"): (),
    ("tbac", "random", 0, "python"): (),
    ("tbac", "random", 0, "numpy"): (),
    ("tbac", "written"): ("NaN",),
    ("global_step",): (),
    ("state_dict",): (),
    ("state_dict", "ladder.queries"): ("tensor", "much from little"),  # of another shape: refused beside the model
    ("optimizer_states",): (),
    OPTIMIZER: (),
    (*OPTIMIZER, "state"): ("empty mapping",),
    (*OPTIMIZER, "state", 0): (),
    (*OPTIMIZER, "state", 0, "exp_avg"): (),
    (*OPTIMIZER, "state", 1, "exp_avg_sq"): (),
    (*OPTIMIZER, "param_groups"): ("empty list",),
    (*OPTIMIZER, "param_groups", 0): (),
    (*OPTIMIZER, "param_groups", 0, "lr"): ("negative", "huge", "NaN"),
    ("lr_schedulers",): (),
    ("lr_schedulers", 0): (),
    ("callbacks",): (),
    PROGRESS: (),
    (*PROGRESS, "stale"): (),
    (*PROGRESS, "best"): ("negative", "huge", "NaN"),
    (*PROGRESS, "history"): ("empty list",),
    ("StagedDataModule",): (),
    ("StagedDataModule", "position"): (),
    ("StagedDataModule", "sources"): ("empty list",),
}
PLAIN_NUMBERS = [("tbac", "steps"), (*PROGRESS, "stale"), ("StagedDataModule", "position")]


def list_mistakes(place: tuple[Any, ...]) -> list[str]:
    """Names of the values that are wrong at a place."""
    fine = (*PLACES[place], "huge") if place in PLAIN_NUMBERS else PLACES[place]
    return [name for name in VALUES if name not in fine]


def put(checkpoint: dict[str, Any], place: tuple[Any, ...], value: Any) -> None:
    *above, last = place
    target: Any = checkpoint
    for key in above:
        target = target[key]
    target[last] = value


def without_digests(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint as another version may have written it."""
    return checkpoint | {"tbac": {name: value for name, value in checkpoint["tbac"].items() if name != "digests"}}


def write_changed(file: Path, change: Callable[[dict[str, Any]], None], signed: bool = False) -> None:
    """Write the checkpoint with a change; what isn't signed has no digests, as one of another version."""
    checkpoint = torch.load(file, weights_only=True)
    if not signed:
        checkpoint = without_digests(checkpoint)
    change(checkpoint)
    file.unlink()
    torch.save(checkpoint, file)


def assert_named(error: pytest.ExceptionInfo[ValueError], file: Path) -> None:
    text = str(error.value)
    assert str(file) in text
    assert "\n" not in text
    assert len(text) < 700 + len(str(file))
    assert "weights_only=" not in text


def change_at(values: Any, place: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Any:
    """A copy of values within values in which `change(container, key)` has changed one place; the rest is shared."""
    key, *below = place
    changed = copy.copy(values)
    if below:
        changed[key] = change_at(values[key], tuple(below), change)
    else:
        change(changed, key)
    return changed


def try_to_read_all(checkpoint: dict[str, Any], file: Path) -> None:
    torch.save(checkpoint, file)
    read_saved_model(read_resumable(file), str(file))


@pytest.mark.parametrize("place", PLACES, ids=lambda place: ".".join(map(str, place)))
def test_a_checkpoint_of_wrong_types_is_named_before_anything_is_built(file: Path, place: tuple[Any, ...]) -> None:
    whole = without_digests(torch.load(file, weights_only=True))
    for name in list_mistakes(place):
        target = Path("changed.ckpt").absolute()
        changed = change_at(whole, place, lambda values, key, name=name: values.__setitem__(key, VALUES[name]))
        with pytest.raises(ForeignFileError) as error:
            try_to_read_all(changed, target)
        assert_named(error, target)


MAY_BE_MISSING = (("global_step",), ("tbac", "written"), ("tbac", "config", "model", "architecture"))
MISSED_BESIDE_THE_MODEL = (("tbac", "frozen", "mllm"), ("state_dict", "ladder.queries"))


@pytest.mark.parametrize(
    "place",
    [p for p in PLACES if p not in (*MAY_BE_MISSING, *MISSED_BESIDE_THE_MODEL)],
    ids=lambda p: ".".join(map(str, p)),
)
def test_a_checkpoint_that_lacks_a_part_is_named(file: Path, place: tuple[Any, ...]) -> None:
    whole = without_digests(torch.load(file, weights_only=True))
    target = Path("changed.ckpt").absolute()
    if place[-1] in ("num_queries", 0, 1):
        pytest.skip("an option has a value of its own, and a list only becomes shorter")
    with pytest.raises(ForeignFileError) as error:
        try_to_read_all(change_at(whole, place, lambda values, key: values.pop(key)), target)
    assert_named(error, target)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "place",
    [("state_dict", "ladder.queries"), (*OPTIMIZER, "state", 0, "exp_avg"), (*OPTIMIZER, "state", 2, "exp_avg_sq")],
)
@pytest.mark.parametrize("signed", [True, False])
def test_one_number_that_isn_t_finite_is_named_with_its_tensor(
    file: Path, place: tuple[Any, ...], value: float, signed: bool
) -> None:
    def spoil(checkpoint: dict[str, Any]) -> None:
        target: Any = checkpoint
        for key in place:
            target = target[key]
        target.view(-1)[-1] = value

    write_changed(file, spoil, signed)
    with pytest.raises(ForeignFileError, match=str(place[-1])) as error:
        read_resumable(file)
    assert_named(error, file)


def are_equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    first, second = dict(list_tensors(one, "x")), dict(list_tensors(other, "x"))
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def try_to_read(file: Path) -> tuple[dict[str, Any] | None, str]:
    try:
        return read_resumable(file), ""
    except ForeignFileError as error:
        return None, str(error)


def test_no_flipped_bit_passes_unnoticed(file: Path) -> None:
    """Wherever the bit lies: it is noticed and named, or it changes nothing of what is read."""
    whole, content = copy.deepcopy(read_resumable(file)), file.read_bytes()
    rng = random.Random(0)
    # Anywhere in the file, and more in the first and the last part, where the plain values lie.
    places = [rng.randrange(len(content)) for _ in range(30)]
    places += [rng.randrange(4000) for _ in range(20)] + [len(content) - 1 - rng.randrange(4000) for _ in range(30)]
    noticed = 0
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << rng.randrange(8)
        file.unlink()
        file.write_bytes(damaged)
        checkpoint, message = try_to_read(file)
        if checkpoint is None:
            assert str(file) in message
            noticed += 1
        else:
            assert are_equal(whole, checkpoint), f"bit of byte {place}"
            assert checkpoint["tbac"]["config"] == whole["tbac"]["config"]
    assert noticed > 60


@pytest.mark.parametrize("place", [("state_dict", "ladder.queries"), (*OPTIMIZER, "state", 0, "exp_avg")])
def test_a_tensor_that_was_changed_is_named_although_the_file_is_whole(file: Path, place: tuple[Any, ...]) -> None:
    def flip(checkpoint: dict[str, Any]) -> None:
        target: Any = checkpoint
        for key in place:
            target = target[key]
        target.view(-1).view(torch.int32)[7] ^= 1

    write_changed(file, flip, signed=True)
    with pytest.raises(ForeignFileError, match=rf"is damaged: {'.'.join(map(str, place))} isn't what was written"):
        read_resumable(file)


def test_a_tensor_too_many_or_too_few_is_named(file: Path) -> None:
    def rename(checkpoint: dict[str, Any]) -> None:
        checkpoint["optimizer_states"][0]["state"][0]["other"] = torch.zeros(1)

    write_changed(file, rename, signed=True)
    with pytest.raises(ForeignFileError, match=r"the tensor optimizer_states\.0\.state\.0\.other wasn't written"):
        read_resumable(file)


def test_what_only_draws_reads_only_the_weights(trained_run: Path) -> None:
    file = Path(trained_run) / "checkpoints" / NEWEST

    def spoil(checkpoint: dict[str, Any]) -> None:
        checkpoint["optimizer_states"][0]["state"][0]["exp_avg"].view(-1)[0] = float("nan")

    write_changed(file, spoil, signed=True)
    assert isinstance(read_checkpoint(file, only_weights=True)["state_dict"]["ladder.queries"], Tensor)
    assert isinstance(UniImage.from_checkpoint(file), UniImage)


# Which checkpoint of a run is the newest.


def copy_as(file: Path, step: int, change: Callable[[dict[str, Any]], None] = lambda checkpoint: None) -> Path:
    """A copy that says of itself that it has so many steps."""
    target = file.with_name(f"t2i_pretrain-step={step}.ckpt")
    shutil.copyfile(file, target)

    def say(checkpoint: dict[str, Any]) -> None:
        checkpoint["global_step"] = checkpoint["tbac"]["steps"] = step
        change(checkpoint)

    write_changed(target, say)
    return target


@pytest.mark.parametrize("newest_first", [True, False])
def test_the_newest_is_the_one_of_the_most_steps_whatever_its_date_and_links(file: Path, newest_first: bool) -> None:
    files = [file, copy_as(file, 10), copy_as(file, 9)]
    for age, path in enumerate(files if newest_first else files[::-1]):
        os.utime(path, (age, age))
    found = find_newest_readable(file.parent.parent, check_resumable)
    assert found is not None
    assert found[0] == files[1]
    # Links are gone, or point to an older one.
    for link in file.parent.glob("*.ckpt"):
        if link.is_symlink():
            link.unlink()
    assert read_checkpoint(file.parent.parent)["global_step"] == 10
    (file.parent / "last.ckpt").symlink_to(file.name)
    assert read_checkpoint(file.parent.parent)["global_step"] == 10


def spoil_facts(checkpoint: dict[str, Any]) -> None:
    checkpoint["tbac"] = None


def spoil_weights(checkpoint: dict[str, Any]) -> None:
    checkpoint["state_dict"]["ladder.queries"][0] = float("nan")


def spoil_moments(checkpoint: dict[str, Any]) -> None:
    checkpoint["optimizer_states"][0]["state"][0]["exp_avg"] = "text"


def spoil_progress(checkpoint: dict[str, Any]) -> None:
    del checkpoint["callbacks"]["StageTransition"]


@pytest.mark.parametrize("spoil", [spoil_facts, spoil_weights, spoil_moments, spoil_progress, None])
def test_a_bad_newest_one_is_passed_over(
    file: Path, spoil: Callable[[dict[str, Any]], None] | None, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = copy_as(file, 7), copy_as(file, 10, spoil or (lambda checkpoint: None))
    if spoil is None:
        bad.write_bytes(bad.read_bytes()[:-1000])
    found = find_newest_readable(file.parent.parent, check_resumable)
    assert found is not None
    assert found[0] == good
    assert str(bad) in caplog.text


def test_a_folder_without_a_good_one_says_what_is_wrong_with_each(file: Path) -> None:
    write_changed(file, spoil_weights)
    with pytest.raises(ForeignFileError, match=r"no checkpoint that can be read; .*ladder\.queries holds NaN"):
        read_checkpoint(file.parent.parent)
    assert find_newest_readable(file.parent.parent, check_resumable) is None


def test_of_several_runs_the_one_that_was_written_last_is_found_by_what_it_says(file: Path) -> None:
    runs = [shutil.copytree(file.parent.parent, f"runs/{name}", symlinks=True) for name in "ab"]
    for run, moment in zip(runs, (200.0, 100.0), strict=True):
        write_changed(Path(run, "checkpoints", NEWEST), lambda c, m=moment: put(c, ("tbac", "written"), m))
    os.utime(Path(runs[1], "checkpoints", NEWEST))  # copied later
    assert find_newest_checkpoint("runs", "t2i_pretrain") == Path(runs[0], "checkpoints", NEWEST)
    write_changed(Path(runs[0], "checkpoints", NEWEST), spoil_weights)
    assert find_newest_checkpoint("runs", "t2i_pretrain") == Path(runs[1], "checkpoints", NEWEST)
