"""GEdit-Bench: edits that people asked for, in English and Chinese, rated by a judge from 0 to 10 in two respects."""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, ClassVar, Literal

from PIL import Image

from tbac.evaluation.benchmarks.base import FILE_NAME, OWN_WORDS, Needs, PictureBenchmark
from tbac.evaluation.benchmarks.files import BenchmarkFileError, check_fields, locate_picture
from tbac.evaluation.benchmarks.rows import Count, PictureVerdict, Row
from tbac.evaluation.judges.base import Asked, Manner, ask_until_usable
from tbac.evaluation.picture_tree import Target, name_records_folder
from tbac.evaluation.published_scripts import read_script
from tbac.files import expand_path, reading, shorten, write_whole
from tbac.pictures import open_picture

COLUMNS = ("task_type", "key", "instruction", "instruction_language", "input_image", "Intersection_exist")
PLACE = "<instruction>"  # where the published question has the instruction
MEASURES = ("semantics", "quality", "overall")  # called G_SC, G_PQ and G_O in papers
FULL, INTERSECTION = "full", "intersection"  # all edits, and those that no model of the paper refused
# Names of the published texts in their script: the frame, and then what is rated.
FRAME = "_context_no_delimit"
SEMANTICS = (FRAME, "_prompts_0shot_two_image_edit_rule", "_prompts_0shot_tie_rule_SC")
QUALITY = (FRAME, "_prompts_0shot_rule_PQ")
OWN_SEMANTICS = f"""The second picture was made from the first by this instruction: {PLACE}
Give two whole numbers from 0 to 10: how well the instruction was followed, and how well all else was kept.
Reply as JSON and nothing else: {{"score": [followed, kept], "reasoning": "a short reason"}}"""
OWN_QUALITY = """Give two whole numbers from 0 to 10: how natural this picture looks, and how free it is of faults.
Reply as JSON and nothing else: {"score": [natural, faultless], "reasoning": "a short reason"}"""


@dataclass(frozen=True)
class GEditItem:
    """An edit: its kind, key, language and instruction, the picture that it changes, and whether both sets have it."""

    task: str
    key: str
    language: str
    instruction: str
    image: Path
    in_intersection: bool


def read_tables(folder: Path) -> Iterator[tuple[str, dict]]:
    """Read the rows of a data set's Parquet or Arrow files, one after the other, with the place of each."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for file in sorted([*folder.rglob("*.parquet"), *folder.rglob("*.arrow")]):
        with reading(str(file)):
            if file.suffix == ".parquet":
                table = pq.ParquetFile(file)
                lacking = [name for name in COLUMNS if name not in table.schema_arrow.names]
                batches = iter(()) if lacking else table.iter_batches(batch_size=16, columns=list(COLUMNS))
            else:
                stream = pa.ipc.open_stream(file.open("rb"))
                lacking = [name for name in COLUMNS if name not in stream.schema.names]
                batches = iter(()) if lacking else iter(stream)
            if lacking:
                raise BenchmarkFileError(f"{file} lacks the column {lacking[0]!r}")
            number = 0
            for batch in batches:
                for row in batch.to_pylist():
                    yield f"{file}: row {number}", row
                    number += 1


def read_gedit(path: str, images: str) -> list[GEditItem]:
    """Read GEdit-Bench as it is downloaded, and unpack its source pictures.

    Args:
        path: folder of the data set, with Parquet or Arrow files.
        images: folder that the source pictures are unpacked to, one for each key.

    Raises:
        BenchmarkFileError: when a file has the wrong form; the message names file, row and field.
    """
    folder, sources = expand_path(path, "benchmark.file"), expand_path(images, "benchmark.images")
    items: dict[tuple[str, str, str], GEditItem] = {}
    pictures: dict[str, bytes] = {}  # key -> digest of its source
    for place, row in read_tables(folder) if folder.is_dir() else ():
        check_fields(row, {**dict.fromkeys(COLUMNS[:4], str), "input_image": dict, "Intersection_exist": bool}, place)
        for name in ("key", "task_type", "instruction_language"):
            if not FILE_NAME.fullmatch(row[name]):
                raise BenchmarkFileError(f"{place}: {name!r} must be able to name a file, got {shorten(row[name])!r}")
        content = row["input_image"].get("bytes")
        if not isinstance(content, bytes):
            raise BenchmarkFileError(f"{place} needs the bytes of a picture as 'input_image'")
        digest = hashlib.sha256(content).digest()
        if pictures.setdefault(row["key"], digest) != digest:
            raise BenchmarkFileError(f"{place}: the key {row['key']!r} has two source pictures")
        # The same picture serves both languages; what lies there already isn't written again.
        file = sources / f"{row['key']}.png"
        if not file.exists() or file.read_bytes() != content:
            write_whole(file, content)
        locate_picture(sources, file.name, place)
        task, language = row["task_type"], row["instruction_language"]
        item = GEditItem(task, row["key"], language, row["instruction"], file, row["Intersection_exist"])
        # A data set may lie there both as Parquet and as Arrow.
        if items.setdefault((task, language, item.key), item) != item:
            raise BenchmarkFileError(f"{place}: the key {item.key!r} of {task}, {language} has two different rows")
    if not items:
        raise BenchmarkFileError(f"GEdit-Bench's folder {folder} has no *.parquet or *.arrow file with rows")
    return list(items.values())


def read_scores(reply: str) -> list[float] | None:
    """Read the ratings of a reply, as the published script does; None where it finds none or the least isn't 0 to 10.

    They are a number or a list, `score` of a JSON object with any text around it. Without an object two whole numbers
    in brackets, or a whole number alone, are read.
    """
    try:
        if "{" in reply and "}" in reply:
            text = reply[reply.find("{") : reply.rfind("}") + 1]
            scores = json.loads(text.replace("\n", ""))["score"]
        else:
            listed = re.search(r"\[.*\]", reply, re.DOTALL)
            is_pair = listed is not None and re.fullmatch(r"\[\d+, ?\d+\]", listed[0])
            scores = json.loads(listed[0]) if listed is not None and is_pair else int(reply)
    except (ValueError, KeyError, RecursionError):
        return None
    scores = scores if isinstance(scores, list) else [scores]
    are_numbers = all(isinstance(s, int | float) and not isinstance(s, bool) for s in scores)
    return scores if scores and are_numbers and 0 <= min(scores) <= 10 else None


@dataclass(kw_only=True, eq=False)
class GEdit(PictureBenchmark):
    """606 edits of eleven kinds, with instructions in English and in Chinese.

    Attributes:
        file: folder of the data set.
        images: folder that its source pictures are unpacked to.
        language: `en`, `cn`, or `all`; published numbers are of each alone.
        script: its `viescore/vie_prompts.py`, whose questions are then asked; None asks in our own words.
        model_name: name of the folder of the pictures.
    """

    needs: ClassVar[Needs] = "questions"
    published_manner: ClassVar[Manner | None] = Manner(max_tokens=1400)

    file: str
    images: str
    language: Literal["en", "cn", "all"] = "en"
    script: str | None = None
    model_name: str = "tbac"
    image_guidance_scale: float | None = 1.5
    title: str = "GEdit-Bench"

    def read_files(self) -> None:
        """Read the edits and the published questions."""
        if self.language not in ("en", "cn", "all"):
            raise ValueError(f"benchmark.language must be en, cn or all, got {shorten(self.language)!r}")
        items = [item for item in read_gedit(self.file, self.images) if self.language in (item.language, "all")]
        if not items:
            raise BenchmarkFileError(f"{self.file} has no instruction in the language {self.language!r}")
        self.edit_of = {self._name_picture(item): item for item in items}
        self.words = [OWN_SEMANTICS, OWN_QUALITY]
        if self.script is not None:
            published = read_script(self.script, [*SEMANTICS, *QUALITY])
            self.words = ["\n".join(map(published.get, names)) for names in (SEMANTICS, QUALITY)]

    def _name_picture(self, item: GEditItem) -> str:
        return f"{self.model_name}/fullset/{item.task}/{item.language}/{item.key}.png"

    def list_targets(self) -> list[Target]:
        """List the targets `<model>/fullset/<kind>/<language>/<key>.png`."""
        targets = []
        for path, item in self.edit_of.items():
            name = f"{item.task}/{item.language}/{item.key}"
            targets.append(Target(path, name, item.instruction, (0,), (item.image,)))
        return targets

    def list_other_pictures(self) -> list[str]:
        """List the source picture beside each result, `<key>_SRCIMG.png`."""
        return [target.path.replace(".png", "_SRCIMG.png") for target in self.targets]

    def write_other_files(self, root: Path) -> None:
        """Write each source picture beside its result."""
        for target, name in zip(self.targets, self.list_other_pictures(), strict=True):
            file = root / name
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, self.edit_of[target.path].image.read_bytes(), name_records_folder(root))

    def find_group(self, target: Target) -> str:
        """Find the kind of edit."""
        return self.edit_of[target.path].task

    def find_prompt(self, target: Target) -> str:
        """Find its key: the instructions of both languages are about the same."""
        return self.edit_of[target.path].key

    def judge_picture(self, target: Target, picture: Image.Image, judge: Any) -> PictureVerdict:
        """Ask the judge to rate the edit, shown beside its source at the source's size, and the picture alone."""
        item = self.edit_of[target.path]
        source = open_picture(item.image)
        edited = picture.resize(source.size)
        question = self.words[0].replace(PLACE, item.instruction)
        semantics, first = ask_until_usable(judge, Asked([question], [source, edited], self.tries), read_scores)
        quality, second = ask_until_usable(judge, Asked([self.words[1]], [edited], self.tries), read_scores)
        # The worst rating of each decides, and the geometric mean of both.
        values = (min(semantics), min(quality), math.sqrt(min(semantics) * min(quality)))
        details = {**dict(zip(MEASURES, values, strict=True)), "replies": [first, second]}
        return PictureVerdict(values[2] / 10, first, details)

    def count(self, row: Row) -> list[Count]:
        """Count the three values for language, kind and both sets of edits; a missing picture has 0."""
        if row.state == "failed":
            return []
        item = self.edit_of[row.picture]
        values = {name: float(row.details.get(name, 0.0)) for name in MEASURES}
        counts = []
        for subset in (FULL, INTERSECTION) if item.in_intersection else (FULL,):
            cell = f"{item.language}/{item.task}/{subset}"
            counts += [Count(f"{cell}/{name}", value) for name, value in values.items()]
        return counts

    def combine(self, means: Mapping[str, float]) -> dict[str, float]:
        """Average over kinds, for each language, set and value; then list the kinds by their overall value."""
        scores: dict[str, float] = {}
        # (language, set, value) -> kind -> mean
        tables: dict[tuple[str, str, str], dict[str, float]] = {}
        for cell, value in means.items():
            language, kind, subset, measure = cell.split("/")
            tables.setdefault((language, subset, measure), {})[kind] = value
        languages = sorted({language for language, _, _ in tables}, reverse=True)  # en before cn
        for language in languages:
            ending = f", {language}" if len(languages) > 1 else ""
            for subset, more in ((FULL, ""), (INTERSECTION, f", {INTERSECTION}")):
                for measure in ("overall", "semantics", "quality"):
                    kinds = tables.get((language, subset, measure))
                    if kinds:
                        scores[f"{measure}{more}{ending}"] = mean(kinds.values())
            for kind, value in tables[language, FULL, "overall"].items():
                scores[f"{kind}{ending}"] = value
        return scores

    def describe_rules(self) -> str:
        """Name the score and the language."""
        return f"VIEScore, instructions in {self.language}"

    def describe_questions(self) -> Any:
        """Return the questions."""
        return self.words

    def list_notes(self, rows: Sequence[Row]) -> list[str]:
        """Say when the questions are our own."""
        return [] if self.script else [OWN_WORDS]
