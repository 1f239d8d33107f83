"""UniGenBench: prompts with testpoints of ten dimensions, each of which a judge marks 0 or 1."""

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any, ClassVar, Literal

from PIL import Image

from tbac.evaluation.benchmarks.base import OWN_WORDS, Needs, PictureBenchmark
from tbac.evaluation.benchmarks.files import BenchmarkFileError, check_fields
from tbac.evaluation.benchmarks.rows import Count, PictureVerdict, Row
from tbac.evaluation.judges.base import Asked, Manner, ask_until_usable
from tbac.evaluation.picture_tree import Target
from tbac.evaluation.published_scripts import Script, read_script
from tbac.files import expand_path, parse_json, read_csv, shorten

OWN_QUESTION = """A picture was generated from this prompt: {prompt}
It must show these {count} things, each given as its kind and what the prompt says of it:
{points}
Decide for each in order whether the picture clearly shows it. Reply with two lists in these tags and nothing else, each
with {count} entries: <analysis>["a short reason", …]</analysis> <score>[1 if it is shown, else 0, …]</score>"""
TESTPOINTS = {"en": ("Testpoints", "Testpoint Description"), "zh": ("考点", "考点对应描述")}
Category = Literal["en", "en_long", "zh", "zh_long"]


@dataclass(frozen=True)
class TestedPrompt:
    """A prompt and what is looked for in its pictures.

    Attributes:
        index: names its pictures.
        prompt: the text.
        points: the kinds of the testpoints, such as `Attribute - Color`.
        descriptions: what the prompt says of each.
    """

    index: int
    prompt: str
    points: Sequence[str]
    descriptions: Sequence[str]


def read_unigenbench(file: str, language: str) -> list[TestedPrompt]:
    """Read the rows of a CSV file `test_prompts_*.csv`.

    Raises:
        BenchmarkFileError: when a column or field is missing; the message names file, row and field.
    """
    path = expand_path(file, "benchmark.file")
    if not path.is_file():
        raise BenchmarkFileError(f"UniGenBench's prompts {path} don't exist; give its test_prompts_{language}.csv")
    columns = {name: str for name in ("index", f"prompt_{language}", f"sub_dims_{language}")}
    prompts = []
    for line, row in enumerate(read_csv(path), start=1):
        place = f"{path}: row {line}"
        check_fields(row, columns, place)
        if not row["index"].isdecimal() or len(row["index"]) > 9:
            raise BenchmarkFileError(f"{place} needs a whole number as 'index', got {shorten(row['index'])!r}")
        parts = parse_json(row[f"sub_dims_{language}"], place, dict)
        points, descriptions = (parts.get(name) for name in TESTPOINTS[language])
        texts = [*points, *descriptions] if isinstance(points, list) and isinstance(descriptions, list) else [None]
        if not all(isinstance(text, str) for text in texts) or len(points) != len(descriptions) or not points:
            names = " and ".join(TESTPOINTS[language])
            raise BenchmarkFileError(f"{place} needs {names} as lists of texts of one length, got {shorten(parts)}")
        prompts.append(TestedPrompt(int(row["index"]), row[f"prompt_{language}"], points, descriptions))
    if not prompts:
        raise BenchmarkFileError(f"{path} holds no prompt")
    return prompts


def read_marks(reply: str, count: int) -> list[Any] | None:
    """Read the marks of a reply, as the published script does; None where that counts none of them.

    There must be as many marks as testpoints, and as many analyses, which may also be a mapping or a text. The script
    writes both as JSON and reads them as Python, so a reply with True, False or None isn't counted either.
    """
    values = []
    for tag in ("analysis", "score"):
        match = re.search(rf"<{tag}>(.*?)</{tag}>", reply, re.DOTALL)
        try:
            value = ast.literal_eval(match[1].strip() if match else "")
            if len(value) != count:
                return None
            values.append(ast.literal_eval(json.dumps(value, ensure_ascii=False)))
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            return None
    return values[1] if isinstance(values[1], list) else None


@dataclass(kw_only=True, eq=False)
class UniGenBench(PictureBenchmark):
    """600 prompts, four pictures each, marked 0 or 1 by 27 kinds of testpoints of ten dimensions.

    Attributes:
        file: one of its `test_prompts_*.csv`.
        category: which one it is: `en`, `en_long`, `zh` or `zh_long`; names a folder of the tree.
        script: its `eval_common.py`, whose question is then asked; None asks in our own words.
        samples: pictures of each prompt; published numbers have 4.
        model_name: name of the folder of the pictures.
    """

    needs: ClassVar[Needs] = "questions"
    published_manner: ClassVar[Manner | None] = Manner(max_tokens=4096)

    file: str
    category: Category = "en"
    script: str | None = None
    samples: int = 4
    model_name: str = "tbac"
    title: str = "UniGenBench"

    def read_files(self) -> None:
        """Read the prompts and the published question."""
        if self.category not in ("en", "en_long", "zh", "zh_long"):
            raise ValueError(f"benchmark.category must be en, en_long, zh or zh_long, got {shorten(self.category)!r}")
        self.language = self.category.split("_")[0]
        self.prompts = read_unigenbench(self.file, self.language)
        self.prompt_of = {str(prompt.index): prompt for prompt in self.prompts}
        self.published: Script | None = None
        if self.script is not None:
            language = self.language.upper()
            self.published = read_script(
                self.script, [f"SYSTEM_PROMPT_{language}_TEMPLATE", f"EXPLANATION_DICT_{language}"]
            )

    def list_targets(self) -> list[Target]:
        """List the targets `<category>/<model>/<index>_<k>.png`."""
        folder = f"{self.category}/{self.model_name}"
        return [
            Target(f"{folder}/{prompt.index}_{k}.png", str(prompt.index), prompt.prompt, (k,))
            for prompt in self.prompts
            for k in range(self.samples)
        ]

    def find_group(self, target: Target) -> str:
        """Find the dimension of its first testpoint."""
        return find_dimension(self.prompt_of[target.item].points[0])

    def build_question(self, prompt: TestedPrompt) -> str:
        """Build the question about the pictures of a prompt, from the published script or in our own words."""
        if self.published is None:
            points = "\n".join(f"- {p}: {d}" for p, d in zip(prompt.points, prompt.descriptions, strict=True))
            return OWN_QUESTION.format(prompt=prompt.prompt, count=len(prompt.points), points=points)
        # The published question has the kinds with their definitions, and what the prompt says of each.
        language = self.language.upper()
        definitions = self.published.get(f"EXPLANATION_DICT_{language}")
        number = 0 if self.language == "en" else 1
        parts = {}
        for key, name, texts in (
            ("explanation", "checkpoint_header", [definitions.get(point, "") for point in prompt.points]),
            ("test_explanation", "checkpoint_desc_header", prompt.descriptions),
        ):
            header = self.published.entries[name][number] if len(self.published.entries[name]) > number else ""
            lines = "".join(f"\n{point}: {text}" for point, text in zip(prompt.points, texts, strict=True))
            parts[key] = f"{header}:「{lines}\n」"
        template: str = self.published.get(f"SYSTEM_PROMPT_{language}_TEMPLATE")
        return template.format(prompt=prompt.prompt, testpoint=list(prompt.points), **parts)

    def judge_picture(self, target: Target, picture: Image.Image, judge: Any) -> PictureVerdict:
        """Ask for a mark of every testpoint."""
        prompt = self.prompt_of[target.item]

        def read(reply: str) -> list[Any] | None:
            return read_marks(reply, len(prompt.points))

        marks, reply = ask_until_usable(judge, Asked([self.build_question(prompt)], [picture], self.tries), read)
        met = [mark == 1 for mark in marks]
        lacking = [f"{p}: {d}" for p, d, ok in zip(prompt.points, prompt.descriptions, met, strict=True) if not ok]
        return PictureVerdict(sum(met) / len(met), ", ".join(lacking), {"met": met, "reply": reply})

    def count(self, row: Row) -> list[Count]:
        """Count each testpoint for its dimension and for its kind; those of a missing picture aren't met."""
        if row.state == "failed":
            return []
        points = self.prompt_of[row.picture.split("/")[-1].split("_")[0]].points
        met = row.details["met"] if row.state == "scored" else [False] * len(points)
        counts = []
        for point, is_met in zip(points, met, strict=True):
            counts.append(Count(find_dimension(point), 100 * float(is_met)))
            if find_dimension(point) != point:
                counts.append(Count(point, 100 * float(is_met)))
        return counts

    def combine(self, means: Mapping[str, float]) -> dict[str, float]:
        """Return the mean over dimensions, these, and the kinds."""
        dimensions = {name: value for name, value in means.items() if find_dimension(name) == name}
        kinds = {name: means[name] for name in sorted(means) if name not in dimensions}
        return {"overall": mean(dimensions.values()), **dimensions, **kinds}

    def describe_questions(self) -> Any:
        """Return what is asked about every prompt."""
        return [self.build_question(prompt) for prompt in self.prompts]

    def list_notes(self, rows: Sequence[Row]) -> list[str]:
        """Say when the question is our own, and what `overall` is."""
        note = "Overall is the mean over dimensions; the published script prints none."
        return [note] if self.script else [OWN_WORDS, note]


def find_dimension(point: str) -> str:
    """Find the dimension of a kind of testpoint: what stands before its first dash."""
    return point.split("-", 1)[0].strip() if "-" in point else point
