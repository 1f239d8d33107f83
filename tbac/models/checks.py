"""Checks of a model's options: each raises ValueError that names the option, its value and what is accepted.

Like the options themselves these need neither torch nor a model library.
"""

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from tbac.files import shorten

DTYPE_NAMES = ("float32", "bfloat16", "float16")
QUANTIZATIONS = ("nf4", "int8")
SCHEDULERS = (  # of diffusers: those that can follow a flow
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
)
LARGEST_WHOLE = 2**63  # the integers of torch end before it


def is_number(value: Any) -> bool:
    """Whether a value is a number, and not true or false."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number of any library, and not true or false."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_count(value: Any) -> bool:
    """Whether a value is a whole number of at least 1."""
    return is_whole(value) and int(value) >= 1


def check_whole(name: str, value: Any, minimum: int) -> None:
    """Raise ValueError unless a value is a whole number of at least `minimum` that torch can hold."""
    if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value < LARGEST_WHOLE:
        raise ValueError(f"{name} must be at least {minimum}, a whole number; got {value!r}")


def check_flag(name: str, value: Any) -> None:
    """Raise ValueError unless a value is true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")


def check_text(name: str, value: Any) -> None:
    """Raise ValueError unless a value is a text that isn't empty."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} must be a text, got {value!r}")


def check_precision(prefix: str, dtype: Any, quantization: Any) -> None:
    """Raise ValueError for an unknown type or quantisation; `prefix` stands before the options' names in messages."""
    if dtype not in DTYPE_NAMES:
        raise ValueError(f"{prefix}dtype must be one of {', '.join(DTYPE_NAMES)}; got {dtype!r}")
    if quantization is not None and quantization not in QUANTIZATIONS:
        raise ValueError(f"{prefix}quantization must be null, {' or '.join(QUANTIZATIONS)}; got {quantization!r}")


def check_scheduler(config: Mapping[str, Any]) -> None:
    """Raise ValueError for a scheduler config that names a class outside the fixed list."""
    name = config.get("_class_name")
    if name not in SCHEDULERS:
        raise ValueError(
            f"the scheduler config names the class {name!r}; it must be one of diffusers' {', '.join(SCHEDULERS)}"
        )


def check_plain(values: Any, place: str) -> None:
    """Raise ValueError when a config from a file isn't plain data, or names something to be imported or called.

    Args:
        values: the config, or a part of it.
        place: dotted name of `values`, for the message.
    """
    if isinstance(values, Mapping):
        for key, value in values.items():
            if key == "_target_":
                raise ValueError(
                    f"{place} names _target_={value!r}; a config in a file is data, and nothing that it names is "
                    "imported or called"
                )
            check_plain(value, f"{place}.{key}")
    elif isinstance(values, list | tuple):
        for index, value in enumerate(values):
            check_plain(value, f"{place}[{index}]")
    elif not isinstance(values, str | int | float | None):
        raise ValueError(f"{place} must be plain data, such as a text or a number; got {shorten(values)}")


def check_keys(values: Any, accepted: Sequence[str], place: str) -> None:
    """Raise ValueError unless `values` is a mapping with none but the accepted keys."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{place} must be a mapping, got {values!r}")
    unknown = sorted(str(key) for key in values if key not in accepted)
    if unknown:
        raise ValueError(f"{place} has the unknown key {unknown[0]!r}; it may have {', '.join(accepted)}")
