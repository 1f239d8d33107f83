"""WISE: prompts that need knowledge of the world, in its first edition and in the verified one of 2026.

The editions differ in prompts, ids of the categories, judge, question, ratings and weights. Each is a benchmark of its
own, and refuses the other's files.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from tbac.evaluation.benchmarks.base import OWN_WORDS, Needs, PictureBenchmark
from tbac.evaluation.benchmarks.files import BenchmarkFileError, check_fields
from tbac.evaluation.benchmarks.rows import PictureVerdict, Row
from tbac.evaluation.judges.base import Asked, Manner, ask_until_usable
from tbac.evaluation.picture_tree import Target
from tbac.evaluation.published_scripts import fill, read_script
from tbac.files import expand_path, read_json, shorten

OTHER_FILES = ("_rewrite",)  # ends of the names of files that hold the same prompts, written in another way
WHOLE = "merge.json"  # a copy of all prompts beside the files that hold a part each


@dataclass(frozen=True)
class Edition:
    """What distinguishes an edition of WISE.

    Attributes:
        name: in messages.
        files: how the names of its files end.
        last_ids: category -> its last prompt_id; the first one follows on the category before.
        shares: category -> weight of its mean in the overall score.
        ratings: what the judge rates -> weight of the rating in the score of a picture.
        best: the best rating; the worst is 0.
        lenient: whether any digit after a rating's name is read, and the last one counts; else the first number does.
        words: our own question, where the published one isn't given.
    """

    name: str
    files: str
    last_ids: Mapping[str, int]
    shares: Mapping[str, float]
    ratings: Mapping[str, float]
    best: int
    lenient: bool
    words: str

    def find_category(self, number: int) -> str:
        """Find the category of a prompt_id; "" for one that the edition doesn't have."""
        return next((name for name, last in self.last_ids.items() if 1 <= number <= last), "")

    def read_ratings(self, reply: str) -> dict[str, int] | None:
        """Read the ratings of a reply, as the edition's script does; None unless all are there and in range.

        A rating is its name, perhaps in asterisks, perhaps with a colon, and a digit. If no name is there at all, lines
        of a digit alone are read in the order of the ratings. The first edition's script also takes digits above 2,
        which no score can come from; here such a reply is asked for again.
        """
        digit = r"(\d)" if self.lenient else rf"([0-{self.best}])\b"
        found = re.findall(rf"\*{{0,2}}({'|'.join(self.ratings)})\*{{0,2}}\s*:?\s*{digit}", reply, re.IGNORECASE)
        ratings = {name.lower(): int(value) for name, value in (found if self.lenient else found[:1])}
        alone = re.findall(rf"(?m)^\s*([0-{self.best}])\s*$", reply)
        if not ratings and (len(alone) >= len(self.ratings) if self.lenient else len(alone) == 1):
            ratings = dict(zip(self.ratings, map(int, alone), strict=False))
        if set(ratings) != set(self.ratings) or max(ratings.values()) > self.best:
            return None
        return ratings

    def compute_score(self, ratings: Mapping[str, int]) -> float:
        """Compute the score of one picture, in [0, 1]."""
        # The exact sum: the best ratings give 1, and not a little less.
        return math.fsum(weight * ratings[name] for name, weight in self.ratings.items()) / self.best


LEGACY = Edition(
    name="the first edition",
    files=".json",
    last_ids={"culture": 400, "time": 567, "space": 700, "biology": 800, "physics": 900, "chemistry": 1000},
    shares={"culture": 0.4, "time": 0.167, "space": 0.133, "biology": 0.1, "physics": 0.1, "chemistry": 0.1},
    ratings={"consistency": 0.7, "realism": 0.2, "aesthetic quality": 0.1},
    best=2,
    lenient=True,
    words="""Rate a generated picture against its prompt. Prompt: \x02Prompt\x03
What the prompt asks for, explained: \x02Explanation\x03
Give three whole numbers from 0 (not at all) to 2 (fully), each in a line of its own and nothing else:
Consistency: does the picture show what is explained?
Realism: is it true to life in light, shapes and materials?
Aesthetic Quality: is it pleasing as a picture?""",
)
VERIFIED = Edition(
    name="the verified edition",
    files="_verified.json",
    last_ids={"culture": 400, "time": 520, "space": 640, "biology": 760, "physics": 880, "chemistry": 1000},
    shares={"culture": 0.4, "time": 0.12, "space": 0.12, "biology": 0.12, "physics": 0.12, "chemistry": 0.12},
    ratings={"score": 1.0},
    best=1,
    lenient=False,
    words="""Does a generated picture show what its prompt means? Prompt: \x02Prompt\x03
What the prompt means, explained: \x02Explanation\x03
Say in one line "Score: 1" if it clearly shows that and can be judged, or "Score: 0" if not, and nothing else.""",
)
# Words of a row's category that say which one it is; the ids decide, and a row that contradicts is refused.
CATEGORY_WORDS = {
    "culture": ("cultur",), "time": ("time",), "space": ("space",), "biology": ("biolog", "ecolog"),
    "physics": ("physic",), "chemistry": ("chemi",),
}  # fmt: skip


@dataclass(frozen=True)
class WisePrompt:
    """A prompt of WISE.

    Attributes:
        number: its `prompt_id`.
        prompt: the text.
        explanation: what the picture should show.
        category: such as `culture`.
    """

    number: int
    prompt: str
    explanation: str
    category: str


def list_files(path: Path, edition: Edition) -> list[Path]:
    """List the files of an edition in a folder, or the one file that was named.

    Beside them lie the same prompts again, rewritten, and in the verified edition as one file; these are passed over
    unless one of them is named, or the folder holds rewritten ones alone.

    Raises:
        BenchmarkFileError: when there is none.
    """
    if not path.is_dir():
        files = [path]
        if path.is_file() and path.name.endswith(VERIFIED.files) != (edition is VERIFIED) and path.name != WHOLE:
            raise BenchmarkFileError(
                f"{path} isn't of {edition.name} of WISE, whose files end with {edition.files}; benchmark=wise reads "
                "the first edition, benchmark=wise_verified the verified one"
            )
    else:
        found = sorted(path.glob(f"*{edition.files}"))
        plain = [file for file in found if not file.stem.endswith(OTHER_FILES) and file.name != WHOLE]
        rewritten = [file for file in found if file.stem.endswith(OTHER_FILES)]
        files = plain or rewritten or [path / WHOLE]
    if not files or not files[0].is_file():
        raise BenchmarkFileError(
            f"WISE's prompts {path} don't exist; give the folder of its three files *{edition.files}, or one such file"
        )
    return files


def read_wise(path: str | Path, edition: Edition = LEGACY) -> list[WisePrompt]:
    """Read the rows of WISE's JSON files, in the order of their numbers.

    Args:
        path: the folder of an edition's files, or one of them.
        edition: the files must be of it.

    Raises:
        BenchmarkFileError: when a file is absent or has the wrong form; the message names file, row and field.
    """
    path = expand_path(path, "benchmark.file")
    rows = []
    for file in list_files(path, edition):
        for index, row in enumerate(read_json(file, kind=list)):
            rows.append(read_prompt(row, f"{file}: prompt {index}", edition))
    if not rows:
        raise BenchmarkFileError(f"{path} holds no prompt")
    numbers = [row.number for row in rows]
    if len(set(numbers)) != len(numbers):
        raise BenchmarkFileError(f"{path}: several prompts have the prompt_id {max(numbers, key=numbers.count)}")
    return sorted(rows, key=lambda row: row.number)


def read_prompt(row: Any, origin: str, edition: Edition) -> WisePrompt:
    """Read a row of WISE's files; `origin` tells where it stands, for messages."""
    check_fields(row, {"prompt_id": int, "Prompt": str, "Explanation": str, "Category": str}, origin)
    category = edition.find_category(row["prompt_id"])
    if not category:
        last = max(edition.last_ids.values())
        raise BenchmarkFileError(f"{origin} needs a 'prompt_id' from 1 to {last}, got {shorten(row['prompt_id'])}")
    # Ids are counted anew in each edition, so a row whose category isn't that of its id is from the other one.
    if not any(word in row["Category"].lower() for word in CATEGORY_WORDS[category]):
        raise BenchmarkFileError(
            f"{origin} has the category {shorten(row['Category'])!r}, where {edition.name} has {category} "
            f"(prompt_id {row['prompt_id']}); benchmark=wise reads the first edition, benchmark=wise_verified the "
            "verified one"
        )
    return WisePrompt(row["prompt_id"], row["Prompt"], row["Explanation"], category)


@dataclass(kw_only=True, eq=False)
class WISE(PictureBenchmark):
    """1,000 prompts that need knowledge of the world, rated by a judge from 0 to 2 in three respects.

    Attributes:
        file: the folder of its three JSON files, or one such file.
        script: its published script that asks the judge, whose question is then asked; None asks in our own words.
    """

    needs: ClassVar[Needs] = "questions"
    published_manner: ClassVar[Manner | None] = Manner(temperature=0, max_tokens=2000)
    edition: ClassVar[Edition] = LEGACY

    file: str
    script: str | None = None
    title: str = "WISE"

    def read_files(self) -> None:
        """Read the prompts; the number of a prompt names its picture."""
        self.prompts = read_wise(self.file, self.edition)
        self.prompt_of = {str(prompt.number): prompt for prompt in self.prompts}
        self.words = self.edition.words
        if self.script is not None:
            published = read_script(self.script)
            self.words = published.get_message("user")
            self.use_system(published.get_message("system"))

    def list_targets(self) -> list[Target]:
        """List the targets `<prompt_id>.png`."""
        return [Target(f"{row.number}.png", str(row.number), row.prompt) for row in self.prompts]

    def find_group(self, target: Target) -> str:
        """Find the category of its prompt."""
        return self.prompt_of[target.item].category

    def judge_picture(self, target: Target, picture: Image.Image, judge: Any) -> PictureVerdict:
        """Ask the judge for the ratings, after telling it what the prompt means."""
        prompt = self.prompt_of[target.item]
        text = fill(self.words, Prompt=prompt.prompt, Explanation=prompt.explanation)
        ratings, reply = ask_until_usable(judge, Asked([text], [picture], self.tries), self.edition.read_ratings)
        listed = ", ".join(f"{name} {value}" for name, value in ratings.items())
        return PictureVerdict(self.edition.compute_score(ratings), listed, {"ratings": ratings, "reply": reply})

    def combine(self, means: Mapping[str, float]) -> dict[str, float]:
        """Return the mean per category and, if every category is there, `overall`: their mean by its weights."""
        ordered = {name: means[name] for name in self.edition.shares if name in means}
        if len(ordered) < len(self.edition.shares):
            return ordered
        return {"overall": math.fsum(self.edition.shares[name] * value for name, value in ordered.items())} | ordered

    def describe_rules(self) -> str:
        """Name the edition, whose ratings and weights are used."""
        return f"WISE, {self.edition.name}"

    def describe_questions(self) -> Any:
        """Return the question, and what each prompt means."""
        return [self.words, [prompt.explanation for prompt in self.prompts]]

    def list_notes(self, rows: Sequence[Row]) -> list[str]:
        """Say when the question is our own."""
        return [] if self.script else [OWN_WORDS]


@dataclass(kw_only=True, eq=False)
class WISEVerified(WISE):
    """The verified edition of WISE: 1,000 prompts, rated 0 or 1."""

    published_manner: ClassVar[Manner | None] = Manner(
        temperature=0, max_tokens=500, extra={"chat_template_kwargs": {"enable_thinking": False}}
    )
    edition: ClassVar[Edition] = VERIFIED

    title: str = "WISE Verified"
