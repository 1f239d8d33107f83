"""A CSV file of metrics that a full disk neither tears nor empties."""

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger

from tbac.files import append_lines, write_whole


class MetricsFile:
    """Metrics that are appended to a CSV file; what doesn't fit on the disk is kept, and written the next time.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics: list[dict[str, Any]] = []
        self.columns: list[str] = []

    def log_metrics(self, metrics: Mapping[str, Any], step: int) -> None:
        """Keep metrics until they are saved."""
        self.metrics.append({**metrics, "step": step})

    def save(self) -> None:
        """Write what was kept.

        Raises:
            OSError: when it can't be written; the file then holds what it held before.
        """
        if not self.metrics:
            return
        known = set(self.columns).union(*self.metrics)
        # A metric that wasn't there before needs a column, so the file is written anew, whole or not at all.
        if known != set(self.columns) or not self.path.is_file():
            columns = sorted(known)
            rows = [*self._read(), *self.metrics]
            write_whole(self.path, format_rows(columns, rows, header=True).encode())
            self.columns = columns
        else:
            append_lines(self.path, format_rows(self.columns, self.metrics).splitlines())
        self.metrics = []

    def _read(self) -> list[dict[str, str]]:
        if not self.path.is_file():
            return []
        with self.path.open(newline="") as file:
            return list(csv.DictReader(file))


def format_rows(columns: Sequence[str], rows: Sequence[Mapping[str, Any]], header: bool = False) -> str:
    """Format rows as CSV; a row has nothing in the columns that it lacks."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


class LastingCSVLogger(CSVLogger):
    """Lightning's CSV logger with a file that a full disk leaves whole; arguments are those of its base."""

    def __init__(self, save_dir: str, name: str = "csv") -> None:
        super().__init__(save_dir, name)
        self._file: MetricsFile | None = None

    @property
    def file(self) -> MetricsFile:
        """The file of this start of the run."""
        if self._file is None:
            os.makedirs(self.log_dir, exist_ok=True)
            self._file = MetricsFile(Path(self.log_dir) / "metrics.csv")
        return self._file

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        values = {name: float(value) for name, value in metrics.items()}
        self.file.log_metrics(values, len(self.file.metrics) if step is None else step)

    def save(self) -> None:
        self.file.save()

    def finalize(self, status: str) -> None:
        self.save()
