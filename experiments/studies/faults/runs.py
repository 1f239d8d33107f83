"""Reads what a training run has left in its folder, and compares how two runs ended."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PARTS = ("state_dict", "current_model_state", "optimizer_states", "lr_schedulers", "StagedDataModule")


NONE = "none"


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        fault: what was caused.
        release: what the release does.
        ours: what happened here.
        equal: whether the end is that of the run it is compared with, to the bit.
        samples: keys lost and repeated in the sequence that the kept weights come from.
        holds: whether the promise was kept.
    """

    fault: str
    release: str
    ours: str
    equal: str
    samples: str
    holds: bool


@dataclass
class Run:
    """A run folder and how its last process ended."""

    folder: Path
    status: int = 0
    text: str = ""
    seconds: float = 0.0

    def read_checkpoint(self) -> dict[str, Any]:
        """Read its newest checkpoint that is whole."""
        from tbac.training.checkpoints import find_newest_readable  # lightning, which --help doesn't need

        newest = find_newest_readable(self.folder)
        assert newest is not None, f"{self.folder} has no checkpoint"
        _, checkpoint = newest
        return checkpoint

    def read_loss(self) -> float:
        """The last validation loss."""
        return float(json.loads((self.folder / "report.json").read_text())["val_loss_last"])

    def list_kept_keys(self) -> list[str]:
        """The keys of all samples that shaped the weights, in order; those of rejected steps are left out."""
        return [key for line in self._read_lineage() if not line["rejected"] for key in line["keys"]]

    def list_drawn_keys(self) -> list[str]:
        """The keys of all samples that were drawn, in order, with those of rejected steps."""
        return [key for line in self._read_lineage() for key in line["keys"]]

    def count_batches(self) -> int:
        """How many batches were logged so far, by all processes, in all attempts."""
        return sum(len(file.read_text().splitlines()) for file in self._list_logs())

    def _list_logs(self) -> list[Path]:
        return sorted((self.folder / "sample_log").glob("*.jsonl"))

    def _read_lineage(self) -> list[dict[str, Any]]:
        """The logged lines that count: resuming at an earlier position cancels what was logged after it."""
        lines: list[dict[str, Any]] = []
        for file in self._list_logs():
            of_process: list[dict[str, Any]] = []
            for text in file.read_text().splitlines():
                line = json.loads(text)
                while of_process and of_process[-1]["positions"][0] >= line["positions"][0]:
                    of_process.pop()
                of_process.append(line)
            lines += of_process
        return sorted(lines, key=lambda line: line["positions"][0])


def are_identical(one: Any, other: Any) -> bool:
    """Whether two states agree in every bit."""
    import torch

    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return (
            isinstance(other, dict) and one.keys() == other.keys() and all(are_identical(one[k], other[k]) for k in one)
        )
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(are_identical, one, other))
    return bool(one == other)


def end_identically(one: Run, other: Run) -> bool:
    """Whether weights, average, moments, schedule and data position at the end agree in every bit."""
    first, second = one.read_checkpoint(), other.read_checkpoint()
    return all(are_identical(first[part], second[part]) for part in PARTS)


def compare_samples(keys: list[str], reference: list[str]) -> str:
    """Say how many samples were lost and repeated; `none` when the sequences are equal."""
    if keys == reference:
        return NONE
    return f"{len(set(reference) - set(keys))} lost, {len(keys) - len(set(keys))} repeated"


def say_yes_or_no(equal: bool) -> str:
    """Say yes, or NO, which is seen in a table."""
    return "yes" if equal else "NO"
