"""What a run that goes on may change since its checkpoint: each change is applied and said, or refused by its name."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from tbac.files import shorten
from tbac.models.config import FIXED_IN_TRAINING, ModelConfig
from tbac.models.saved import FACTS

log = logging.getLogger(__name__)

# What a run can't change: weights, moments and the state of a schedule or a rule belong to what it began with.
FIXED = (
    "stage.trainable",
    "stage.keep_optimizer",
    "optim._target_",
    "schedule._target_",
    "guard._target_",
    "callbacks.checkpoint.monitor",
)
FIXED_OF_THE_MODEL = tuple(f"model.{name}" for name in FIXED_IN_TRAINING)
# Where things lie, and what belongs to one start of a run.
NOT_COMPARED = ("run_dir", "init", "resume", "parent_run_id", "submit", "stages", "stage_overrides", "logger", "model")
NOT_COMPARED_OF_THE_MODEL = ("mllm", "denoiser", "prompt_embeddings", "architecture")  # parts are compared by digests
OF_PLACES = ("folder", "default_root_dir", "cache_dir", "plugins")


def compare_with_checkpoint(
    checkpoint: Mapping[str, Any], path: str, config: Mapping[str, Any], before: ModelConfig, now: ModelConfig
) -> list[str]:
    """Compare the options of a run that goes on with those of its checkpoint.

    Args:
        checkpoint: what the run goes on from.
        path: its file, for messages.
        config: all options of the stage, as plain values.
        before: the checkpoint's options of the model.
        now: the model's options of now, with its taps resolved.

    Returns:
        What has changed and can be applied, each `option before -> now`.

    Raises:
        ValueError: naming an option that can't change.
    """
    kept = checkpoint[FACTS].get("config", {})
    changes = [*_list_model_changes(before, now), *_list_changes(kept, config)]
    said: list[str] = []
    pairs = []
    for option, old, new in changes:
        pair = (old, new)
        if option in FIXED or option.startswith(FIXED_OF_THE_MODEL):
            raise ValueError(
                f"{option} is {shorten(new)}, and the run that {path} belongs to began with {shorten(old)}; a run that "
                f"goes on can't change it. For another one begin a run in a folder of its own, with init={path} for "
                "its weights"
            )
        # Most options of a stage and a machine reach the parts by interpolation, and are said once.
        if pair not in pairs:
            pairs.append(pair)
            said.append(f"{option} {shorten(old)} -> {shorten(new)}")
    return said


def _list_model_changes(before: ModelConfig, now: ModelConfig) -> Iterator[tuple[str, Any, Any]]:
    old, new = before.to_dict(), now.to_dict()
    for name, value in new.items():
        if name in NOT_COMPARED_OF_THE_MODEL or old[name] == value:
            continue
        if isinstance(value, Mapping) and isinstance(old[name], Mapping) and name == "ladder":
            for key in value:
                if old[name].get(key) != value[key]:
                    yield f"model.{name}.{key}", old[name].get(key), value[key]
            continue
        yield f"model.{name}", old[name], value


def _list_changes(kept: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """List option, value before and value now of what both have and what differs; `stage` and `machine` come first."""
    first = ("seed", "stage", "machine")
    for group in [*first, *(name for name in config if name not in first)]:
        if group not in NOT_COMPARED and group in kept and group in config:
            yield from _list_differences(kept[group], config[group], group)


def _list_differences(before: Any, now: Any, option: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in now:
            if key in before and key not in OF_PLACES:
                yield from _list_differences(before[key], now[key], f"{option}.{key}")
    elif before != now and not (isinstance(before, str) and before == str(now)):
        yield option, before, now


def warn_of_replaced_data(checkpoint: Mapping[str, Any], fingerprints: Mapping[str, str]) -> None:
    """Name the sources whose bytes aren't those that the checkpoint was trained on, under the same names."""
    kept = checkpoint[FACTS].get("data")
    if not isinstance(kept, Mapping):  # a checkpoint of before
        return
    for source, fingerprint in fingerprints.items():
        if source in kept and kept[source] != fingerprint:
            log.warning("%s holds other bytes than when this run began, under the same names", source)
