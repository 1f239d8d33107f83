"""Finding training checkpoints, checking what training needs of one, and loading its weights into a model."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tbac.files import ForeignFileError, reading, shorten
from tbac.models import UniImage
from tbac.models.checkpoint_file import FACTS, WEIGHTS, WRITTEN, find_newest, list_checkpoints, read_checkpoint
from tbac.models.export import make_absolute
from tbac.models.lora import fit_saved
from tbac.models.saved import SavedModel, check_frozen
from tbac.training.randomness import check_random_state

REFERENCE = "denoiser.reference_embed."
TRANSITION, DATA = "StageTransition", "StagedDataModule"  # names of the classes whose state a checkpoint holds
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW: the mean of the gradients, and that of their squares
log = logging.getLogger(__name__)


def find_newest_readable(
    folder: str | Path, check: Callable[[dict[str, Any], str], None] | None = None
) -> tuple[Path, dict[str, Any]] | None:
    """Find the checkpoint of a run folder that has the most steps and is whole; returns its path and its content.

    Newer ones that can't be used are skipped with a warning.

    Args:
        folder: the run folder.
        check: raises ValueError for one that lacks what else is needed, such as `check_resumable`.
    """
    if not list_checkpoints(Path(folder)):
        return None
    try:
        return find_newest(Path(folder), check=check)
    except ForeignFileError:  # each has been warned of
        return None


def find_newest_checkpoint(root: str | Path, stage: str) -> Path | None:
    """Find the newest checkpoint of `stage` anywhere under `root` that is whole.

    In each run folder it is the one of the most steps. Of several run folders it is that whose checkpoint was written
    last, by what the checkpoint says of itself.
    """

    def is_of_stage(checkpoint: dict[str, Any], place: str) -> None:
        if checkpoint[FACTS].get("stage") != stage:
            raise ForeignFileError(f"{place} is of stage {checkpoint[FACTS].get('stage')}, not {stage}")

    newest: dict[Path, float] = {}
    for folder in sorted({file.parent.parent for file in Path(root).glob(f"**/checkpoints/{stage}-step=*.ckpt")}):
        found = _find_in_folder(folder, f"{stage}-step=*.ckpt", is_of_stage)
        if found is not None:
            file, checkpoint = found
            newest[file] = checkpoint[FACTS].get(WRITTEN, file.stat().st_mtime)
    return max(newest, key=lambda file: (newest[file], file.name), default=None)


def _find_in_folder(
    folder: Path, pattern: str, check: Callable[[dict[str, Any], str], None]
) -> tuple[Path, dict[str, Any]] | None:
    try:
        return find_newest(folder, check=check, pattern=pattern)
    except ForeignFileError:
        return None


def check_resumable(checkpoint: Mapping[str, Any], place: str) -> None:
    """Check that a checkpoint holds what training goes on with, in the right types.

    Args:
        checkpoint: what `read_checkpoint` returned.
        place: its file, for messages.

    Raises:
        ForeignFileError: naming what is missing or of a wrong type.
    """
    facts = checkpoint[FACTS]
    # What says where the run is.
    callbacks = _take(checkpoint, "callbacks", dict, place)
    progress = _take(callbacks, TRANSITION, dict, place)
    position = _take(checkpoint, DATA, dict, place)
    wanted: list[tuple[Mapping[str, Any], str, type | tuple[type, ...]]] = [
        (facts, "stage", str),
        (facts, "steps", int),
        (facts, "random", list),
        (progress, "stale", int),
        (progress, "best", (int, float)),
        (progress, "first", (int, float, type(None))),
        (progress, "last", (int, float, type(None))),
        (progress, "history", list),
        (position, "position", int),
        (position, "sources", list),
    ]
    for values, name, kind in wanted:
        value = _take(values, name, kind, place)
        if kind is int and value < 0:
            raise ForeignFileError(f"{place}: {name} must be at least 0, got {shorten(value)}")
    for report in progress["history"]:
        _take({"history": report}, "history", dict, place)
        _take(report, "name", str, place)
        _take(report, "steps", int, place)
    for source in position["sources"]:
        _take({"sources": source}, "sources", dict, place)
        for name, kind in (("path", str), ("split", str), ("samples", int), ("drawn", int)):
            _take(source, name, kind, place)
    with reading(place):
        check_random_state(facts["random"])
    # Optimizer and schedule.
    _check_optimizer(checkpoint, place)
    _take(_take_only(checkpoint, "lr_schedulers", place), "last_epoch", int, place)


def _check_optimizer(checkpoint: Mapping[str, Any], place: str) -> None:
    """Check the optimizer's state: moments of the shapes of the parameters that they belong to, none below zero."""
    names = _take(checkpoint[FACTS], "optimized", list, place)
    weights = checkpoint.get("current_model_state", checkpoint[WEIGHTS])
    if not all(isinstance(name, str) and name in weights for name in names):
        raise ForeignFileError(f"{place}: {FACTS}.optimized must name tensors of {WEIGHTS}, got {shorten(names)}")
    optimizer = _take_only(checkpoint, "optimizer_states", place)
    for group in _take(optimizer, "param_groups", list, place):
        options = _take({"param_groups": group}, "param_groups", dict, place)
        _take(options, "params", list, place)
        _take(options, "lr", (int, float), place)
    states = _take(optimizer, "state", dict, place)
    for values in states.values():
        _take({"state": values}, "state", dict, place)
    needed = [name for name in MOMENTS if any(name in values for values in states.values())]
    for index, values in states.items():
        if not isinstance(index, int) or not 0 <= index < len(names):
            raise ForeignFileError(f"{place}: the optimizer has state of a parameter {shorten(index)} that there isn't")
        for name in needed:
            _check_moment(name, values.get(name), names[index], tuple(weights[names[index]].shape), place)


def _check_moment(name: str, moment: Any, parameter: str, shape: tuple[int, ...], place: str) -> None:
    """Check that a moment has the shape of its parameter, and that none of a second moment's numbers is below zero."""
    if not isinstance(moment, Tensor) or not moment.is_floating_point() or tuple(moment.shape) != shape:
        found = tuple(moment.shape) if isinstance(moment, Tensor) else shorten(moment)
        raise ForeignFileError(f"{place}: {name} of {parameter} must be a tensor of shape {shape}, got {found}")
    if name == MOMENTS[1] and moment.numel() and moment.min() < 0:
        raise ForeignFileError(f"{place}: {name} of {parameter} holds numbers below zero")


def _take(values: Mapping[str, Any], name: str, kind: type | tuple[type, ...], place: str) -> Any:
    """Take a value of one of these types out of a mapping; raise ForeignFileError if it isn't there or is another."""
    value = values.get(name, _take)
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        found = "there is none" if value is _take else f"got {shorten(value)}"
        expected = " or ".join(k.__name__ for k in kinds)
        raise ForeignFileError(f"{place}: {name} must be of type {expected}, {found}")
    return value


def _take_only(checkpoint: Mapping[str, Any], name: str, place: str) -> Any:
    """Take the one mapping out of a list: there is one optimizer, with one schedule."""
    values = _take(checkpoint, name, list, place)
    if len(values) != 1 or not isinstance(values[0], Mapping):
        raise ForeignFileError(f"{place}: {name} must hold one mapping, got {shorten(values)}")
    return values[0]


def read_resumable(file: str | Path) -> dict[str, Any]:
    """Read a checkpoint that training shall go on from.

    Raises:
        ForeignFileError: as `read_checkpoint` and `check_resumable` do.
    """
    return read_checkpoint(file, check=check_resumable)


def read_optimizer_state(checkpoint: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Read the optimizer's state of each parameter, by the parameter's name.

    Raises:
        ForeignFileError: when the checkpoint holds no such state.
    """
    _check_optimizer(checkpoint, "the checkpoint")
    state = checkpoint["optimizer_states"][0]["state"]
    return {name: state[i] for i, name in enumerate(checkpoint[FACTS]["optimized"]) if i in state}


def load_weights(saved: SavedModel, model: UniImage) -> None:
    """Load the weights of a saved model into `model`, to train it further.

    The two may have different options, so that a model can be tuned with an option that it was trained without. A model
    that reads references may begin from one that doesn't: their embedding then starts at zero, and changes nothing.

    Raises:
        ValueError: for other frozen parts, other taps, or any missing, unexpected or misshapen tensor, by name.
    """
    config = model.provenance.config
    # Other word embeddings, frozen parts or taps would make the weights worthless without any error.
    if saved.prompt_embeddings is not None and model.mllm.prompt_embeddings is None:
        raise ValueError(
            f"init={saved.origin} reads prompts with a table of its own; give model.prompt_embeddings={saved.origin} "
            "as well"
        )
    check_frozen(saved.frozen_digests or {}, model.provenance.digests, saved.origin)
    if saved.config.taps != config.taps:
        raise ValueError(
            f"{saved.origin} was trained with taps {saved.config.describe_taps()}, this model has "
            f"{config.describe_taps()}"
        )
    # Other options are allowed, but the user should know of them.
    changed = config.list_changes_since(saved.config)
    if changed:
        log.warning("%s was trained with other options: %s", saved.origin, ", ".join(changed))
    # Adapters are kept as they are, or become part of the matrices where this model has others or none.
    state = fit_saved(saved, config, model.get_trained_state())
    if model.denoiser.reference_embed is not None and not any(name.startswith(REFERENCE) for name in state):
        log.warning("%s was trained without references: their embedding starts at zero", saved.origin)
        state |= {name: tensor for name, tensor in model.get_trained_state().items() if name.startswith(REFERENCE)}
    model.load_trained_state(state, saved.origin)


def describe_model(model: UniImage) -> dict[str, Any]:
    """Describe the model for a checkpoint: everything besides its tensors.

    Folders get absolute paths, so that they are found wherever the checkpoint is opened on this machine.
    """
    values = model.provenance.config.to_dict()
    for part in ("mllm", "denoiser", "prompt_embeddings"):
        if values[part] is not None:
            values[part] = make_absolute(values[part])
    return {"frozen": model.provenance.digests, "config": {"model": values}}
