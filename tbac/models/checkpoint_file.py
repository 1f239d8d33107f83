"""Reading training checkpoints from anywhere: what is no checkpoint, is damaged or holds nonsense is named.

A checkpoint is a zip file with a pickle and the bytes of each tensor. It is read with `weights_only`, so nothing that
it names is imported or called. A digest of each tensor lies in the file itself, and everything else has the checksum of
the zip file, so that a flipped bit is noticed. What is newest follows from the steps that the files say, since copying
a file changes its date.
"""

import logging
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tbac.files import MAX_DEPTH, ForeignFileError, expand_path, reading, shorten
from tbac.models.weights import check_tensor, compute_digest

FACTS = "tbac"
DIGESTS = "digests"  # of all tensors, by their dotted names; among the facts
WRITTEN = "written"  # seconds since 1970 by the clock of whoever wrote it; among the facts
WEIGHTS = "state_dict"
FINITE = (f"{WEIGHTS}.", "current_model_state.", "optimizer_states.")  # a callback may keep an infinite number
MAX_PICKLE = 2**28  # bytes of everything that isn't a tensor
MAX_GROUPS, MAX_VALUES = 50_000, 10_000_000  # of lists and mappings, and of what these hold together
log = logging.getLogger(__name__)
Check = Callable[[dict[str, Any], str], None]


def read_checkpoint(path: str | Path, only_weights: bool = False, check: Check | None = None) -> dict[str, Any]:
    """Read a training checkpoint, and check what it holds.

    Args:
        path: the file, or a run folder whose newest whole checkpoint is meant.
        only_weights: check only those tensors that make the model, for a reader that doesn't train.
        check: raises ValueError for a checkpoint that lacks what else its reader needs; it gets the checkpoint and its
            file's name.

    Raises:
        ForeignFileError: when it doesn't exist, isn't a checkpoint of this project, or is damaged.
    """
    file = expand_path(path, "checkpoint")
    if file.is_dir():
        return find_newest(file, only_weights, check)[1]
    checkpoint = _open(file)
    check_contents(checkpoint, str(file))
    check_tensors(checkpoint, file, only_weights)
    if check is not None:
        check(checkpoint, str(file))
    return checkpoint


def find_newest(
    folder: Path, only_weights: bool = False, check: Check | None = None, pattern: str = "*.ckpt"
) -> tuple[Path, dict[str, Any]]:
    """Find the checkpoint of a run folder that has the most steps and is whole; returns its path and its content.

    Newer ones that can't be used are passed over with a warning.

    Args:
        folder: the run folder.
        only_weights: as in `read_checkpoint`.
        check: as in `read_checkpoint`.
        pattern: of the names of files that are looked at.

    Raises:
        ForeignFileError: when there is none.
    """
    files = list_checkpoints(folder, pattern)
    reasons: list[str] = []
    for file in sort_by_steps(files, reasons):
        try:
            return file, read_checkpoint(file, only_weights, check)
        except ValueError as error:
            pass_over(error, reasons)
    if not files:
        raise ForeignFileError(f"checkpoint {folder / 'checkpoints' / '*.ckpt'} doesn't exist")
    raise ForeignFileError("; ".join([f"{folder} holds no checkpoint that can be read", *reasons[:3]]))


def list_checkpoints(folder: Path, pattern: str = "*.ckpt") -> list[Path]:
    """List the checkpoints of a run folder; a link beside the file that it points to isn't counted."""
    found = [file for file in sorted((folder / "checkpoints").glob(pattern)) if file.is_file()]
    plain = [file for file in found if not file.is_symlink()]
    known = {file.resolve() for file in plain}
    return plain + [file for file in found if file.is_symlink() and file.resolve() not in known]


def sort_by_steps(files: list[Path], reasons: list[str]) -> list[Path]:
    """Sort checkpoints by the optimizer steps that they say, most first.

    Args:
        files: the checkpoints.
        reasons: those that can't be read are left out, with a warning, and why is added here.
    """
    steps = {}
    for file in files:
        try:
            checkpoint = _open(file)
            check_contents(checkpoint, str(file))
            steps[file] = checkpoint["global_step"]
        except ValueError as error:
            pass_over(error, reasons)
    # Two of the same step, such as one of before that says none, are sorted by the number in the name.
    return sorted(steps, key=lambda file: (steps[file], len(file.name), file.name), reverse=True)


def pass_over(error: ValueError, reasons: list[str]) -> None:
    """Warn of a checkpoint that can't be used, and add why to `reasons`."""
    log.warning("passing over a checkpoint: %s", error)
    reasons.append(str(error))


def check_contents(checkpoint: Any, place: str) -> None:
    """Raise ForeignFileError unless a checkpoint's parts have the right types; the numbers in its tensors aren't read.

    Args:
        checkpoint: what was read.
        place: the file, for messages.
    """
    if not isinstance(checkpoint, dict) or FACTS not in checkpoint or WEIGHTS not in checkpoint:
        raise ForeignFileError(f"{place} isn't a training checkpoint of tbac")
    for _ in list_tensors(checkpoint, place):  # nothing in it goes on without end
        pass
    for name in (FACTS, WEIGHTS):
        if not isinstance(checkpoint[name], Mapping):
            raise ForeignFileError(f"{place}: {name} must be a mapping, got {shorten(checkpoint[name])}")
    if not checkpoint[WEIGHTS]:
        raise ForeignFileError(f"{place}: {WEIGHTS} holds no tensor")
    for name, tensor in checkpoint[WEIGHTS].items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else shorten(tensor)
            raise ForeignFileError(f"{place}: {WEIGHTS}.{shorten(name)} must be a tensor of real numbers, got {kind}")
    facts = checkpoint[FACTS]
    for name, value in (("global_step", checkpoint.get("global_step", 0)), (f"{FACTS}.steps", facts.get("steps", 0))):
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
            raise ForeignFileError(f"{place}: {name} must be a number of steps, got {shorten(value)}")
    types: dict[str, type] = {"stage": str, DIGESTS: dict, WRITTEN: float}
    for name, expected in types.items():
        if name in facts and not isinstance(facts[name], expected):
            raise ForeignFileError(f"{place}: {FACTS}.{name} must be a {expected.__name__}, got {shorten(facts[name])}")
    checkpoint.setdefault("global_step", facts.get("steps", 0))


def check_tensors(checkpoint: Mapping[str, Any], file: Path, only_weights: bool) -> None:
    """Check every tensor of a checkpoint, by the digests in it or, where it has none, by the checksums of the zip file.

    Args:
        checkpoint: what was read from `file`.
        file: the file.
        only_weights: check only those tensors that make the model.

    Raises:
        ForeignFileError: naming the tensor that is damaged, isn't finite, is missing, or is no plain tensor.
    """
    checked = {WEIGHTS: checkpoint[WEIGHTS]} if only_weights else checkpoint
    tensors = dict(list_tensors(checked, str(file)))
    digests = checkpoint[FACTS].get(DIGESTS)
    if digests is None:
        check_checksums(file, tensors=True)
        digests = dict.fromkeys(tensors)
    else:
        digests = {name: value for name, value in digests.items() if not only_weights or name.startswith(f"{WEIGHTS}.")}
    for name in sorted({*digests, *tensors}, key=str):
        if name not in tensors:
            raise ForeignFileError(f"{file} is damaged: it lacks the tensor {shorten(name)}")
        if name not in digests:
            raise ForeignFileError(f"{file} is damaged: the tensor {shorten(name)} wasn't written by training")
        check_tensor(name, tensors[name], str(file), digests[name], finite=name.startswith(FINITE))


def list_tensors(values: Any, place: str) -> Iterator[tuple[str, Tensor]]:
    """List all tensors within mappings and lists, with dotted names such as `optimizer_states.0.state.3.exp_avg`.

    Args:
        values: what is searched.
        place: the file, for messages.

    Raises:
        ForeignFileError: when it is nested too deep or has too many values, as when a list contains itself.
    """
    waiting: list[tuple[str, Any, int]] = [("", values, 0)]
    groups = entries = 0
    while waiting:
        name, value, depth = waiting.pop()
        if isinstance(value, Tensor):
            yield name, value
            continue
        pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
        groups, entries = groups + 1, entries + len(value)
        if depth > MAX_DEPTH or groups > MAX_GROUPS or entries > MAX_VALUES:
            raise ForeignFileError(f"{place}: {shorten(name)} is nested too deep or holds too many values")
        for key, entry in pairs:
            if isinstance(entry, Tensor | Mapping | list | tuple | set | frozenset):
                waiting.append((f"{name}.{key}" if name else str(key), entry, depth + 1))


def compute_digests(checkpoint: Mapping[str, Any]) -> dict[str, str]:
    """Compute the digest of each tensor of a checkpoint, by its dotted name."""
    named = list_tensors(checkpoint, "the checkpoint")
    return {name: compute_digest([(name, tensor)]) for name, tensor in named}


def check_checksums(file: Path, tensors: bool) -> None:
    """Check the zip file that a checkpoint is: its parts aren't packed, have different names and the right checksums.

    Args:
        file: the checkpoint.
        tensors: also read the bytes of all tensors; otherwise only what is small.

    Raises:
        ForeignFileError: when it isn't such a file, or a checksum differs.
    """
    with reading(str(file), "a checkpoint"), zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if len({entry.filename for entry in entries}) != len(entries):
            raise ForeignFileError(f"{file} can't be read as a checkpoint (two of its parts have the same name)")
        for entry in entries:
            is_tensor = "/data/" in entry.filename
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ForeignFileError(f"{file} can't be read as a checkpoint ({entry.filename} is packed)")
            if not is_tensor and entry.file_size > MAX_PICKLE:
                raise ForeignFileError(f"{file} can't be read as a checkpoint ({entry.filename} is too large)")
            if is_tensor and not tensors:
                continue
            with archive.open(entry) as part:  # it compares the checksum when it comes to the end
                while part.read(2**24):
                    pass


def _open(file: Path) -> dict[str, Any]:
    """Open a checkpoint; its tensors are read when they are used."""
    if not file.is_file():
        raise ForeignFileError(f"checkpoint {file} doesn't exist")
    check_checksums(file, tensors=False)
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        # torch's own message advises to read the file without `weights_only`, which would run what it names.
        kind = type(error).__name__
        raise ForeignFileError(
            f"{file} can't be read as a checkpoint (it holds other things than tensors and plain values; {kind})"
        ) from error
