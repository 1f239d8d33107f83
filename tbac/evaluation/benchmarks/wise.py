"""WISE: prompts that need knowledge of the world; a judge gives three ratings, which become the WiScore."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, ClassVar

from PIL import Image

from tbac.evaluation.benchmarks.base import (
    BenchmarkFileError,
    Needs,
    PictureBenchmark,
    PictureVerdict,
    Row,
    Summary,
    check_fields,
    list_count_difference,
    list_judge_difference,
)
from tbac.evaluation.judges.base import JudgeError
from tbac.evaluation.picture_tree import Target
from tbac.files import expand_path, read_json, shorten

NUM_PROMPTS = 1000
LAST_ID = 10**9  # greatest prompt_id; it names a picture
WEIGHTS = {"consistency": 0.7, "realism": 0.2, "aesthetic quality": 0.1}
SHARES = {"culture": 0.4, "time": 0.167, "space": 0.133, "biology": 0.1, "physics": 0.1, "chemistry": 0.1}
INSTRUCTION = """Rate a generated picture against its prompt. Prompt: {prompt}
What the prompt asks for, explained: {explanation}
Give three whole numbers from 0 (not at all) to 2 (fully), each in a line of its own and nothing else:
Consistency: does the picture show what is explained?
Realism: is it true to life in light, shapes and materials?
Aesthetic Quality: is it pleasing as a picture?"""


@dataclass(frozen=True)
class WisePrompt:
    """A prompt of WISE.

    Attributes:
        number: its `prompt_id`.
        prompt: the text.
        explanation: what the picture should show.
        category: a key of `SHARES`.
    """

    number: int
    prompt: str
    explanation: str
    category: str


def find_category(name: str, subcategory: str) -> str:
    """Find the key of `SHARES` for a row's category and subcategory; "" when there is none."""
    for word in (subcategory, name):
        for known in SHARES:
            if known in word.lower() or (known == "culture" and "cultural" in word.lower()):
                return known
    return ""


def read_wise(path: str | Path) -> list[WisePrompt]:
    """Read the rows of WISE's JSON files, in the order of their numbers.

    Args:
        path: a file, or the folder of the three files.

    Raises:
        BenchmarkFileError: when a file is absent or has the wrong form; the message names file, row and field.
    """
    path = expand_path(path, "benchmark.file")
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise BenchmarkFileError(f"WISE's prompts {path} don't exist; give a JSON file or the folder of its three")
    rows = []
    for file in files:
        for index, row in enumerate(read_json(file, kind=list)):
            rows.append(read_prompt(row, f"{file}: prompt {index}"))
    if not rows:
        raise BenchmarkFileError(f"{path} holds no prompt")
    numbers = [row.number for row in rows]
    if len(set(numbers)) != len(numbers):
        raise BenchmarkFileError(f"{path}: several prompts have the prompt_id {max(numbers, key=numbers.count)}")
    return sorted(rows, key=lambda row: row.number)


def read_prompt(row: Any, origin: str) -> WisePrompt:
    """Read a row of WISE's files; `origin` tells where it stands, for messages."""
    check_fields(row, {"prompt_id": int, "Prompt": str, "Explanation": str, "Category": str}, origin)
    if not 0 <= row["prompt_id"] <= LAST_ID:
        raise BenchmarkFileError(f"{origin} needs a 'prompt_id' from 0 to {LAST_ID}, got {shorten(row['prompt_id'])}")
    category = find_category(row["Category"], str(row.get("Subcategory", "")))
    if not category:
        raise BenchmarkFileError(
            f"{origin} has the category {shorten(row['Category'])!r}; known are {', '.join(SHARES)}"
        )
    return WisePrompt(row["prompt_id"], row["Prompt"], row["Explanation"], category)


def list_wise_targets(rows: list[WisePrompt]) -> list[Target]:
    """List the targets `<prompt_id>.png`."""
    return [Target(f"{row.number}.png", str(row.number), row.prompt) for row in rows]


def read_ratings(reply: str) -> dict[str, int] | None:
    """Read the three ratings of a reply, each 0, 1 or 2; None unless all are there."""
    ratings = {}
    for name in WEIGHTS:
        match = re.search(rf"{name}\W*[:=]\W*([012])\b", reply, re.IGNORECASE)
        if match is None:
            return None
        ratings[name] = int(match[1])
    return ratings


def compute_wiscore(rated: Mapping[str, int]) -> float:
    """Compute the WiScore of one picture, in [0, 1]."""
    return sum(weight * rated[name] for name, weight in WEIGHTS.items()) / 2


def aggregate_wise(scores: Mapping[int, float], rows: list[WisePrompt]) -> dict[str, float]:
    """Compute the mean per category and, if every category is there, `overall`: their mean weighted by `SHARES`.

    Args:
        scores: number of a prompt -> WiScore of its picture.
        rows: all prompts.

    Raises:
        ValueError: without any score.
    """
    by_category: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row.number in scores:
            by_category[row.category].append(scores[row.number])
    if not by_category:
        raise ValueError("no picture of WISE has ratings")
    means = {name: mean(by_category[name]) for name in SHARES if name in by_category}
    if len(means) < len(SHARES):
        return means
    overall = sum(SHARES[name] * value for name, value in means.items())
    return {"overall": overall, **means}


@dataclass(kw_only=True, eq=False)
class WISE(PictureBenchmark):
    """1,000 prompts that need knowledge of the world, rated by a judge from 0 to 2 in three respects.

    Attributes:
        file: the folder of its three JSON files, or one such file.
    """

    needs: ClassVar[Needs] = "questions"

    file: str
    title: str = "WISE"

    def read_files(self) -> None:
        """Read the prompts; the number of a prompt names its picture."""
        self.prompts = read_wise(self.file)
        self.prompt_of = {str(prompt.number): prompt for prompt in self.prompts}

    def list_targets(self) -> list[Target]:
        """List the targets `<prompt_id>.png`."""
        return list_wise_targets(self.prompts)

    def find_group(self, target: Target) -> str:
        """Find the category of its prompt."""
        return self.prompt_of[target.item].category

    def judge_picture(self, target: Target, picture: Image.Image, judge: Any) -> PictureVerdict:
        """Ask the judge for three ratings, after telling it what the prompt means."""
        prompt = self.prompt_of[target.item]
        text = INSTRUCTION.format(prompt=prompt.prompt, explanation=prompt.explanation)
        reply = judge.ask(text, [picture])
        ratings = read_ratings(reply)
        if ratings is None:
            raise JudgeError(f"no three ratings in: {reply}")
        listed = ", ".join(f"{name} {value}" for name, value in ratings.items())
        return PictureVerdict(compute_wiscore(ratings), listed, {"ratings": ratings})

    def summarize(self, rows: Sequence[Row], judge_name: str) -> Summary:
        """Average WiScore by category and overall; a missing picture has 0, and one without ratings isn't counted."""
        numbers = {target.path: int(target.item) for target in self.list_targets()}
        counted = {numbers[row.picture]: row.score or 0.0 for row in rows if row.state != "failed"}
        differences = list_count_difference(len(self.prompts), NUM_PROMPTS, "prompts")
        differences.append("the judge is instructed in our own words")
        differences += list_judge_difference(judge_name, "gpt-4", "GPT-4o")
        scores = aggregate_wise(counted, self.prompts)
        return Summary(scores, f"{len(self.prompts)} prompts of {self.file}", differences)
