"""Parses the Python files of the repository, and lists what each imports."""

import ast
import contextlib
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from tests.helpers.configs import ROOT

CODE = ("tbac", "experiments", "data_prep")


def list_files(*folders: str, root: Path = ROOT) -> list[Path]:
    """List the Python files below some folders, in order."""
    return [file for folder in folders for file in sorted((root / folder).rglob("*.py"))]


def parse(file: Path) -> ast.Module:
    return _parse_text(file.read_text())


@cache
def _parse_text(text: str) -> ast.Module:
    for _ in range(5):
        # CPython 3.11 counts the depth for all threads together, and another test's logger may compile meanwhile.
        with contextlib.suppress(SystemError):
            return ast.parse(text)
    return ast.parse(text)


def _is_type_checking(node: ast.AST) -> bool:
    """Whether a node is `if TYPE_CHECKING:`, whose imports no run makes."""
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def _walk_what_runs(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    children = node.orelse if _is_type_checking(node) else ast.iter_child_nodes(node)  # type: ignore[attr-defined]
    for child in children:
        yield from _walk_what_runs(child)


def list_imports(file: Path) -> list[str]:
    """List the dotted names that a file imports, also inside functions; `from a import b` gives `a.b`."""
    names: list[str] = []
    for node in _walk_what_runs(parse(file)):
        if isinstance(node, ast.Import):
            names.extend(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports hide the direction"
            names.extend(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "import_module":
            argument = node.args[0]
            if isinstance(argument, ast.Constant):
                names.append(argument.value)
    return names


def find_file(name: str, root: Path = ROOT) -> str | None:
    """Find the file of this repository that a dotted name of `list_imports` comes from, as a path below the root."""
    parts = name.split(".")
    for length in (len(parts), len(parts) - 1):
        path = "/".join(parts[:length])
        for file in (f"{path}.py", f"{path}/__init__.py"):
            if path and (root / file).is_file():
                return file
    return None


def list_arrows(root: Path = ROOT) -> dict[str, set[str]]:
    """List for each file outside tests the files of this repository that it imports."""
    arrows: dict[str, set[str]] = {}
    for file in list_files(*CODE, root=root):
        imported = {find_file(name, root) for name in list_imports(file)}
        arrows[file.relative_to(root).as_posix()] = {path for path in imported if path is not None}
    return arrows


def find_circle(arrows: dict[str, set[str]]) -> list[str]:
    """Find files that import each other in a circle; the first one stands again at the end. Empty if there is none."""
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        return list(reversed(error.args[1]))
    return []
