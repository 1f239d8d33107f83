"""GenEval 2, UniGenBench, T2I-CoReBench, LongText-Bench, GEdit-Bench: replies, scores by hand, wrong files."""

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tbac.evaluation.benchmarks.base import PictureBenchmark, make_picture_finder
from tbac.evaluation.benchmarks.corebench import CoReBench, read_answer
from tbac.evaluation.benchmarks.gedit import GEdit, read_scores
from tbac.evaluation.benchmarks.geneval2 import GenEval2, list_answers
from tbac.evaluation.benchmarks.longtext import LongText
from tbac.evaluation.benchmarks.rows import Row
from tbac.evaluation.benchmarks.unigenbench import UniGenBench, read_marks
from tbac.evaluation.judges.base import JudgeError
from tests.helpers.gedit import write_gedit
from tests.helpers.published import locate_published

PICTURE = Image.new("RGB", (8, 8))
ATOMS = {"prompt": "p", "atom_count": 3, "vqa_list": [["q?", "Yes"]], "skills": ["object"]}


class Likely:
    """Gives one probability after the other."""

    identity, slow = "likely", False

    def __init__(self, *values: float) -> None:
        self.values, self.asked = list(values), []  # type: ignore[var-annotated]

    def ask(self, question: str, images: Any) -> str:
        raise AssertionError

    def compute_probability(self, question: str, images: Any, answers: Sequence[str]) -> float:
        self.asked.append((question, answers))
        return self.values.pop(0)


class Saying:
    """Says one reply after the other; the last one again and again."""

    identity, slow = "saying", False

    def __init__(self, *replies: str) -> None:
        self.replies, self.asked = list(replies), []  # type: ignore[var-annotated]

    def ask(self, question: str, images: Any) -> str:
        self.asked.append((question, len(images)))
        return self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]


def judge(benchmark: PictureBenchmark, judge: Any, number: int = 1) -> list[Row]:
    """Judge the first pictures, which are all there."""
    benchmark.targets = benchmark.targets[:number]
    return list(benchmark.judge_pictures(lambda target: PICTURE, judge))


def test_geneval_2_by_hand() -> None:
    benchmark = GenEval2(name="geneval2", file=str(locate_published("geneval2/geneval2_data.jsonl")))
    # "a green backpack and a pig": count, attribute, object, count, object; "seven green croissants": three.
    likely = Likely(0.5, 0.8, 1.0, 0.25, 0.9, 0.1, 0.6, 0.7)
    rows = judge(benchmark, likely, 2)
    assert likely.asked[0] == (
        "How many backpacks are in the image? Answer in one word.", ["one", "One", " one", " One", "1", " 1"]
    )  # fmt: skip
    assert likely.asked[1][1] == ["Yes", "yes", " yes", " Yes"]
    scores = benchmark.summarize(rows, "j").scores
    first, second = (0.5 * 0.8 * 1.0 * 0.25 * 0.9) ** (1 / 5), (0.1 * 0.6 * 0.7) ** (1 / 3)
    assert scores == pytest.approx(
        {
            "soft_tifa_gm": 100 * (first + second) / 2,
            "soft_tifa_am": 100 * ((0.5 + 0.8 + 1.0 + 0.25 + 0.9) / 5 + (0.1 + 0.6 + 0.7) / 3) / 2,
            "object": 100 * (1.0 + 0.9 + 0.7) / 3,
            "attribute": 100 * (0.8 + 0.6) / 2,
            "count": 100 * (0.5 + 0.25 + 0.1) / 3,
            "3 atoms": 100 * (first + second) / 2,
        }
    )
    assert judge(benchmark, Likely(0, 1, 1, 1, 1))[0].score == 0  # one atom that is surely wrong
    assert list_answers("How many cats are in the image?", "twelve")[4] == "other"
    with pytest.raises(ValueError, match="GenEval 2 needs a judge that tells probabilities"):
        benchmark.prepare_judge(Saying("yes"))


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("<analysis>['a', 'b']</analysis> <score>[1, 0]</score>", [1, 0]),
        ("<description><analysis>\n['a', \"b\"]\n</analysis><score>\n[1,1]\n</score></description>", [1, 1]),
        ("<analysis>['a']</analysis><score>[1, 0]</score>", None),
        ("<analysis>['a', 'b']</analysis><score>[1]</score>", None),
        ("<analysis>['a', b]</analysis><score>[1, 0]</score>", None),
        ("<analysis>__import__('os')</analysis><score>[1, 0]</score>", None),
        ("<score>[1, 0]</score>", None),
        ("[1, 0]", None),
    ],
)
def test_marks_of_testpoints(reply: str, expected: list[int] | None) -> None:
    assert read_marks(reply, 2) == expected


def test_unigenbench_counts_testpoints_by_dimension() -> None:
    benchmark = UniGenBench(name="unigenbench", file=str(locate_published("unigenbench/test_prompts_en.csv")))
    # Style, World Knowledge, Attribute - Quantity; the second reply can't be used and is asked for again.
    saying = Saying(
        "<analysis>['','','']</analysis><score>[1,0,1]</score>",
        "I see pandas",
        "<analysis>['','','']</analysis><score>[1,1,0]</score>",
    )
    rows = judge(benchmark, saying, 2)
    assert len(saying.asked) == 3
    assert rows[0].score == pytest.approx(2 / 3)
    assert "World Knowledge: Egyptian pyramids" in rows[0].reason
    scores = benchmark.summarize(rows, "j").scores
    assert scores == {
        "overall": pytest.approx(200 / 3), "Style": 100, "World Knowledge": 50, "Attribute": 50,
        "Attribute - Quantity": 50,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("reply", "expected"), [("Yes.", True), ("**no**", False), ("no, yes", True), ("none", None), ("", None)]
)
def test_answers_of_corebench(reply: str, expected: bool | None) -> None:
    assert read_answer(reply) == expected


def test_corebench_leaves_out_what_has_no_usable_reply() -> None:
    benchmark = CoReBench(name="corebench", file=str(locate_published("corebench/C-MA.json")), tries=2)
    count = len(benchmark.prompts["C-MA-001"]["Checklist"])
    rows = judge(benchmark, Saying("yes", "no", "perhaps", "perhaps", "yes"))
    assert rows[0].details["unanswered"] == 1
    assert rows[0].score == pytest.approx((count - 2) / (count - 1))
    assert benchmark.summarize(rows, "j").scores["C-MA"] == pytest.approx(100 * rows[0].score)
    (failed,) = judge(benchmark, Saying("perhaps"))
    assert failed.state == "failed"
    assert failed.details["replies"][0] == "perhaps"


def test_longtext_counts_words_whoever_reads_them() -> None:
    benchmark = LongText(name="longtext", file=str(locate_published("longtext/text_prompts.jsonl")))
    said = "FRESH brews every\nMorning, every day! Locally... central"
    (row,) = judge(benchmark, Saying(said))
    wanted = ["fresh", "brews", *["every", "morning", "every", "day"], "locally", "roasted", "since", "1998"]
    wanted += ["central", "park", "2", "blocks"]
    assert (row.details["found"], row.details["wanted"]) == (8, len(wanted))
    assert benchmark.summarize([row], "j").scores == {"overall": 8 / 14, "short": 8 / 14}

    class Reader(Saying):
        def read_text_lines(self, image: Any) -> list[str]:
            return said.split("\n")

    assert judge(benchmark, Reader("never asked"))[0].details == row.details


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_gedit_reads_the_data_set_and_takes_the_worst_ratings(suffix: str, tmp_path: Path) -> None:
    write_gedit(tmp_path / "data", suffix)
    benchmark = GEdit(name="gedit", file=str(tmp_path / "data"), images=str(tmp_path / "sources"), language="all")
    names = [target.path for target in benchmark.targets]
    assert names[0] == "tbac/fullset/color_alter/en/k1.png"
    assert len(names) == 4
    root = tmp_path / "tree"
    benchmark.write_other_files(root)
    assert Image.open(root / "tbac/fullset/color_alter/cn/k1_SRCIMG.png").size == (12, 8)
    for name in names[:3]:
        PICTURE.save(root / name)
    saying = Saying('{"score": [8, 6], "reasoning": "x"}', "[7, 9]", '{"score": [0, 9]}', "[9, 9]", "4", "4")
    rows = list(benchmark.judge_pictures(make_picture_finder(root), saying))
    assert [images for _, images in saying.asked] == [2, 1] * 3
    assert "en k1" in saying.asked[0][0]
    assert [row.state for row in rows] == ["scored"] * 3 + ["missing"]
    scores = benchmark.summarize(rows, "j").scores
    assert scores["overall, en"] == pytest.approx((math.sqrt(42) + 4) / 2)
    assert scores["semantics, en"] == pytest.approx((6 + 4) / 2)
    assert scores["overall, cn"] == 0
    english = GEdit(name="gedit", file=str(tmp_path / "data"), images=str(tmp_path / "sources"))
    assert len(english.targets) == 2


@pytest.mark.parametrize("score", ["[11]", "NaN", "[]", '"8"', "[true]", "[[8, 6]]", "null"])
def test_what_is_no_rating_from_0_to_10_can_t_be_used(score: str) -> None:
    assert read_scores(f'{{"score": {score}}}') is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"key": "../x"}, "'key' must be able to name a file"),
        ({"instruction": None}, "needs 'instruction' as str"),
        ({"input_image": {"bytes": b"no picture", "path": None}}, "k1.png"),
        ({"Intersection_exist": "yes"}, "needs 'Intersection_exist' as bool"),
        ({"languages": ["fr"]}, "no instruction in the language 'en'"),
    ],
)
def test_a_data_set_of_the_wrong_form_is_named(changes: dict, words: str, tmp_path: Path) -> None:
    write_gedit(tmp_path / "data", "parquet", **changes)
    with pytest.raises(ValueError, match=words):
        GEdit(name="gedit", file=str(tmp_path / "data"), images=str(tmp_path / "sources"))


@pytest.mark.parametrize(
    ("make", "text", "words"),
    [
        (
            GenEval2,
            json.dumps({"prompt": "p", "atom_count": 3, "vqa_list": [["q?"]], "skills": ["object"]}),
            "vqa_list",
        ),
        (
            GenEval2,
            json.dumps({"prompt": "p", "atom_count": 3, "vqa_list": [["q", "a"]], "skills": ["luck"]}),
            "skills",
        ),
        (LongText, json.dumps({"prompt_id": -1, "prompt": "p", "text": ["a"]}), "prompt_id"),
        (LongText, json.dumps({"prompt_id": 1, "prompt": "p", "text": ["-"]}), "has no word"),
        (UniGenBench, "index,prompt_en\n1,p\n", "sub_dims_en"),
        (UniGenBench, 'index,prompt_en,sub_dims_en\n1,p,"{""Testpoints"": [""a""]}"\n', "lists of texts of one length"),
        (CoReBench, json.dumps({"x": {"Prompt": "p", "Checklist": []}}), "key must be like 'C-MI-001'"),
        (CoReBench, json.dumps({"C-MI-001": {"Prompt": "p", "Checklist": []}}), "needs questions"),
    ],
)
def test_files_of_the_wrong_form_are_named(make: Any, text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_text(text)
    with pytest.raises(ValueError, match=words):
        make(name="x", file=str(tmp_path / "x"))


def test_a_judge_without_probabilities_fails_its_pictures() -> None:
    benchmark = GenEval2(name="geneval2", file=str(locate_published("geneval2/geneval2_data.jsonl")))

    class Silent(Likely):
        def compute_probability(self, question: str, images: Any, answers: Sequence[str]) -> float:
            raise JudgeError("the reply holds no probabilities")

    (row,) = judge(benchmark, Silent())
    assert (row.state, row.reason) == ("failed", "the reply holds no probabilities")


def test_a_key_of_gedit_has_one_instruction_and_one_picture(tmp_path: Path) -> None:
    folder, sources = tmp_path / "data", tmp_path / "sources"
    options = {"name": "gedit", "file": str(folder), "images": str(sources)}
    edit = {"key": "k1", "task_type": "style_change"}
    # The same rows as Parquet and as Arrow are one data set.
    for suffix in ("parquet", "arrow"):
        write_gedit(folder, suffix, [edit])
    assert len(GEdit(**options).targets) == 1
    write_gedit(folder, "arrow", [{**edit, "instruction": "another"}])
    with pytest.raises(ValueError, match="the key 'k1' of style_change, en has two different rows"):
        GEdit(**options)
    content = io.BytesIO()
    Image.new("RGB", (8, 8)).save(content, format="PNG")
    picture = {"bytes": content.getvalue(), "path": None}
    write_gedit(folder, "arrow", [{"key": "k1", "task_type": "ps_human", "input_image": picture}])
    with pytest.raises(ValueError, match="the key 'k1' has two source pictures"):
        GEdit(**options)
