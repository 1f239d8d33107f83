"""TIIF-Bench: its files, its tree, its averages."""

import json
from pathlib import Path
from statistics import mean

import pytest
from PIL import Image

from tbac.evaluation.benchmarks.rows import Drawn, Row
from tbac.evaluation.benchmarks.tiif import GROUPS, TIIF, TYPES, average_tiif, list_tiif_targets, read_pairs
from tbac.evaluation.judges.base import JudgeFacts


def test_there_are_twelve_basic_and_twenty_six_advanced_types() -> None:
    assert sum(map(len, GROUPS["basic"].values())) == 12
    assert sum(map(len, GROUPS["advanced"].values())) == 26
    assert len(TYPES) == 39


def test_levels_are_means_of_types_and_overall_of_the_nine_columns() -> None:
    by_type = {kind: float(i) for i, kind in enumerate(sorted(TYPES))}
    found = average_tiif(by_type)
    columns = {name: mean(by_type[k] for k in kinds) for groups in GROUPS.values() for name, kinds in groups.items()}
    assert len(columns) == 9
    assert found["overall"] == pytest.approx(mean(columns.values()))
    sub = ("attribute+relation", "attribute+reasoning", "relation+reasoning")
    weighted = 8 * sum(columns[name] for name in sub) + columns["text"] + columns["style"]
    assert found["advanced"] == pytest.approx(weighted / 26)
    assert found["basic"] == pytest.approx(4 * sum(columns[n] for n in ("attribute", "relation", "reasoning")) / 12)
    assert found["real_world"] == columns["complex"]


def test_what_isnt_there_is_in_no_mean() -> None:
    found = average_tiif({"numeracy": 50.0, "comparison": 100.0, "style": 25.0})
    assert found == {"overall": 50.0, "basic": 75.0, "advanced": 25.0, "reasoning": 75.0, "style": 25.0}
    with pytest.raises(ValueError, match="got none"):
        average_tiif({})
    with pytest.raises(ValueError, match="got colour"):
        average_tiif({"colour": 1.0})


def write(folder: Path, name: str, rows: list[dict]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def prompt(kind: str, number: int) -> dict:
    return {"type": kind, "short_description": f"short {number}", "long_description": f"long {number}"}


def test_pictures_are_named_by_type_model_length_and_row(tmp_path: Path) -> None:
    write(tmp_path / "p", "style_prompts.jsonl", [prompt("style", 0), prompt("style", 1)])
    write(tmp_path / "p", "text_prompts.jsonl", [prompt("text", 2)])
    pairs = read_pairs(tmp_path / "p")
    targets = {target.path: target.prompt for target in list_tiif_targets(pairs, "ours")}
    assert targets == {
        "style/ours/short_description/0.png": "short 0",
        "style/ours/long_description/0.png": "long 0",
        "style/ours/short_description/1.png": "short 1",
        "style/ours/long_description/1.png": "long 1",
        "text/ours/short_description/0.png": "short 2",
        "text/ours/long_description/0.png": "long 2",
    }


@pytest.mark.parametrize(
    ("prompts", "questions", "words"),
    [
        ([], None, r"has no \*\.jsonl file"),
        ([{"type": "style", "short_description": "x"}], None, "needs 'long_description' as str"),
        ([prompt("colour", 0)], None, "unknown type 'colour'"),
        ([prompt("style", 0)], [], r"has no \*\.jsonl file"),
        ([prompt("style", 0)], [{"type": "text"}], "needs 'yn_question_list' as list"),
        (
            [prompt("style", 0)],
            [{"type": "text", "yn_question_list": [], "yn_answer_list": []}],
            "has questions for 0 prompts of type 'style'",
        ),
        (
            [prompt("style", 0)],
            [{"type": "style", "yn_question_list": ["a?"], "yn_answer_list": ["maybe"]}],
            "yn_answer_list must hold yes or no for each question",
        ),
    ],
)
def test_bad_files_are_named(tmp_path: Path, prompts: list, questions: list | None, words: str) -> None:
    for folder, rows in (("p", prompts), ("q", questions)):
        (tmp_path / folder).mkdir()
        if rows:
            write(tmp_path / folder, "x.jsonl", rows)
    with pytest.raises(ValueError, match=words):
        read_pairs(tmp_path / "p", None if questions is None else tmp_path / "q")


def test_a_model_may_be_called_as_on_a_hub_and_the_prompts_stay_the_same(tmp_path: Path) -> None:
    write(tmp_path / "p", "text_prompts.jsonl", [prompt("text", 0)])
    plain, hub = (TIIF(name="tiif", file=str(tmp_path / "p"), model_name=name) for name in ("tbac", "org/model"))
    assert hub.targets[0].path == "text/org/model/short_description/0.png"
    digests = {b.describe_protocol([], JudgeFacts(), Drawn()).prompts for b in (plain, hub)}
    assert len(digests) == 1


class Fixed:
    """Says yes to everything, and reads the same lines in every picture."""

    identity, slow = "fixed", False

    def ask(self, question: str, images: object) -> str:
        return "yes"

    def read_text_lines(self, image: object) -> list[str]:
        return ["tea", "caek"]


def test_words_are_read_in_pictures_of_the_type_text_alone(tmp_path: Path) -> None:
    described = {"short_description": 'a sign: "tea", "cake"', "long_description": 'a long sign: "tea", "cake"'}
    for kind in ("text", "style"):
        row = {"type": kind, **described}
        write(tmp_path / "p", f"{kind}.jsonl", [row])
        write(tmp_path / "q", f"{kind}.jsonl", [{**row, "yn_question_list": ["a?"], "yn_answer_list": ["yes"]}])
    benchmark = TIIF(name="tiif", file=str(tmp_path / "p"), questions=str(tmp_path / "q"), read_words=True)
    benchmark.ocr = Fixed()  # type: ignore[assignment]
    rows = list(benchmark.judge_pictures(lambda target: Image.new("RGB", (8, 8)), Fixed()))
    scores = benchmark.summarize(rows, "j").scores
    assert (scores["overall"], scores["text, short"], scores["style, long"]) == (100, 100, 100)
    assert scores["word recall, short"] == scores["word recall, long"] == 0.5
    assert scores["word distance, short"] == pytest.approx(0.25)  # two of the four letters of one of two words
    missing = [Row(row.picture, row.group, row.prompt, "missing") for row in rows]
    assert benchmark.summarize(missing, "j").scores["word recall, short"] == 0
