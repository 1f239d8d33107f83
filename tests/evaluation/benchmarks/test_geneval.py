"""GenEval: its files, and one verdict wherever it is judged."""

import json
from collections.abc import Collection
from pathlib import Path

import pytest
from PIL import Image

from tbac.evaluation.benchmarks.base import make_picture_finder
from tbac.evaluation.benchmarks.geneval import GenEval, read_geneval
from tbac.evaluation.benchmarks.in_memory import score_in_memory
from tbac.evaluation.detectors.base import Detection, Scan
from tbac.evaluation.detectors.template import TemplateDetector
from tbac.evaluation.picture_tree import Tree
from tbac.evaluation.rules import GENEVAL_THRESHOLDS
from tests.helpers.configs import ROOT
from tests.helpers.drawing import Drawer


def test_black_pictures_score_nothing(in_world: Path, detector: TemplateDetector) -> None:
    benchmark = GenEval(name="geneval", file=str(in_world / "benchmarks" / "geneval.jsonl"))
    black = [Image.new("RGB", (32, 32))] * len(benchmark.prompts)
    scores = score_in_memory(Drawer(black), benchmark, detector).summary.scores
    tags = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
    assert scores == dict.fromkeys(("overall", *tags), 0)
    assert [row["tag"] for row in benchmark.prompts] == [t for t in tags for _ in range(2)]


class RealDetector:
    """Finds a red bench surely and a dog hardly, and names colours only where it is asked for them."""

    thresholds = GENEVAL_THRESHOLDS

    def __call__(self, image: Image.Image, colored: Collection[str] = ()) -> Scan:
        bench = Detection("bench", "red" if "bench" in colored else "", (0, 0, 20, 10), 0.9)
        return Scan("", (bench, Detection("dog", "", (0, 10, 10, 20), 0.05)))


BENCH = {"tag": "colors", "prompt": "a red bench", "include": [{"class": "bench", "count": 1, "color": "red"}]}
DOG = {"tag": "single_object", "prompt": "a dog", "include": [{"class": "dog", "count": 1}]}


def test_a_red_bench_is_right_and_a_doubtful_dog_wrong_in_memory_as_in_a_tree(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps(row) for row in (BENCH, DOG)))
    benchmark = GenEval(name="geneval", file=str(tmp_path / "prompts.jsonl"))
    pictures = [Image.new("RGB", (32, 32), color) for color in ("red", "gray")]
    in_memory = score_in_memory(Drawer(pictures), benchmark, RealDetector())

    tree = Tree(tmp_path / "tree", {})
    for target, picture in zip(benchmark.list_targets(), pictures, strict=True):
        tree.write(target, [picture])
    in_tree = list(benchmark.judge_pictures(make_picture_finder(tmp_path / "tree"), RealDetector()))

    assert in_memory.rows == in_tree
    assert [row.score for row in in_tree] == [1, 0]
    assert in_memory.summary.scores == {"overall": 0.5, "colors": 1, "single_object": 0}


def test_the_rules_are_called_from_one_place() -> None:
    callers = [
        file.name
        for folder in ("tbac", "experiments", "data_prep")
        for file in sorted((ROOT / folder).rglob("*.py"))
        for rule in ("judge_geneval(", "judge_edit(")
        if rule in file.read_text().replace(f"def {rule}", "")
    ]
    assert callers == ["edits.py", "geneval.py"]


GOOD = {"tag": "single_object", "prompt": "a dog", "include": [{"class": "dog", "count": 1}]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "doesn't exist"),
        ("", "holds no row"),
        ("a photo of a dog\n", ":1 isn't JSON"),
        ("[1]\n", ":1 must hold a mapping"),
        (json.dumps(GOOD) + "\n" + json.dumps({**GOOD, "prompt": 3}), ":2 needs 'prompt' as str, got 3"),
        (json.dumps({**GOOD, "include": []}), "'include' must hold at least one object"),
        (json.dumps({**GOOD, "include": ["dog"]}), r"include\[0\] needs a 'class'"),
        (json.dumps({**GOOD, "include": [{"class": "dog", "count": 0}]}), r"positive whole 'count', got 0"),
        (
            json.dumps({**GOOD, "include": [{"class": "d", "count": 1, "position": ["near", 0]}]}),
            r"position must be \[one of left of",
        ),
        (
            json.dumps({**GOOD, "include": [{"class": "d", "count": 1, "position": ["above", 0]}]}),
            "must point at an earlier entry",
        ),
    ],
)
def test_prompt_files_of_the_wrong_form_are_named_by_line_and_field(
    tmp_path: Path, content: str | None, words: str
) -> None:
    file = tmp_path / "prompts.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=words) as error:
        read_geneval(file)
    assert str(file) in str(error.value)
