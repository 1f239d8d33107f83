"""What reports are made of."""

from typing import Any


def markdown(header: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table; numbers to the right."""
    align = [" ---: |" if i else " --- |" for i in range(len(header))]
    lines = ["| " + " | ".join(header) + " |", "|" + "".join(align)]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])
