"""Reads the texts that a benchmark's published script asks its judge with, as data: nothing of the script is executed.

So a judge can be asked in a benchmark's own words, which aren't ours to ship.
"""

import ast
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tbac.files import ForeignFileError, expand_path, read_text, shorten

OPEN, CLOSE = "\x02", "\x03"  # around the name of what a text leaves open; no published text holds them


@dataclass(frozen=True)
class Script:
    """The texts of a script.

    A text that the script fills in (an f-string) has a mark, `mark("Prompt")`, at the place of each `row["Prompt"]`.

    Attributes:
        file: the script.
        values: name of a variable or attribute -> the text or plain data that is assigned to it first.
        entries: key -> the texts that stand under it in any mapping of the script, in their order.
        messages: role -> the first chat message of this role.
    """

    file: Path
    values: dict[str, Any] = field(default_factory=dict)
    entries: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    messages: dict[str, str] = field(default_factory=dict)

    def get(self, name: str) -> Any:
        """Return what is assigned to a name.

        Raises:
            ForeignFileError: when the script assigns no text or plain data to it.
        """
        if name not in self.values:
            raise ForeignFileError(f"benchmark.script={self.file} assigns no text to {name}")
        return self.values[name]

    def get_message(self, role: str) -> str:
        """Return the first message of a role.

        Raises:
            ForeignFileError: when the script has none.
        """
        if role not in self.messages:
            raise ForeignFileError(f"benchmark.script={self.file} has no message of the role {role!r}")
        return self.messages[role]


def mark(name: str) -> str:
    """Return the mark of what a text leaves open."""
    return f"{OPEN}{name}{CLOSE}"


def fill(text: str, **values: str) -> str:
    """Fill in what a text leaves open."""
    for name, value in values.items():
        text = text.replace(mark(name), value)
    return text


def read_script(path: str | Path, needed: Sequence[str] = ()) -> Script:
    """Read the texts of a Python script.

    Args:
        path: the script.
        needed: names that must be assigned in it.

    Raises:
        ForeignFileError: when it can't be read, isn't Python, or lacks a name.
    """
    file = expand_path(path, "benchmark.script")
    if not file.is_file():
        raise ForeignFileError(f"benchmark.script={file} isn't a file")
    try:
        tree = ast.parse(read_text(file))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ForeignFileError(f"benchmark.script={file} isn't a Python script ({shorten(error)})") from None
    script = Script(file)
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            value = read_value(node.value)
            for target in node.targets if value is not None else ():
                name = getattr(target, "id", getattr(target, "attr", None))
                if name is not None:
                    script.values.setdefault(name, value)
        elif isinstance(node, ast.Dict):
            add_mapping(script, node)
    for name in needed:
        script.get(name)
    return script


def add_mapping(script: Script, node: ast.Dict) -> None:
    """Add the texts of a mapping, and the chat message that it may be."""
    parts: dict[Any, ast.expr] = {}
    for name, value in zip(node.keys, node.values, strict=True):
        if isinstance(name, ast.Constant):
            parts[name.value] = value
    for key, value in parts.items():
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            script.entries[str(key)].append(value.value)
    role = parts.get("role")
    if not isinstance(role, ast.Constant) or "content" not in parts:
        return
    # The content is a text, or a list of parts, one of which has a text.
    content = parts["content"]
    if isinstance(content, ast.List):
        inner = [dict(zip(map(read_value, item.keys), item.values, strict=True)) for item in list_mappings(content)]
        content = next((item["text"] for item in inner if "text" in item), content)
    text = read_value(content)
    if isinstance(text, str):
        script.messages.setdefault(str(role.value), text)


def list_mappings(node: ast.List) -> list[ast.Dict]:
    """List the mappings in a list that have a key each."""
    return [item for item in node.elts if isinstance(item, ast.Dict) and None not in item.keys]


def read_value(node: ast.AST | None) -> Any:
    """Read a text, with marks where it is filled in, or plain data; None for anything else."""
    if isinstance(node, ast.JoinedStr):
        parts = []
        for part in node.values:
            if isinstance(part, ast.Constant):
                parts.append(str(part.value))
            elif isinstance(part, ast.FormattedValue) and isinstance(part.value, ast.Subscript):
                parts.append(mark(str(read_value(part.value.slice))))
            else:
                parts.append(mark(ast.unparse(part)))
        return "".join(parts)
    try:
        return ast.literal_eval(node) if node is not None else None
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None
