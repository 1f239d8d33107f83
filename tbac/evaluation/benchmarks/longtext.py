"""LongText-Bench: long texts that pictures must show, compared word by word with what a judge reads in them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from PIL import Image

from tbac.evaluation.benchmarks.base import OWN_WORDS, Needs, PictureBenchmark
from tbac.evaluation.benchmarks.files import read_rows
from tbac.evaluation.benchmarks.rows import Count, PictureVerdict, Row
from tbac.evaluation.judges.base import Asked, EmptyReplyError, Manner, ask_until_usable
from tbac.evaluation.picture_tree import Target
from tbac.evaluation.published_scripts import read_script
from tbac.evaluation.words import count_found, split_text
from tbac.files import shorten

OWN_QUESTION = "Write down all text that this picture shows, each part once, and nothing else. Without any: No text"
NO_TEXT = "No text recognized."  # what the published script takes out of replies


def describe_problem(row: dict) -> str:
    """Describe what is wrong with a row of LongText-Bench's file; "" when nothing is."""
    if not 0 <= row["prompt_id"] < 10**6:
        return f"'prompt_id' must be from 0 to 999999, got {shorten(row['prompt_id'])}"
    if not row["text"] or not all(isinstance(text, str) for text in row["text"]):
        return f"'text' must hold texts, got {shorten(row['text'])}"
    return (
        "" if split_text(" ".join(row["text"]), by_letter=True) else f"'text' has no word, got {shorten(row['text'])}"
    )


@dataclass(kw_only=True, eq=False)
class LongText(PictureBenchmark):
    """160 prompts with texts of several words, four pictures each; the score is the share of words that are read.

    Attributes:
        file: its `text_prompts.jsonl` or `text_prompts_zh.jsonl`.
        mode: `en` compares words, `zh` single letters.
        script: its `evaluate_text_reward.py`, whose question is then asked; None asks in our own words. `judge=ocr`
            is asked nothing.
        samples: pictures of each prompt; published numbers have 4.
    """

    needs: ClassVar[Needs] = "text"
    published_manner: ClassVar[Manner | None] = Manner(temperature=0, max_tokens=1024, pictures_first=True, whole=False)

    file: str
    mode: Literal["en", "zh"] = "en"
    script: str | None = None
    samples: int = 4
    title: str = "LongText-Bench"

    def read_files(self) -> None:
        """Read the prompts and the published question."""
        if self.mode not in ("en", "zh"):
            raise ValueError(f"benchmark.mode must be en or zh, got {self.mode!r}")
        self.prompts = read_rows(self.file, {"prompt_id": int, "prompt": str, "text": list}, describe_problem)
        self.row_of = {f"{row['prompt_id']:04d}": row for row in self.prompts}
        self.words = OWN_QUESTION if self.script is None else str(read_script(self.script).get("qwen_prompt"))

    def list_targets(self) -> list[Target]:
        """List the targets `<prompt_id>_<k>.png`, with four digits and samples counted from 1."""
        return [
            Target(f"{row['prompt_id']:04d}_{k + 1}.png", f"{row['prompt_id']:04d}", row["prompt"], (k,))
            for row in self.prompts
            for k in range(self.samples)
        ]

    def find_group(self, target: Target) -> str:
        """Find the length of its text, where the file says it, or its category."""
        row = self.row_of[target.item]
        return str(row.get("length", row.get("category", "")))

    def judge_picture(self, target: Target, picture: Image.Image, judge: Any) -> PictureVerdict:
        """Read the picture's text, and count the wanted words in it."""
        if hasattr(judge, "read_text_lines"):
            read = "\n".join(judge.read_text_lines(picture))
        else:
            read = self.ask_for_text(judge, picture).replace(NO_TEXT, "")
        by_letter = self.mode == "zh"
        wanted = split_text(" ".join(self.row_of[target.item]["text"]), by_letter)
        found = count_found(wanted, split_text(read, by_letter))
        details = {"found": found, "wanted": len(wanted), "read": read}
        return PictureVerdict(found / len(wanted), f"read: {read}", details)

    def ask_for_text(self, judge: Any, picture: Image.Image) -> str:
        """Ask what a picture says; a judge that replies with nothing has read nothing, as in the published script."""
        try:
            return ask_until_usable(judge, Asked([self.words], [picture], self.tries), str)[0]
        except EmptyReplyError:
            return ""

    def count(self, row: Row) -> list[Count]:
        """Count each word alike, whichever picture it belongs to; a missing picture shows none."""
        if row.state == "failed":
            return []
        wanted = split_text(" ".join(self.row_of[row.picture.split("_")[0]]["text"]), self.mode == "zh")
        share = row.score or 0.0
        return [Count("overall", share, len(wanted)), *([Count(row.group, share, len(wanted))] if row.group else [])]

    def combine(self, means: Mapping[str, float]) -> dict[str, float]:
        """Return the means."""
        return dict(means)

    def describe_questions(self) -> Any:
        """Return the question and the texts."""
        return [self.words, self.mode, [row["text"] for row in self.prompts]]

    def list_notes(self, rows: Sequence[Row]) -> list[str]:
        """Say when the question is our own."""
        return [] if self.script else [OWN_WORDS]
