"""Tables for reports, and the `report.json` of a training run."""

import logging
from pathlib import Path
from typing import Any

from tbac.files import ForeignFileError, read_json, shorten

log = logging.getLogger(__name__)


def format_table(header: list[str], rows: list[list[Any]]) -> str:
    """Format a Markdown table; all columns but the first are aligned to the right."""
    align = ["---", *["---:"] * (len(header) - 1)]
    lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in (header, align, *rows)]
    return "\n".join(lines)


def read_run_report(file: Path) -> list[dict[str, Any]] | None:
    """Read the report of each stage of a training run.

    A report that is torn or holds something else is as good as none, since going on with the run writes it anew.

    Args:
        file: the run's `report.json`.

    Returns:
        The reports in the order of the stages, each with `name`, `steps` and `checkpoint`; None, with a warning, when
        the file can't be used, and without one when there is none.
    """
    if not file.exists():
        return None
    try:
        report = read_json(file, kind=dict, finite=False)
        stages = report.get("stages", [report])
        check_stage_reports(stages, file)
    except ForeignFileError as error:
        log.warning("%s; the run counts as unfinished", error)
        return None
    reports: list[dict[str, Any]] = stages
    return reports


def check_stage_reports(stages: Any, file: Path) -> None:
    """Raise ForeignFileError unless these are the reports of stages."""
    if not isinstance(stages, list) or not stages:
        raise ForeignFileError(f"{file} must hold the reports of stages, got {shorten(stages)}")
    needed = {"name": str, "steps": int, "checkpoint": str}
    for stage in stages:
        for name, kind in needed.items():
            if not isinstance(stage, dict) or not isinstance(stage.get(name), kind):
                raise ForeignFileError(
                    f"{file} must hold {name!r} as {kind.__name__} of each stage, got {shorten(stage)}"
                )
