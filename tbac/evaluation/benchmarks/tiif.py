"""TIIF-Bench: pairs of a short and a long prompt, with yes/no questions about their pictures."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import mean
from typing import Any, ClassVar

from PIL import Image

from tbac.evaluation.benchmarks.base import OWN_WORDS, Needs, PictureBenchmark
from tbac.evaluation.benchmarks.files import BenchmarkFileError, read_rows
from tbac.evaluation.benchmarks.rows import Count, PictureVerdict, Row
from tbac.evaluation.judges.base import Asked, Manner, ask_until_usable, read_yes_or_no_lines
from tbac.evaluation.judges.ocr import OcrJudge
from tbac.evaluation.picture_tree import Target
from tbac.evaluation.published_scripts import fill, mark, read_script
from tbac.evaluation.words import WORD_SCORES, compare_words, list_quoted_words
from tbac.files import expand_path, shorten

OWN_LINES = """Answer these questions about the picture, in this order, each in a line that begins with yes or no.
\x02questions\x03"""
PLACE = "##YNQuestions##"  # where the published templates have the questions
TEMPLATES = ("raw_prompt", "raw_prompt_1", "raw_prompt_2")  # names of the published templates in their script
LENGTHS = ("short", "long")
REASONINGS = ("numeracy", "comparison", "differentiation", "negation")

# Sub-attributes by level, each with the types that it is the mean of (TIIF-Bench's summary_dimension_results.py).
GROUPS: dict[str, dict[str, tuple[str, ...]]] = {
    "basic": {
        "attribute": ("shape+color", "color+texture", "texture+color", "shape+texture"),
        "relation": ("2d_spatial_relation", "3d_spatial_relation", "action+2d", "action+3d"),
        "reasoning": ("numeracy", "negation", "differentiation", "comparison"),
    },
    "advanced": {
        "attribute+relation": (
            "action+color", "action+texture", "color+2d", "color+3d",
            "shape+2d", "shape+3d", "texture+2d", "texture+3d",
        ),
        "attribute+reasoning": tuple(f"{r}+{a}" for r in REASONINGS for a in ("color", "texture")),
        "relation+reasoning": tuple(f"{r}+{d}" for r in REASONINGS for d in ("2d", "3d")),
        "text": ("text",),
        "style": ("style",),
    },
    "real_world": {"complex": ("real_world",)},
}  # fmt: skip
TYPES = {kind for subs in GROUPS.values() for kinds in subs.values() for kind in kinds}


@dataclass(frozen=True)
class Pair:
    """A short and a long prompt of the same content.

    Attributes:
        kind: type of the pair, such as `2d_spatial_relation`.
        row: number of its line in the file of that type, from 0, which also names its pictures.
        prompts: length -> prompt.
        questions: about the pictures of both prompts.
        answers: whether the right answer to each question is yes.
    """

    kind: str
    row: int
    prompts: Mapping[str, str]
    questions: Sequence[str] = ()
    answers: Sequence[bool] = ()


def read_pairs(prompts: str | Path, questions: str | Path | None = None) -> list[Pair]:
    """Read the pairs in the order of files and lines.

    Args:
        prompts: folder of `*.jsonl` with `type`, `short_description`, `long_description`.
        questions: folder of `*.jsonl` that have `yn_question_list` and `yn_answer_list` as well, in the same order;
            None when nothing will be scored.

    Raises:
        BenchmarkFileError: when a file has the wrong form, or a type isn't one of TIIF-Bench's.
    """
    # A prompt and its questions lie in two files, and belong together by their type and their place in it.
    rows = _read_rows_by_type(prompts, {"type": str, "short_description": str, "long_description": str})
    asked = (
        _read_rows_by_type(questions, {"type": str, "yn_question_list": list, "yn_answer_list": list})
        if questions
        else {}
    )
    pairs = []
    for kind, rows_of_kind in rows.items():
        if questions and len(asked.get(kind, ())) != len(rows_of_kind):
            raise BenchmarkFileError(
                f"{questions} has questions for {len(asked.get(kind, ()))} prompts of type {kind!r}, {prompts} has "
                f"{len(rows_of_kind)} such prompts"
            )
        for number, row in enumerate(rows_of_kind):
            question = asked[kind][number] if questions else {"yn_question_list": [], "yn_answer_list": []}
            texts = question["yn_question_list"]
            # Some files say "Yes" and some "yes"; anything else would silently count as no.
            answers = [shorten(answer).strip().lower() for answer in question["yn_answer_list"]]
            place = f"{questions}: type {kind!r}, row {number}"
            if len(texts) != len(answers) or not set(answers) <= {"yes", "no"}:
                raise BenchmarkFileError(f"{place}: yn_answer_list must hold yes or no for each question")
            if questions and not (texts and all(isinstance(text, str) and text.strip() for text in texts)):
                raise BenchmarkFileError(f"{place}: yn_question_list must hold questions, got {shorten(texts)}")
            described = {length: row[f"{length}_description"] for length in LENGTHS}
            pairs.append(Pair(kind, number, described, texts, [answer == "yes" for answer in answers]))
    return pairs


def _read_rows_by_type(folder: str | Path, required: Mapping[str, type]) -> dict[str, list[dict]]:
    folder = expand_path(folder, "benchmark.file")
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise BenchmarkFileError(f"TIIF-Bench's folder {folder} has no *.jsonl file")
    rows: dict[str, list[dict]] = defaultdict(list)
    for file in files:
        for row in read_rows(file, required, _describe_unknown_type):
            rows[row["type"]].append(row)
    return rows


def _describe_unknown_type(row: Mapping[str, str]) -> str:
    """Describe what is wrong with the type of a row; "" when nothing is."""
    return "" if row["type"] in TYPES else f"unknown type {shorten(row['type'])!r}"


def name_picture(pair: Pair, length: str, model_name: str) -> str:
    """Name a picture: `<type>/<model>/{short,long}_description/<row>.png`."""
    return f"{pair.kind}/{model_name}/{length}_description/{pair.row}.png"


def list_tiif_targets(pairs: Sequence[Pair], model_name: str) -> list[Target]:
    """List both pictures of every pair."""
    targets = []
    for pair in pairs:
        for length in LENGTHS:
            item = f"{pair.kind}/{length}/{pair.row}"
            targets.append(Target(name_picture(pair, length, model_name), item, pair.prompts[length]))
    return targets


def round_share(percent: float) -> float:
    """Round a share in percent as TIIF-Bench's summary does before it averages: to four decimals of the share.

    It counts right answers. Here the share comes out of a mean, so what that adds in the last digits goes first.
    """
    return 100 * round(round(percent / 100, 12), 4)


def average_tiif(by_type: Mapping[str, float]) -> dict[str, float]:
    """Compute the averages for one prompt length.

    A sub-attribute is the mean of its types. `basic` and `advanced` are means of all their types, so that `text` and
    `style` each weigh as much as one type. `overall` is the mean of the nine sub-attributes. A mean leaves out the
    types that aren't given.

    Args:
        by_type: type -> share of right answers.

    Raises:
        ValueError: for no type, or one that isn't TIIF-Bench's.
    """
    unknown = sorted(set(by_type) - TYPES)
    if unknown or not by_type:
        raise ValueError(f"types of TIIF-Bench are needed, got {', '.join(unknown) or 'none'}")
    levels, subs = {}, {}
    for level, groups in GROUPS.items():
        # A level weighs its types alike, so it isn't the mean of its sub-attributes.
        level_shares: list[float] = []
        for name, kinds in groups.items():
            shares = [by_type[kind] for kind in kinds if kind in by_type]
            level_shares += shares
            if shares:
                subs[name] = mean(shares)
        if level_shares:
            levels[level] = mean(level_shares)
    return {"overall": mean(subs.values()), **levels, **subs}


@dataclass(kw_only=True, eq=False)
class TIIF(PictureBenchmark):
    """Pairs of a short and a long prompt with yes/no questions.

    The published script puts the questions of a picture into one of three templates at random, samples the reply at
    temperature 1, and asks again until the number of lines fits. Here the template follows from the picture's name and
    the number of the try. `steady` asks in the first template alone, at temperature 0.

    Attributes:
        file: folder of test prompts.
        questions: folder of eval prompts; None when pictures are only drawn.
        script: TIIF-Bench's `eval_with_vlm.py`, whose templates and system message are then used; None asks in our own
            words.
        read_words: read the words in pictures of the type `text` by optical character recognition too.
        model_name: name of the folder of the pictures within each type.
    """

    needs: ClassVar[Needs] = "questions"
    questions_source: ClassVar[str] = "TIIF-Bench's folder of eval prompts"
    published_manner: ClassVar[Manner | None] = Manner(temperature=1)

    file: str
    questions: str | None = None
    script: str | None = None
    read_words: bool = False
    model_name: str = "tbac"
    title: str = "TIIF-Bench"

    def read_files(self) -> None:
        """Read the pairs and the templates, and note which pair each picture belongs to."""
        self.pairs = read_pairs(self.file, self.questions)
        self.pair_of: dict[str, Pair] = {}
        self.length_of: dict[str, str] = {}
        for pair in self.pairs:
            for length in LENGTHS:
                path = name_picture(pair, length, self.model_name)
                self.pair_of[path], self.length_of[path] = pair, length
        self.templates = [OWN_LINES]
        if self.script is not None:
            published = read_script(self.script, TEMPLATES)
            self.templates = [str(published.get(name)).replace(PLACE, mark("questions")) for name in TEMPLATES]
            self.use_system(published.get_message("system"))
        self.ocr = OcrJudge() if self.read_words else None
        for pair in self.pairs if self.read_words else ():
            if pair.kind == "text" and not list_quoted_words(pair.prompts["short"]):
                raise BenchmarkFileError(
                    f"{self.file}: type 'text', row {pair.row}: benchmark.read_words needs words in double quotes in "
                    f"'short_description', got {shorten(pair.prompts['short'])}"
                )

    def list_targets(self) -> list[Target]:
        """List the targets `<type>/<model>/{short,long}_description/<row>.png`."""
        return list_tiif_targets(self.pairs, self.model_name)

    def find_group(self, target: Target) -> str:
        """Find the type of its pair."""
        return self.pair_of[target.path].kind

    def find_prompt(self, target: Target) -> str:
        """Find its pair: both prompts of a pair are about the same."""
        pair = self.pair_of[target.path]
        return f"{pair.kind}/{pair.row}"

    def list_wordings(self, target: Target) -> list[str]:
        """List the ways to put the questions about a picture, in the order of the tries."""
        texts = "\n".join(text.strip() for text in self.pair_of[target.path].questions)
        wordings = [fill(template, questions=texts) for template in self.templates]
        if self.steady:
            return wordings[:1]
        # What a script draws at random follows from the picture here, so that going on asks nothing twice.
        order = Random(f"{self.seed}/{target.path}")
        return [order.choice(wordings) for _ in range(self.tries)]

    def judge_picture(self, target: Target, picture: Image.Image, judge: Any) -> PictureVerdict:
        """Ask all questions about a picture at once, until there is a line for each."""
        pair = self.pair_of[target.path]

        def read(reply: str) -> list[bool] | None:
            return read_yes_or_no_lines(reply, len(pair.questions))

        answers, reply = ask_until_usable(judge, Asked(self.list_wordings(target), [picture], self.tries), read)
        right = [given == expected for given, expected in zip(answers, pair.answers, strict=True)]
        wrong = [question for question, is_right in zip(pair.questions, right, strict=True) if not is_right]
        details = {"right": sum(right), "asked": len(right), "reply": reply}
        if self.ocr is not None and pair.kind == "text":
            # Both pictures of a pair are held against the same words; long prompts quote them with signs and twice.
            words = list_quoted_words(pair.prompts["short"])
            details |= compare_words(words, self.ocr.read_text_lines(picture))
        return PictureVerdict(float(mean(right)), ", ".join(wrong), details)

    def count(self, row: Row) -> list[Count]:
        """Count the questions of a type and length alike, whichever picture they are about."""
        if row.state == "failed":
            return []
        pair, length = self.pair_of[row.picture], self.length_of[row.picture]
        asked = len(pair.questions)
        counts = [Count(f"{pair.kind}, {length}", 100 * row.details.get("right", 0) / asked, asked)]
        for name in WORD_SCORES if pair.kind == "text" and self.ocr is not None else ():
            worst = 1.0 if name == "word distance" else 0.0
            counts.append(Count(f"{name}, {length}", row.details.get(name, worst)))
        return counts

    def combine(self, means: Mapping[str, float]) -> dict[str, float]:
        """Compute the averages of each length, and before them the mean of both."""
        scores: dict[str, float] = {}
        words: dict[str, float] = {}
        for length in LENGTHS:
            ending = f", {length}"
            by_type = {cell.removesuffix(ending): value for cell, value in means.items() if cell.endswith(ending)}
            words |= {f"{name}{ending}": by_type.pop(name) for name in WORD_SCORES if name in by_type}
            by_type = {kind: round_share(value) for kind, value in by_type.items()}
            if by_type:
                scores |= {f"{name}{ending}": value for name, value in average_tiif(by_type).items()}
        overall = [scores[f"overall, {length}"] for length in LENGTHS if f"overall, {length}" in scores]
        return {"overall": mean(overall), **scores, **words}

    def describe_rules(self) -> str:
        """Say how the questions are put; a missing picture has no right answer, and a failed one isn't counted."""
        if self.steady:
            return "TIIF-Bench's averages, asked in one wording at temperature 0"
        return "TIIF-Bench's averages"

    def describe_questions(self) -> Any:
        """Return the wordings, and the questions with their answers."""
        return [self.templates, [[list(pair.questions), list(pair.answers)] for pair in self.pairs]]

    def list_notes(self, rows: Sequence[Row]) -> list[str]:
        """Say when the wording is our own, and what types there are no pictures of."""
        notes = [] if self.script else [OWN_WORDS]
        kinds = {pair.kind for pair in self.pairs}
        absent = [name for groups in GROUPS.values() for name, types in groups.items() if not kinds & set(types)]
        return notes + ([f"Nothing of {', '.join(absent)}."] if absent else [])
