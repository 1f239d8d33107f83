"""What reports are made of."""

from typing import Any


def format_table(header: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table; numbers to the right."""
    align = ["---", *["---:"] * (len(header) - 1)]
    lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in (header, align, *rows)]
    return "\n".join(lines)
