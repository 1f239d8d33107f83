"""T2I-CoReBench: composition and reasoning in twelve tasks, with a checklist of yes/no questions for each prompt."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any, ClassVar

from PIL import Image

from tbac.evaluation.benchmarks.base import OWN_WORDS, Needs, PictureBenchmark
from tbac.evaluation.benchmarks.files import BenchmarkFileError, check_fields
from tbac.evaluation.benchmarks.rows import Count, PictureVerdict, Row
from tbac.evaluation.judges.base import Asked, JudgeError, Manner, ask_until_usable
from tbac.evaluation.picture_tree import Target
from tbac.evaluation.published_scripts import fill, mark, read_script
from tbac.files import expand_path, read_json, shorten

OWN_INSTRUCTION = """Answer a question about a generated picture with the one word yes or no. Say yes only if the
picture itself shows it clearly; its prompt is given for context alone. If a condition in the question doesn't hold, say
no."""
OWN_QUESTION = f"Prompt of the picture: {mark('Prompt')}\nQuestion: {mark('question')}"
TASK = re.compile(r"([A-Z]-[A-Z]{2})-\w+")  # what the keys of its prompts look like
KINDS = {"C": "composition", "R": "reasoning"}


def read_corebench(folder: str) -> dict[str, dict]:
    """Read the prompts of all JSON files of a folder, or of one file, by their keys, such as `C-MI-001`.

    Raises:
        BenchmarkFileError: when there is none, or one has the wrong form; the message names file, key and field.
    """
    path = expand_path(folder, "benchmark.file")
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise BenchmarkFileError(f"T2I-CoReBench's prompts {path} don't exist; give the folder of its JSON files, data")
    prompts: dict[str, dict] = {}
    for file in files:
        for key, row in read_json(file, kind=dict).items():
            place = f"{file}: prompt {shorten(key)!r}"
            if not TASK.fullmatch(key) or key in prompts:
                raise BenchmarkFileError(f"{place}: its key must be like 'C-MI-001', and stand in one file alone")
            check_fields(row, {"Prompt": str, "Checklist": list}, place)
            if not row["Checklist"]:
                raise BenchmarkFileError(f"{place} needs questions in its 'Checklist'")
            for item in row["Checklist"]:
                check_fields(item, {"question": str}, f"{place}, 'Checklist'")
            prompts[key] = row
    if not prompts:
        raise BenchmarkFileError(f"{path} holds no prompt")
    return prompts


def find_task(key: str) -> str:
    """Find the task of a prompt by its key."""
    match = TASK.fullmatch(key)
    return match[1] if match else ""


def read_answer(reply: str) -> bool | None:
    """Read whether a reply says yes; None when it says neither yes nor no."""
    text = reply.lower()
    if re.search(r"\byes\b", text):
        return True
    return False if re.search(r"\bno\b", text) else None


@dataclass(kw_only=True, eq=False)
class CoReBench(PictureBenchmark):
    """1,080 prompts of twelve tasks, four pictures each; a picture's score is the share of questions answered with yes.

    Attributes:
        file: the folder of its twelve JSON files, or one of them.
        script: its `evaluate.py`, whose instruction and question are then used; None asks in our own words.
        samples: pictures of each prompt; published numbers have 4.
        model_name: name of the folder of the pictures.
    """

    needs: ClassVar[Needs] = "questions"
    published_manner: ClassVar[Manner | None] = Manner(temperature=0, pictures_first=True)

    file: str
    script: str | None = None
    samples: int = 4
    model_name: str = "tbac"
    title: str = "T2I-CoReBench"

    def read_files(self) -> None:
        """Read prompts and checklists, and the published question."""
        self.prompts = read_corebench(self.file)
        self.words = f"{OWN_INSTRUCTION}\n{OWN_QUESTION}"
        if self.script is not None:
            published = read_script(self.script, ["TEMPLATE", "TEXT"])
            self.words = f"{published.get('TEMPLATE')}\n{published.get('TEXT')}"

    def list_targets(self) -> list[Target]:
        """List the targets `<model>/<task>/<key>-<k>.png`."""
        return [
            Target(f"{self.model_name}/{find_task(key)}/{key}-{k}.png", key, row["Prompt"], (k,))
            for key, row in self.prompts.items()
            for k in range(self.samples)
        ]

    def find_group(self, target: Target) -> str:
        """Find its task."""
        return find_task(target.item)

    def judge_picture(self, target: Target, picture: Image.Image, judge: Any) -> PictureVerdict:
        """Ask every question of the checklist; one without a usable reply isn't counted, as in the published script.

        Raises:
            JudgeError: when none has a usable reply.
        """
        row = self.prompts[target.item]
        answers: list[bool] = []
        lacking, replies = [], []
        for item in row["Checklist"]:
            text = fill(self.words, Prompt=row["Prompt"], question=item["question"])
            try:
                answer, _ = ask_until_usable(judge, Asked([text], [picture], self.tries), read_answer)
            except JudgeError as error:
                replies += [*error.replies, str(error)]
                continue
            answers.append(answer)
            if not answer:
                lacking.append(item["question"])
        if not answers:
            raise JudgeError("no question has a usable reply", replies)
        details = {"unanswered": len(row["Checklist"]) - len(answers), "replies": replies}
        return PictureVerdict(sum(answers) / len(answers), " ".join(lacking), details)

    def count(self, row: Row) -> list[Count]:
        """Count the picture's score in percent for its task; a missing picture has 0."""
        return [] if row.state == "failed" else [Count(row.group, 100 * (row.score or 0.0))]

    def combine(self, means: Mapping[str, float]) -> dict[str, float]:
        """Return the mean over tasks, those over the tasks of composition and of reasoning, and the tasks."""
        scores = {"overall": mean(means.values())}
        for letter, name in KINDS.items():
            of_kind = [value for task, value in means.items() if task.startswith(letter)]
            if of_kind:
                scores[name] = mean(of_kind)
        return scores | dict(means)

    def describe_questions(self) -> Any:
        """Return the wording and all questions."""
        questions = [item["question"] for row in self.prompts.values() for item in row["Checklist"]]
        return [self.words, list(self.prompts), questions]

    def list_notes(self, rows: Sequence[Row]) -> list[str]:
        """Say when the question is our own, and how many questions had no usable reply."""
        unanswered = sum(row.details.get("unanswered", 0) for row in rows)
        notes = [] if self.script else [OWN_WORDS]
        return notes + ([f"{unanswered} questions without a usable reply aren't counted."] if unanswered else [])
