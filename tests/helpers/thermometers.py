"""Counts what can be counted of how the code reads."""

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.helpers.source import parse

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def list_nested_comprehensions(file: Path) -> list[int]:
    """List the lines of comprehensions that are inside another."""
    places = set()
    for outer in ast.walk(parse(file)):
        if isinstance(outer, COMPREHENSIONS):
            inner = (node for node in ast.walk(outer) if node is not outer and isinstance(node, COMPREHENSIONS))
            places |= {(node.lineno, node.col_offset) for node in inner}
    return [line for line, _ in sorted(places)]


def list_functions(file: Path) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """List functions and methods with their names; a method is named `Class.method`."""

    def visit(node: ast.AST, names: tuple[str, ...]) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (*FUNCTIONS, ast.ClassDef)):
                if isinstance(child, FUNCTIONS):
                    yield ".".join((*names, child.name)), child
                yield from visit(child, (*names, child.name))
            else:
                yield from visit(child, names)

    return visit(parse(file), ())


def count_arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count the arguments that a caller gives: without `self`, and `*rest` and `**options` as one each."""
    arguments = function.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    rest = [a for a in (arguments.vararg, arguments.kwarg) if a is not None]
    return len([name for name in names if name not in ("self", "cls")]) + len(rest)


def count_lines(file: Path) -> int:
    """Count the lines that aren't blank."""
    return sum(bool(line.strip()) for line in file.read_text().splitlines())
