"""Prompts of your own, whose pictures get no score."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from tbac.evaluation.benchmarks.base import Needs, PictureBenchmark
from tbac.evaluation.benchmarks.rows import PictureVerdict, Row, Summary
from tbac.evaluation.picture_tree import Target
from tbac.files import expand_path, read_lines, read_text


@dataclass(kw_only=True, eq=False)
class Folder(PictureBenchmark):
    """Prompts of your own: their pictures are drawn and shown on a sheet, without a score.

    Attributes:
        file: a folder of text files, or a text file of prompts.
        samples: pictures of each prompt.
    """

    needs: ClassVar[Needs] = "nothing"

    file: str
    samples: int = 1
    title: str = "Prompts"

    def read_files(self) -> None:
        """Read the prompts."""
        self.prompts = read_prompt_folder(self.file)

    def list_targets(self) -> list[Target]:
        """List the targets `<name>.png`, or `<name>_<k>.png` with several samples."""
        return list_folder_targets(self.prompts, self.samples)

    def judge_picture(self, target: Target, picture: Image.Image, judge: Any) -> PictureVerdict:
        """Return a verdict without a score: the picture is there, and nothing else matters."""
        return PictureVerdict(None)

    def summarize(self, rows: Sequence[Row], judge_name: str) -> Summary:
        """Count the pictures that are there."""
        count = sum(row.state == "scored" for row in rows)
        return Summary({"pictures": float(count)}, f"{len(self.prompts)} prompts of {self.file}", ["No score."])


def read_prompt_folder(path: str | Path) -> dict[str, str]:
    """Read prompts from the lines of a text file, or from the text files of a folder.

    Returns:
        Name -> prompt; the name is the number of the line, or the file's name without `.txt`.

    Raises:
        ValueError: when there is no such file or folder, no prompt in it, or an empty one.
    """
    path = expand_path(path, "benchmark.file")
    if path.is_dir():
        prompts = {file.stem: read_text(file).strip() for file in sorted(path.glob("*.txt"))}
    elif path.is_file():
        # Only a newline ends a line; a prompt may hold other signs that Python takes for one.
        lines = [line.strip() for line in read_lines(path) if line.strip()]
        prompts = {f"{i:05d}": line for i, line in enumerate(lines)}
    else:
        raise ValueError(f"benchmark.file={path} is neither a text file of prompts nor a folder of such files")
    empty = [name for name, text in prompts.items() if not text]
    if empty:
        raise ValueError(f"benchmark.file={path}: {empty[0]}.txt is empty; it must hold a prompt")
    if not prompts:
        raise ValueError(f"benchmark.file={path} holds no prompt")
    return prompts


def list_folder_targets(prompts: Mapping[str, str], samples: int = 1) -> list[Target]:
    """List the targets `<name>.png`, or `<name>_<k>.png` with several samples."""
    targets = []
    for name, prompt in prompts.items():
        for k in range(samples):
            path = f"{name}_{k}.png" if samples > 1 else f"{name}.png"
            targets.append(Target(path, name, prompt, (k,)))
    return targets
