"""Reading command lines: texts and paths are given as they are, whatever characters they hold.

Hydra reads `=`, `,`, brackets and quotes in a value as its own grammar. The name of a checkpoint has a `=` in it, and
that of a sweep's point a `,`; so the values of options that are texts or paths are quoted before Hydra sees them.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from tbac.app.kinds import Kind

PLAIN = re.compile(
    r"[\w./@+-]+", re.ASCII
)  # what Hydra reads as the same text, unless it is a number or a word of its own
OTHER_THAN_TEXT = re.compile(
    r"[+-]?(\d[\d_]*|\d[\d_]*\.[\d_]*|\.\d[\d_]*)(e[+-]?\d+)?|[+-]?(inf|nan)|true|false", re.IGNORECASE
)
FOLDERS_OF_HYDRA = ("hydra.run.dir", "hydra.sweep.dir")
ENTRY = re.compile(
    r"""(?P<quoted>'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")|(?P<bare>[^\[\]{},'"]+)|(?P<mark>.)""", re.DOTALL
)


def quote(value: str) -> str:
    """Quote a text for Hydra's grammar, if it needs quotes."""
    if PLAIN.fullmatch(value) and not OTHER_THAN_TEXT.fullmatch(value) and value.lower() != "null":
        return value
    # A backslash counts as itself unless quotes follow it.
    escaped = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), value)
    return f"'{escaped}'"


def read_arguments(
    arguments: Sequence[str], find_kind: Callable[[str], Kind | None], multirun: bool = False
) -> list[str]:
    """Quote what is text in the overrides of a command line.

    Args:
        arguments: of the command, Hydra's own flags among them.
        find_kind: dotted name of an option -> what it accepts, or None.
        multirun: whether a comma separates the values of a sweep.
    """
    return [_read_argument(argument, find_kind, multirun) for argument in arguments]


def _read_argument(argument: str, find_kind: Callable[[str], Kind | None], multirun: bool) -> str:
    key, equals, value = argument.partition("=")
    if not equals or argument.startswith("-") or not value:
        return argument
    option = key.lstrip("+~")
    kind = find_kind(option)
    is_text = option in FOLDERS_OF_HYDRA or (kind is not None and kind.is_text)
    if option in FOLDERS_OF_HYDRA and value.startswith("~"):
        value = str(Path(value).expanduser())
    if kind is None and "." not in option and OTHER_THAN_TEXT.fullmatch(value):  # the name of a file of a group
        return f"{key}={quote(value)}"
    if not is_text:
        return f"{key}={_quote_entries(value)}" if "=" in value and not re.match(r"\w+\(", value) else argument
    if value[0] in "'\"" and value[-1] == value[0] and len(value) > 1:
        return f"{key}={value}"
    if value == "null" or value.startswith("${"):
        return argument
    if kind is not None and kind.is_list and value[0] == "[" and value[-1] == "]":
        return f"{key}={_quote_entries(value)}"
    if (
        multirun
        and ("," in value or re.match(r"(choice|glob|range)\(", value))
        and not Path(value).expanduser().exists()
    ):
        return f"{key}={_quote_entries(value)}" if "=" in value else argument
    return f"{key}={quote(value)}"


def _quote_entries(value: str) -> str:
    """Quote the entries of a list or a mapping that hold a `=`, and leave the rest as it is written."""
    pieces = []
    for match in ENTRY.finditer(value):
        bare = match["bare"]
        if bare is None or "=" not in bare:
            pieces.append(match[0])
            continue
        # In a mapping the key comes first.
        named, colon, rest = bare.partition(": ")
        head, entry = (f"{named}{colon}", rest) if colon and "=" not in named else ("", bare)
        stripped = entry.strip()
        pieces.append(head + entry.replace(stripped, quote(stripped), 1))
    return "".join(pieces)
