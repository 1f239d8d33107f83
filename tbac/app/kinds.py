"""Kinds of values: what an option accepts, in words and as a check.

A kind reads a plain value and returns the one that is meant: a single value where a list belongs becomes a list of one,
a whole number that is written as `1e3` becomes 1000, and `~` at the beginning of a path becomes the user's folder.
"""

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tbac.files import shorten

MOST_BYTES_OF_A_NAME = 255  # of a file or a folder, on common file systems
BITS = 64  # of the integers of libraries
LARGEST_SEED = 2**32 - 1  # the largest that every generator takes


class _Refused(ValueError):  # noqa: N818 (it never leaves `Kind.check`)
    """A value isn't of its kind.

    Args:
        detail: what more there is to say, or nothing.
        accepted: what is accepted, where the kind's own words would say too much: a number that is only too small.
    """

    def __init__(self, detail: str = "", accepted: str = "") -> None:
        super().__init__(detail)
        self.accepted = accepted


@dataclass(frozen=True)
class Kind:
    """What an option accepts.

    Attributes:
        accepted: in words, to follow "must be".
        read: returns the value that is meant, or raises `_Refused`.
        is_text: a value is text that a command line may give as it is, with any characters.
        is_list: a value is a list.
    """

    accepted: str
    read: Callable[[Any], Any]
    is_text: bool = False
    is_list: bool = False

    def check(self, name: str, value: Any) -> Any:
        """Return the value that is meant.

        Args:
            name: the option's dotted name, for the message.
            value: plain.

        Raises:
            ValueError: naming the option, the value and what is accepted.
        """
        try:
            return self.read(value)
        except _Refused as refused:
            detail = f" ({refused})" if str(refused) else ""
            accepted = refused.accepted or self.accepted
            raise ValueError(f"{name} must be {accepted}, got {_shorten(value)}{detail}") from None


def _shorten(value: Any) -> str:
    """Show a value for a message; texts in quotes, so that they differ from numbers."""
    return repr(shorten(value)) if isinstance(value, str) else shorten(value)


def _is_number(value: Any) -> bool:
    """Whether a value is a finite number that libraries can hold."""
    if isinstance(value, int):
        return not isinstance(value, bool) and value.bit_length() < BITS
    return isinstance(value, float) and math.isfinite(value)


def whole(minimum: int = 1, maximum: int | None = None) -> Kind:
    """A whole number between two bounds, both included."""
    bounds = f"at least {minimum}"
    bounds += f" and at most {maximum}" if maximum is not None else ""

    def read(value: Any) -> int:
        if not _is_number(value) or value != int(value) or not _is_number(int(value)):
            raise _Refused
        if value < minimum or (maximum is not None and value > maximum):
            raise _Refused(accepted=bounds)
        return int(value)

    return Kind(f"a whole number of {bounds}", read)


def seed() -> Kind:
    """A seed of random numbers."""
    return whole(0, LARGEST_SEED)


def number(
    least: float | None = None, most: float | None = None, above: float | None = None, below: float | None = None
) -> Kind:
    """A finite number; `least` and `most` are accepted themselves, `above` and `below` aren't."""
    limits = []
    for words, bound in (("at least", least), ("above", above), ("at most", most), ("below", below)):
        if bound is not None:
            limits.append(f"{words} {bound:g}")
    bounds = " and ".join(limits).replace("above 0", "positive") or "finite"

    def read(value: Any) -> float:
        if not _is_number(value):
            raise _Refused
        too_low = (least is not None and value < least) or (above is not None and value <= above)
        if too_low or (most is not None and value > most) or (below is not None and value >= below):
            raise _Refused(accepted=bounds)
        return value

    return Kind(f"a number, {bounds}", read)


def flag() -> Kind:
    """true or false."""

    def read(value: Any) -> bool:
        if not isinstance(value, bool):
            raise _Refused
        return value

    return Kind("true or false", read)


def choice(*names: Any) -> Kind:
    """One of some values."""

    def read(value: Any) -> Any:
        if not any(type(value) is type(name) and value == name for name in names):
            raise _Refused
        return value

    return Kind(f"one of {', '.join(map(str, names))}", read)


def _check_characters(value: str) -> str:
    """Return a text that files and libraries can hold."""
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise _Refused("it holds what isn't a character")
    return value


def some_of(*names: str) -> Kind:
    """A list of some of these names, each at most once."""

    def read(value: Any) -> list[str]:
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, Sequence) or not values:
            raise _Refused
        if any(not isinstance(entry, str) or entry not in names or values.count(entry) > 1 for entry in values):
            raise _Refused
        return list(values)

    return Kind(f"some of {list(names)}", read, is_list=True)


def text(empty: bool = False) -> Kind:
    """A text; an empty one only where that means something."""

    def read(value: Any) -> str:
        if not isinstance(value, str) or not (empty or value.strip()):
            raise _Refused
        return _check_characters(value)

    return Kind("a text" if empty else "a text that isn't empty", read, is_text=True)


def name() -> Kind:
    """A name that files and folders may have: letters, digits and `_`, `-`, `.`, and no path."""

    def read(value: Any) -> str:
        if not isinstance(value, str) or not re.fullmatch(r"\w[\w.-]*", value) or len(value.encode()) > 100:
            raise _Refused
        return value

    return Kind("a name of at most 100 letters, digits, '_', '-' and '.'", read)


def pattern(expression: str, accepted: str) -> Kind:
    """A text that a regular expression matches."""

    def read(value: Any) -> str:
        if not isinstance(value, str) or not re.fullmatch(expression, value):
            raise _Refused
        return value

    return Kind(accepted, read)


def _read_path(value: Any) -> str:
    """Expand `~`, and refuse what no file can be called."""
    if not isinstance(value, str) or not value.strip():
        raise _Refused
    expanded = os.path.expanduser(_check_characters(value))
    if expanded.startswith("~"):
        raise _Refused("there is no such user")
    if "://" not in expanded and any(len(os.fsencode(part)) > MOST_BYTES_OF_A_NAME for part in Path(expanded).parts):
        raise _Refused(f"a name in it is longer than {MOST_BYTES_OF_A_NAME} bytes")
    return expanded


def path() -> Kind:
    """The path of a file or folder, or a hub id; `~` is expanded."""
    return Kind("a path", _read_path, is_text=True)


def new_folder() -> Kind:
    """The path of a folder that is made where it is missing; what is a file, or lies below one, is refused."""

    def read(value: Any) -> str:
        expanded = _read_path(value)
        for place in (Path(expanded), *Path(expanded).parents):
            if place.exists() and not place.is_dir():
                raise _Refused(f"{place} is a file" if str(place) != expanded else "it is a file")
        return expanded

    return Kind("the path of a folder", read, is_text=True)


def optional(kind: Kind) -> Kind:
    """A kind, or null."""

    def read(value: Any) -> Any:
        return None if value is None else kind.read(value)

    return Kind(f"{kind.accepted}, or null", read, kind.is_text, kind.is_list)


def either(*kinds: Kind) -> Kind:
    """Any of several kinds; the first that accepts a value reads it."""

    def read(value: Any) -> Any:
        for kind in kinds:
            try:
                return kind.read(value)
            except _Refused:
                continue
        raise _Refused

    return Kind(", or ".join(kind.accepted for kind in kinds), read, is_list=any(kind.is_list for kind in kinds))


def list_of(kind: Kind, least: int = 0, count: int | None = None, single: bool = True) -> Kind:
    """A list of values of one kind.

    Args:
        kind: of each value.
        least: how many there must be.
        count: how many there must be exactly; None for any number.
        single: whether one value stands for a list of one.
    """
    words = f"a list, each {kind.accepted}"
    if count is not None:
        words = f"a list of {count} values, each {kind.accepted}"
    elif least:
        words = f"a list of at least {least}, each {kind.accepted}"

    def read(value: Any) -> list[Any]:
        if isinstance(value, str | int | float | Mapping) and single and not isinstance(value, bool) and value != {}:
            value = [value]
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise _Refused
        if len(value) < least or (count is not None and len(value) != count):
            raise _Refused
        entries = []
        for position, entry in enumerate(value):
            try:
                entries.append(kind.read(entry))
            except _Refused as refused:
                detail = f": {refused}" if str(refused) else ""
                raise _Refused(f"entry {position} is {_shorten(entry)}{detail}") from None
        return entries

    return Kind(words, read, kind.is_text, is_list=True)


def unique(kind: Kind) -> Kind:
    """A list without the same value twice."""

    def read(value: Any) -> list[Any]:
        values = kind.read(value)
        repeated = [entry for entry in values if values.count(entry) > 1]
        if repeated:
            raise _Refused(f"{_shorten(repeated[0])} is there twice")
        return values

    return Kind(kind.accepted, read, kind.is_text, is_list=True)


def mapping_of(kind: Kind, accepted: str) -> Kind:
    """A mapping from any names to values of one kind; `accepted` says what it is."""

    def read(value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise _Refused
        read_values = {}
        for key, entry in value.items():
            try:
                read_values[str(key)] = kind.read(entry)
            except _Refused:
                raise _Refused(f"{key} is {_shorten(entry)}, and must be {kind.accepted}") from None
        return read_values

    return Kind(accepted, read)


def record(required: Mapping[str, Kind], others: Mapping[str, Kind], accepted: str) -> Kind:
    """A mapping with some keys, of which `required` must be there."""
    known = {**required, **others}

    def read(value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise _Refused
        missing = [key for key in required if key not in value]
        unknown = [key for key in value if key not in known]
        if missing or unknown:
            raise _Refused(f"it lacks {missing[0]}" if missing else f"it has the unknown key {unknown[0]!r}")
        values = {}
        for key, entry in value.items():
            try:
                values[key] = known[key].read(entry)
            except _Refused as refused:
                detail = f" ({refused})" if str(refused) else ""
                raise _Refused(f"{key} must be {known[key].accepted}, got {_shorten(entry)}{detail}") from None
        return values

    return Kind(accepted, read)


def anything() -> Kind:
    """Whatever the class that gets it accepts."""
    return Kind("anything", lambda value: value)


def plain_mapping() -> Kind:
    """A mapping whose content another class checks."""
    return mapping_of(anything(), "a mapping")
