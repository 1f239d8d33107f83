"""One's own prompts: pictures without a score."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from tbac.evaluation.benchmarks.base import NothingBeside, Row, Summary, missing
from tbac.evaluation.picture_tree import Target, folder_targets, read_prompt_folder


class Folder(NothingBeside):
    """One's own prompts: pictures without a score."""

    title, judged = "Prompts", False

    def __init__(self, cfg: DictConfig, samples: int) -> None:
        self.file, self.samples = str(cfg.file), samples
        self.prompts = read_prompt_folder(self.file)

    def targets(self) -> list[Target]:
        """`<name>.png`, or `<name>_<k>.png` with several samples."""
        return folder_targets(self.prompts, self.samples)

    def check_judge(self, judge: Any) -> None:
        """Nothing is judged."""

    def rows(self, root: Path, judge: Any) -> Iterator[Row]:
        """Which pictures are there."""
        for target in self.targets():
            yield missing(target, "", root) or Row(target.path, "", target.prompt)

    def summary(self, rows: Sequence[Row], judge_name: str) -> Summary:
        """How many pictures are there."""
        there = sum(row.state == "scored" for row in rows)
        return Summary({"pictures": float(there)}, f"{len(self.prompts)} prompts of {self.file}", ["no score"])
