"""What a training run has left in its folder, and whether two runs ended the same."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PARTS = ("state_dict", "current_model_state", "optimizer_states", "lr_schedulers", "StagedDataModule")


@dataclass
class Run:
    """A run folder and how its last process ended."""

    folder: Path
    status: int = 0
    text: str = ""
    seconds: float = 0.0

    def end(self) -> dict[str, Any]:
        """What its newest whole checkpoint holds."""
        from tbac.training.checkpoints import find_newest_readable  # lightning, which --help doesn't need

        found = find_newest_readable(self.folder)
        assert found is not None, f"{self.folder} has no checkpoint"
        return found[1]

    def loss(self) -> float:
        """The last validation loss."""
        return float(json.loads((self.folder / "report.json").read_text())["val_loss_last"])

    def kept(self) -> list[str]:
        """Keys in the order in which the weights that were kept saw them."""
        return [key for line in self._lineage() if not line["rejected"] for key in line["keys"]]

    def drawn(self) -> list[str]:
        """The same with those of rejected steps."""
        return [key for line in self._lineage() for key in line["keys"]]

    def batches(self) -> int:
        """Batches that were logged so far, those of all processes and of all starts."""
        return sum(len(file.read_text().splitlines()) for file in self._logs())

    def _logs(self) -> list[Path]:
        return sorted((self.folder / "sample_log").glob("*.jsonl"))

    def _lineage(self) -> list[dict[str, Any]]:
        """Lines that weren't undone: going on from an earlier position undoes all from there on."""
        lines: list[dict[str, Any]] = []
        for file in self._logs():
            own: list[dict[str, Any]] = []
            for text in file.read_text().splitlines():
                line = json.loads(text)
                while own and own[-1]["positions"][0] >= line["positions"][0]:
                    own.pop()
                own.append(line)
            lines += own
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
    first, second = one.end(), other.end()
    return all(are_identical(first[part], second[part]) for part in PARTS)
