"""GenEval: its files, and one verdict wherever it is judged."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tbac.evaluation.benchmarks.base import make_picture_finder
from tbac.evaluation.benchmarks.geneval import GenEval, read_geneval
from tbac.evaluation.benchmarks.in_memory import score_in_memory
from tbac.evaluation.benchmarks.rows import Row
from tbac.evaluation.detectors.base import Detection, Scan
from tbac.evaluation.detectors.coco import GENEVAL_NAMES, OTHER_NAMES, name_classes
from tbac.evaluation.detectors.template import TemplateDetector
from tbac.evaluation.picture_tree import Tree
from tbac.evaluation.rules import GENEVAL_THRESHOLDS
from tests.helpers.configs import ROOT
from tests.helpers.drawing import Drawer
from tests.helpers.published import locate_published


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
    assert callers == ["edits.py", "geneval.py", "variety.py"]  # the last asks which pictures are right


GOOD = {"tag": "single_object", "prompt": "a dog", "include": [{"class": "dog", "count": 1}]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "doesn't exist"),
        ("", "holds no row"),
        ("a photo of a dog\n", ":1 isn't JSON"),
        ("[1]\n", ":1 must hold a mapping"),
        (json.dumps(GOOD) + "\n" + json.dumps({**GOOD, "prompt": 3}), ":2 needs 'prompt' as str, got 3"),
        (json.dumps({**GOOD, "include": "3"}), ":1 needs 'include' as list, got '3'"),
        (json.dumps({**GOOD, "include": [{"class": "dog", "count": "1"}]}), "needs a positive whole 'count', got '1'"),
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


class PerfectDetector:
    """Finds exactly what a prompt asks for, by the names of a converted checkpoint's classes."""

    def __init__(self, object_names: Sequence[str]) -> None:
        self.object_names = list(object_names)
        self.row: dict = {}

    def __call__(self, image: Image.Image, colored: Collection[str] = ()) -> Scan:
        found: list[Detection] = []
        places: list[tuple[float, float]] = []
        for index, wanted in enumerate(self.row["include"]):
            x, y = 400.0, 400.0 * (index + 1)
            if "position" in wanted:
                relation, other = wanted["position"]
                dx, dy = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}[relation]
                x, y = places[other][0] + 300 * dx, places[other][1] + 300 * dy
            places.append((x, y))
            for k in range(wanted["count"]):
                box = (x, y + 15 * k, x + 10, y + 15 * k + 10)
                found.append(Detection(wanted["class"], wanted.get("color", ""), box, 0.95))
        return Scan("", tuple(detection for detection in found if detection.name in self.object_names))


def read_published() -> GenEval:
    return GenEval(name="geneval", file=str(locate_published("geneval/evaluation_metadata.jsonl")))


def test_a_perfect_detector_of_a_converted_checkpoint_scores_one_on_all_published_prompts() -> None:
    benchmark = read_published()
    judge = PerfectDetector(name_classes(converted_labels(), "x"))
    benchmark.check_judge(judge)
    targets = benchmark.list_targets()
    assert len(targets) == 553
    for target in targets:
        judge.row = benchmark.prompts[int(target.item)]
        assert benchmark.judge_picture(target, Image.new("RGB", (8, 8)), judge).score == 1, judge.row["prompt"]


def converted_labels() -> list[str]:
    other = {wanted: given for given, wanted in OTHER_NAMES.items()}
    return [other.get(name, name) for name in GENEVAL_NAMES]


@pytest.mark.parametrize("lacking", ["couch", "toaster", "person"])
def test_a_detector_that_lacks_a_class_is_refused_by_name(lacking: str) -> None:
    judge = PerfectDetector([name for name in GENEVAL_NAMES if name != lacking])
    with pytest.raises(ValueError, match=f"the judge can't find {lacking}, which"):
        read_published().check_judge(judge)


def test_ties_at_a_threshold_and_among_scores_are_decided_as_in_geneval() -> None:
    # As float32, 0.3 isn't above 0.3, though it is as a Python number; and of equal scores the last one comes first.
    edge = Detection("dog", "", (0, 0, 1, 1), float(np.float32(0.3)))
    assert edge.score > 0.3
    assert GENEVAL_THRESHOLDS.apply([edge], "colors") == []
    first, second = (Detection("dog", color, (0, 0, 1, 1), 0.5) for color in ("red", "blue"))
    assert GENEVAL_THRESHOLDS.apply([first, second], "colors") == [second, first]


def test_overall_is_the_mean_of_tags_and_gives_the_published_number() -> None:
    """TBAC-UniImage-3B: 0.99, 0.94, 0.77, 0.92, 0.83, 0.75 -> 0.87."""
    tags = {"single_object": 99, "two_object": 94, "counting": 77, "colors": 92, "position": 83, "color_attr": 75}
    rows = [Row("", tag, "", score=float(i < right)) for tag, right in tags.items() for i in range(100)]
    benchmark = read_published()
    scores = benchmark.summarize(rows, "j").scores
    assert scores == {"overall": pytest.approx(0.8667, abs=1e-4), **{tag: right / 100 for tag, right in tags.items()}}
    with pytest.raises(ValueError, match="no picture"):
        benchmark.summarize([], "j")


@pytest.mark.parametrize(
    ("option", "values", "accepted"),
    [
        ("samples", (1.5, "4", None, 0, True), "a whole number of at least 1"),
        ("guidance_scale", ("abc", float("nan"), float("inf"), -1, None, True), "a number of at least 0"),
        ("image_guidance_scale", ("abc", float("nan"), -1), "a number of at least 0"),
        ("seed", ("x", 1.5, None, -1), "a whole number of at least 0"),
    ],
)
def test_options_are_checked_as_on_the_command_line(
    option: str, values: Sequence, accepted: str, tmp_path: Path
) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps(GOOD))
    for value in values:
        with pytest.raises(ValueError, match=f"benchmark.{option} must be {accepted}, got {value!r}"):
            GenEval(name="geneval", file=str(tmp_path / "x.jsonl"), **{option: value})


def test_a_picture_that_lies_there_and_can_t_be_used_says_why(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("\n".join([json.dumps(GOOD)] * 4))
    benchmark = GenEval(name="geneval", file=str(tmp_path / "x.jsonl"))
    paths = [tmp_path / target.path for target in benchmark.targets]
    for path in paths:
        path.parent.mkdir(parents=True)
    paths[0].write_bytes(b"no picture")
    Image.new("RGB", (9000, 9000)).save(paths[1])
    Image.new("RGB", (16, 16)).save(paths[2].with_suffix(".jpg"))
    rows = list(benchmark.judge_pictures(make_picture_finder(tmp_path), None))
    assert {row.state for row in rows} == {"missing"}
    words = ("is not a readable image", "9000", "is wanted, and 00000.jpg lies there", "the picture is missing")
    assert [word in row.reason for word, row in zip(words, rows, strict=True)] == [True] * 4
