"""Making the parts that a YAML names by `_target_`; what is wrong with a part is said in one message."""

import inspect
import re
import traceback
from collections.abc import Sequence
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

from tbac.app.errors import USER_ERRORS, find_cause

OURS = ("tbac.", "experiments.", "data_prep.", "lightning.")


def make_part(part: DictConfig, option: str, partial: bool = False, **arguments: Any) -> Any:
    """Make what a part of the config describes.

    Args:
        part: with `_target_`, the class or function, and its options.
        option: dotted name of the part, for messages.
        partial: whether the part is called later, so that its YAML must say `_partial_: true`.
        arguments: further ones.

    Raises:
        ValueError: when there is no such module or class, it can't be called with these options, or it refuses them.
    """
    target = part.get("_target_")
    if partial and not part.get("_partial_"):
        raise ValueError(f"{option} names {target} without _partial_: true; it is called later, with more arguments")
    try:
        return instantiate(part, **arguments)
    except InstantiationException as error:
        cause = find_cause(error)
        place = re.search(r"full_key: (\S+)", str(error))
        named = ".".join(dict.fromkeys([option, *([place[1]] if place else [])]))
        inner = _find_target(part, place[1] if place else "", option) or target
        if isinstance(cause, ImportError | AttributeError) and "locating target" in str(error):
            raise ValueError(f"{named}._target_={inner} can't be found ({_first_line(cause)})") from None
        if isinstance(cause, USER_ERRORS) and not isinstance(cause, InstantiationException):
            raise
        if isinstance(cause, TypeError) and _is_raised_by_the_call(cause):
            raise ValueError(f"{named}: {inner} can't be called with these options: {_first_line(cause)}") from None
        if not str(inner).startswith(OURS):
            raise ValueError(f"{named}: {inner} failed with {type(cause).__name__}: {_first_line(cause)}") from error
        raise


def check_target(part: DictConfig, option: str) -> None:
    """Raise ValueError for a part that is made later, when its class isn't there or doesn't take its options."""
    target = part.get("_target_")
    try:
        made_by = get_object(part._target_)
    except (ImportError, ValueError, TypeError) as error:
        raise ValueError(f"{option}._target_={target} can't be found ({_first_line(error)})") from None
    options = {str(name): None for name in part if not str(name).startswith("_")}
    try:
        inspect.signature(made_by).bind(**options)
    except TypeError as error:
        raise ValueError(f"{option}: {target} can't be called with these options: {_first_line(error)}") from None


def check_members(part: Any, names: Sequence[str], option: str) -> None:
    """Raise ValueError when an object lacks attributes or methods that its kind of part needs."""
    missing = [name for name in names if not hasattr(part, name)]
    if missing:
        raise ValueError(f"{option}: {type(part).__name__} lacks {', '.join(missing)}; it needs {', '.join(names)}")


def _find_target(part: DictConfig, place: str, option: str) -> Any:
    """Find the class that a part within a part names; None where the place isn't below the part."""
    below = place.removeprefix(option).strip(".")
    node = OmegaConf.select(part, below) if below else part
    return node.get("_target_") if isinstance(node, DictConfig) else None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _is_raised_by_the_call(error: BaseException) -> bool:
    """Whether a TypeError says that the arguments don't fit, and doesn't come from inside of what was called."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and "hydra" in frames[-1].filename
