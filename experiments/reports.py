"""Tables for reports."""

from typing import Any


def format_table(header: list[str], rows: list[list[Any]]) -> str:
    """Format a Markdown table; all columns but the first are aligned to the right."""
    align = ["---", *["---:"] * (len(header) - 1)]
    lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in (header, align, *rows)]
    return "\n".join(lines)
