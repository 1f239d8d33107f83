"""GenEval 2: 800 prompts whose parts (atoms) are asked for one by one, and scored by the probability of the answer."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean, mean
from typing import Any, ClassVar

from PIL import Image

from tbac.evaluation.benchmarks.base import Needs, PictureBenchmark
from tbac.evaluation.benchmarks.files import read_rows
from tbac.evaluation.benchmarks.rows import Count, PictureVerdict, Row
from tbac.evaluation.judges.base import Manner
from tbac.evaluation.picture_tree import Target, name_records_folder
from tbac.files import shorten, write_whole

QUESTION = "{question} Answer in one word."
COUNTING = "How many"  # what questions begin with whose answer is a number
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
SKILLS = ("object", "attribute", "count", "position", "verb")
PATHS_FILE = "image_paths.json"


def list_answers(question: str, answer: str) -> list[str]:
    """List the ways to give an answer whose probabilities add up, as GenEval 2's script does."""
    if not question.startswith(COUNTING):
        return ["Yes", "yes", " yes", " Yes"]
    digit = str(NUMBERS.index(answer) + 1) if answer in NUMBERS else "other"
    return [answer, answer.capitalize(), f" {answer}", f" {answer.capitalize()}", digit, f" {digit}"]


def compute_geometric_mean(values: Sequence[float]) -> float:
    """Compute the geometric mean of probabilities; 0 where one of them is.

    Other probabilities count however small they are: of ten atoms one with 1e-13 lowers the mean by a factor of 20.
    """
    return geometric_mean(values) if min(values) > 0 else 0.0  # logarithms need more than 0


def describe_problem(row: dict) -> str:
    """Describe what is wrong with a row of GenEval 2's file; "" when nothing is."""
    questions = row["vqa_list"]
    is_list = questions and all(isinstance(q, list) and len(q) == 2 for q in questions)
    if not is_list or not all(isinstance(text, str) and text.strip() for q in questions for text in q):
        return f"'vqa_list' must hold pairs of a question and its answer, got {shorten(questions)}"
    if len(row["skills"]) != len(questions) or not set(map(str, row["skills"])) <= set(SKILLS):
        return f"'skills' must hold one of {', '.join(SKILLS)} for each question, got {shorten(row['skills'])}"
    return ""


@dataclass(kw_only=True, eq=False)
class GenEval2(PictureBenchmark):
    """800 prompts of 3 to 10 atoms; Soft-TIFA: the judge's probability of the right answer about each atom.

    Attributes:
        file: its `geneval2_data.jsonl`.
    """

    needs: ClassVar[Needs] = "probabilities"
    published_manner: ClassVar[Manner | None] = Manner(temperature=0, max_tokens=1, pictures_first=True)

    file: str
    title: str = "GenEval 2"

    def read_files(self) -> None:
        """Read the prompts with their questions."""
        required = {"prompt": str, "atom_count": int, "vqa_list": list, "skills": list}
        self.prompts = read_rows(self.file, required, describe_problem)

    def list_targets(self) -> list[Target]:
        """List the targets `{i:05d}.png`; its script finds them by `image_paths.json`."""
        return [Target(f"{i:05d}.png", f"{i:05d}", row["prompt"]) for i, row in enumerate(self.prompts)]

    def write_other_files(self, root: Path) -> None:
        """Write `image_paths.json`, prompt -> picture, which its script takes as `--image_filepath_data`."""
        root.mkdir(parents=True, exist_ok=True)
        paths = {target.prompt: str((root / target.path).absolute()) for target in self.targets}
        text = json.dumps(paths, indent=1, ensure_ascii=False)
        write_whole(root / PATHS_FILE, text.encode(), name_records_folder(root))

    def find_group(self, target: Target) -> str:
        """Find the number of atoms of its prompt."""
        return f"{self.prompts[int(target.item)]['atom_count']} atoms"

    def judge_picture(self, target: Target, picture: Image.Image, judge: Any) -> PictureVerdict:
        """Ask about every atom for the probability of the right answer."""
        row = self.prompts[int(target.item)]
        probabilities = []
        for question, answer in row["vqa_list"]:
            text = QUESTION.format(question=question)
            probabilities.append(judge.compute_probability(text, [picture], list_answers(question, answer)))
        unlikely = [
            f"{question} ({answer}: {p:.2f})"
            for (question, answer), p in zip(row["vqa_list"], probabilities, strict=True)
            if p < 0.5
        ]
        return PictureVerdict(compute_geometric_mean(probabilities), ", ".join(unlikely), {"atoms": probabilities})

    def count(self, row: Row) -> list[Count]:
        """Count geometric and arithmetic mean of a prompt, and each atom for its skill; a missing picture has 0."""
        if row.state == "failed":
            return []
        skills = self.prompts[int(row.picture.removesuffix(".png"))]["skills"]
        atoms = row.details["atoms"] if row.state == "scored" else [0.0] * len(skills)
        prompt = {"soft_tifa_gm": compute_geometric_mean(atoms), "soft_tifa_am": mean(atoms)}
        prompt[row.group] = prompt["soft_tifa_gm"]
        counts = [Count(cell, 100 * value) for cell, value in prompt.items()]
        return counts + [Count(skill, 100 * value) for skill, value in zip(skills, atoms, strict=True)]

    def combine(self, means: Mapping[str, float]) -> dict[str, float]:
        """Order the means: both scores, skills by the arithmetic mean, numbers of atoms by the geometric one."""
        leading = [name for name in ("soft_tifa_gm", "soft_tifa_am", *SKILLS) if name in means]
        atoms = sorted((name for name in means if name.endswith(" atoms")), key=lambda name: int(name.split()[0]))
        return {name: means[name] for name in (*leading, *atoms)}

    def describe_rules(self) -> str:
        """Name the score."""
        return "Soft-TIFA"

    def describe_questions(self) -> Any:
        """Return the questions with their answers and skills."""
        return [QUESTION, [[row["vqa_list"], row["skills"], row["atom_count"]] for row in self.prompts]]
