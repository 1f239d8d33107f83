"""What we make of replies and ratings is what the official scorers make of them: expected values are from their runs.

Each test names the repository and the commit whose code was run. None of that code is here.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tbac.evaluation.benchmarks.corebench import read_answer
from tbac.evaluation.benchmarks.gedit import GEdit, read_scores
from tbac.evaluation.benchmarks.geneval2 import compute_geometric_mean
from tbac.evaluation.benchmarks.imgedit import ImgEdit, read_score
from tbac.evaluation.benchmarks.longtext import LongText
from tbac.evaluation.benchmarks.rows import Row
from tbac.evaluation.benchmarks.tiif import TIIF
from tbac.evaluation.benchmarks.unigenbench import read_marks
from tbac.evaluation.benchmarks.wise import LEGACY, VERIFIED
from tbac.evaluation.judges.base import EmptyReplyError, read_yes_or_no_lines
from tbac.evaluation.words import count_found, split_text
from tests.helpers.gedit import write_gedit
from tests.helpers.pictures import make_noise_image

PICTURE = Image.new("RGB", (8, 8))


class Saying:
    """Says one reply after the other, and an empty one never."""

    identity, slow = "saying", False

    def __init__(self, *replies: str) -> None:
        self.replies = list(replies)

    def ask(self, question: str, images: Any) -> str:
        reply = self.replies.pop(0)
        if not reply:
            raise EmptyReplyError("the reply is empty")
        return reply


@pytest.mark.parametrize(
    ("probabilities", "expected"),
    [
        ([1e-13] + [1.0] * 9, 0.05011872336272723),
        ([1e-30, 0.5, 0.25], 5e-11),
        ([3e-8, 0.9, 0.99, 1e-14, 0.7], 4.512522701456528e-05),
        ([0.0, 1.0], 0.0),
        ([0.5], 0.5),
    ],
)
def test_geneval_2_counts_probabilities_however_small(probabilities: list[float], expected: float) -> None:
    """facebookresearch/GenEval2, a6e82d22."""
    assert compute_geometric_mean(probabilities) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("analysis", "score", "expected"),
    [
        ("{'Style': 'ok', 'Color': 'no'}", "[1, 0]", [True, False]),
        ("'ok'", "[0, 1]", [False, True]),  # a text of as many letters as there are testpoints
        ("('a', 'b')", "(1, 0)", [True, False]),
        ("\n['a', 'it\\'s']\n", "\n[1, 0,]\n", [True, False]),
        ("['a', '没有「红」']", "1, 1", [True, True]),
        ("['a', 'b']", "[1.0, 0.5]", [True, False]),
        ("['a', 'b']", "['1', 2]", [False, False]),
        ("['a', 'b']", "[True, 1]", None),
        ("['a', 'b']", "[1, None]", None),
        ("[True, 'b']", "[1, 1]", None),
        ("['a', 'b']", "{'a': 1, 'b': 1}", None),
        ("['a', 'b']", "'11'", None),
        ("['a', 'b']", "[1， 0]", None),
        ("['a', 'b']", "[yes, no]", None),
        ("['a', 'b']", "[1 0]", None),
        ("['a','it's']", "[1, 0]", None),
        ("3", "[1, 1]", None),
    ],
)
def test_unigenbench_counts_these_marks(analysis: str, score: str, expected: list[bool] | None) -> None:
    """CodeGoat24/UniGenBench, 49d0bceb; None where its statistics leave the picture out."""
    marks = read_marks(f"<analysis>{analysis}</analysis><score>{score}</score>", 2)
    assert (marks and [mark == 1 for mark in marks]) == expected


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("**Yes**", True),
        ('"no"', False),
        ("YES!!!", True),
        ("no-one", False),
        ("Yes, there is no sun", True),
        ('{"answer": "yes"}', True),
        ("yes/no", True),
        ("yes，因为", True),
        ("yes因为", None),  # letters of any script belong to the word
        ("no；", False),
        ("Yes_", None),
        ("nope", None),
        ("ｙｅｓ", None),
        ("是", None),
    ],
)
def test_corebench_takes_these_answers(reply: str, expected: bool | None) -> None:
    """KlingTeam/T2I-CoReBench, ebf7b7a0, as it reads Gemini's replies; None isn't counted."""
    assert read_answer(reply) == expected


@pytest.mark.parametrize(
    ("mode", "texts", "read", "expected"),
    [
        ("en", ["Fresh Brews!", "Since 1998"], "FRESH brews — since 1998", (4, 4)),
        ("en", ["Don't stop", "e-mail"], "dont stop e mail", (2, 3)),
        ("en", ["Café l'Été"], "café L’ÉTÉ", (2, 2)),
        ("en", ["Café"], "cafe\u0301", (0, 1)),  # the accent is a sign of its own
        ("en", ["50% off", "$5.00"], "５０% off 500", (2, 3)),
        ("en", ["a a a b"], "A\u3000a\u200bb", (1, 4)),
        ("en", ["x y"], "No text recognized.", (0, 2)),
        ("en", ["no text here"], "No text recognized", (2, 3)),
        ("en", ["Straße ñ"], "Strae", (1, 1)),
        ("en", ["one\u2028two three\x85four"], "two one four", (3, 4)),
        ("zh", ["每日新鲜烘焙", "始于1998"], "每日新鲜烘焙\n始于 1998年", (12, 12)),
        ("zh", ["中央公园 - 2公里"], "中央公园-2 公里", (7, 7)),
        ("zh", ["AI 时代"], "ai时代", (2, 4)),  # Chinese texts keep the size of letters
        ("zh", ["龥龦㐀"], "龥龦㐀", (1, 1)),
        ("zh", ["好好好"], "好，好", (2, 3)),
    ],
)
def test_longtext_counts_these_words(
    mode: str, texts: list[str], read: str, expected: tuple[int, int], tmp_path: Path
) -> None:
    """X-Omni-Team/X-Omni, 2b8237bb, from the reader's reply to the counts."""
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt_id": 0, "prompt": "p", "text": texts}))
    benchmark = LongText(name="longtext", file=str(file), mode=mode, samples=1)  # type: ignore[arg-type]
    (row,) = benchmark.judge_pictures(lambda target: PICTURE, Saying(read))
    assert (row.details["found"], row.details["wanted"]) == expected
    by_letter = mode == "zh"
    wanted = split_text(" ".join(texts), by_letter)
    if "recognized" not in read:
        assert (count_found(wanted, split_text(read, by_letter)), len(wanted)) == expected


def test_longtext_counts_a_picture_in_which_the_reader_read_nothing(tmp_path: Path) -> None:
    """X-Omni-Team/X-Omni, 2b8237bb: replies "Fresh" and "" to two pictures of "Fresh brews" give 0.25."""
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt_id": 0, "prompt": "p", "text": ["Fresh brews"]}))
    benchmark = LongText(name="longtext", file=str(file), samples=2)
    rows = list(benchmark.judge_pictures(lambda target: PICTURE, Saying("Fresh", "")))
    assert benchmark.summarize(rows, "j").scores["overall"] == 0.25


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ('{\n"score" : [8, 6],\n"reasoning" : "fine"\n}', [8, 6]),
        ('```json\n{"score": [8.5, 10], "reasoning": "a [1] b"}\n```', [8.5, 10]),
        ('{"score": 7, "reasoning": "x"} Hope it helps.', [7]),
        ('{"score": 1\n0}', [10]),
        ("Ratings: [8,6].", [8, 6]),
        ("[12, 3]", [12, 3]),  # only the least rating counts
        (" 10 ", [10]),
        ("08", [8]),
        ('"score": [8, 6]}', [8, 6]),
        ("11", None),
        ("[4]", None),
        ("[6, 0, 3]", None),
        ("[8,  6]", None),
        ("[8.5, 6]", None),
        ("[8, 6] [1, 2]", None),
        ("score: 8", None),
        ("8/10", None),
        ('{"Score": [8, 6]}', None),
        ('{"score": [8, null]}', None),
        ('{"score": [-1, 5]}', None),
        ('{"score": [8， 6]}', None),
        ('{"score": [8, 6],}', None),
        ('{"score": [8, 6]}\n{"score": [8, 6]}', None),
        ('{"score" : [8, 6],\n"reasoning" : "so "good""}', None),
    ],
)
def test_gedit_reads_these_ratings(reply: str, expected: list[float] | None) -> None:
    """stepfun-ai/Step1X-Edit, 570eba6e; None where it asks again."""
    assert read_scores(reply) == expected


def test_gedit_averages_all_edits_and_the_intersection(tmp_path: Path) -> None:
    """stepfun-ai/Step1X-Edit, 570eba6e, calculate_statistics.py on the same ratings."""
    kinds = (
        "background_change", "color_alter", "material_alter", "motion_change", "ps_human", "style_change",
        "subject-add", "subject-remove", "subject-replace", "text_change", "tone_transfer",
    )  # fmt: skip
    edits, replies = [], []
    for i, kind in enumerate(kinds):
        for k in range(2 + i % 2):
            edits.append({"key": f"{i}-{k}", "task_type": kind, "Intersection_exist": k == 0 or (i + k) % 3 > 0})
            semantics, quality = (3 * i + 4 * k) % 11, (5 * i + 2 * k + 1) % 11
            replies += [f'{{"score": [10, {semantics}]}}', f"[{quality}, 10]"]
    write_gedit(tmp_path / "data", "parquet", edits, ("en",))
    benchmark = GEdit(name="gedit", file=str(tmp_path / "data"), images=str(tmp_path / "sources"))
    rows = list(benchmark.judge_pictures(lambda target: PICTURE, Saying(*replies)))
    scores = benchmark.summarize(rows, "j").scores
    expected = {
        "overall": 4.166944923343028,
        "semantics": 4.575757575757576,
        "quality": 5.454545454545454,
        "overall, intersection": 3.794124879462394,
        "semantics, intersection": 4.1818181818181825,
        "quality, intersection": 5.090909090909091,
        "background_change": 1.7320508075688772,
        "color_alter": 3.908651820222389,
        "tone_transfer": 5.241657386773941,
    }
    assert {name: scores[name] for name in expected} == pytest.approx(expected, rel=1e-12)
    assert len(scores) == 6 + len(kinds)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("- Consistency: 2\n- Realism: 1\n- Aesthetic Quality: 0", (2, 1, 0)),
        ("```\nConsistency: 2/2\nRealism: 1/2\nAesthetic Quality: 2/2\n```", (2, 1, 2)),
        ("Consistency: 1.5\nRealism: 0.5\nAesthetic Quality: 2.0", (1, 0, 2)),
        ("Consistency:\n2\nRealism:\n1\nAesthetic Quality:\n0", (2, 1, 0)),
        ("2\n\n1\n 0 \n2", (2, 1, 0)),
        ("Consistency: ２\nRealism: 1\nAesthetic Quality: 0", (2, 1, 0)),
        ("Consistency： 2\nRealism： 1\nAesthetic Quality： 0", None),
        ("Consistency (0-2): 2\nRealism (0-2): 1\nAesthetic Quality (0-2): 0", None),
        ('{"Consistency": 2, "Realism": 1, "Aesthetic Quality": 0,}', None),
        ("Aesthetic_Quality: 1\nConsistency: 2\nRealism: 1", None),
        ("Realism: 2\n2\n1\n0", None),
    ],
)
def test_wise_reads_three_ratings_of_these(reply: str, expected: tuple[int, int, int] | None) -> None:
    """PKU-YuanGroup/WISE, eb511744, WISE_legacy/gpt_eval.py; None where it asks again."""
    found = LEGACY.read_ratings(reply)
    assert (found and tuple(found[name] for name in LEGACY.ratings)) == expected


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Score: 1.0", 1),
        ("Score: 1/1", 1),
        ("`Score: 0`", 0),
        ("Final Score: 1\nScore: 0", 1),
        ("Score:\n1", 1),
        ("0\n", 0),
        ("1\n1", None),
        ("Score： 1", None),
        ("**Score:** 1", None),
        ('{"score": 1}', None),
        ("Score: 01", None),
        ("Score: １", None),
    ],
)
def test_wise_verified_reads_one_rating_of_these(reply: str, expected: int | None) -> None:
    """PKU-YuanGroup/WISE, eb511744, vllm_eval.py; None where it asks again."""
    found = VERIFIED.read_ratings(reply)
    assert (found and found["score"]) == expected


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Yes, because\nno.\r\n\n  yes  ", [True, False, True]),
        ("Answers:\nyes\tit is\nNo；\nYES:", [True, False, True]),
        ("yes-no\nno\nyes", [True, False, True]),
        ("1. yes\nno\nyes", None),
        ("**Yes**\nno\nyes", None),
        ("yes\nno\nyesterday", None),
        ("yes，因为\nno\nyes", [True, False, True]),
        ("yes\nno\u2028yes", None),  # only a newline ends a line
        ("yes\nno\nyes\nno", None),
    ],
)
def test_tiif_reads_a_line_for_each_question(reply: str, expected: list[bool] | None) -> None:
    """A113N-W3I/TIIF-Bench, 3aae7504, eval_with_vlm.py; None where it asks again."""
    assert read_yes_or_no_lines(reply, 3) == expected


def make_tiif(folder: Path, **options: Any) -> TIIF:
    """A pair of the type text, whose long prompt quotes its words in another way."""
    row = {
        "type": "text",
        "short_description": 'a sign: "Kingston", "64GB", "UHS-I", "U1"',
        "long_description": 'The sign says "KINGSTON", with "64GB" and "64GB," and below "UHS-I U1".',
        "yn_question_list": ["a?"],
        "yn_answer_list": ["Yes"],
    }
    folder.mkdir()
    (folder / "text.jsonl").write_text(json.dumps(row))
    return TIIF(name="tiif", file=str(folder), questions=str(folder), **options)


def test_tiif_averages_rounded_shares(tmp_path: Path) -> None:
    """A113N-W3I/TIIF-Bench, 3aae7504: summary_results.py and summary_dimension_results.py on the same answers."""
    right = {
        "shape+color": 1 / 3, "color+texture": 2 / 3, "texture+color": 1 / 7, "shape+texture": 5 / 7,
        "numeracy": 1 / 160, "style": 3 / 32, "text": 7 / 11,
    }  # fmt: skip
    scores = make_tiif(tmp_path / "x").combine({f"{kind}, short": 100 * share for kind, share in right.items()})
    expected = {
        "overall": 30.02, "basic": 37.27, "advanced": 36.51, "attribute": 46.43, "reasoning": 0.63, "text": 63.64,
        "style": 9.38,
    }  # fmt: skip
    assert {name: scores[f"{name}, short"] for name in expected} == pytest.approx(expected, rel=1e-12)


def test_tiif_looks_for_the_same_words_in_both_pictures_of_a_pair(tmp_path: Path) -> None:
    """A113N-W3I/TIIF-Bench, 3aae7504, cal_gned_and_recall_models.py: one list of words, two pictures."""
    benchmark = make_tiif(tmp_path / "x", read_words=True)

    class Reader(Saying):
        def read_text_lines(self, image: Image.Image) -> list[str]:
            return ["KINGSTON 64gb", "UHS-1 U1 Card"]

    benchmark.ocr = Reader()  # type: ignore[assignment]
    rows = list(benchmark.judge_pictures(lambda target: PICTURE, Saying("yes", "yes")))
    scores = benchmark.summarize(rows, "j").scores
    for length in ("short", "long"):
        assert scores[f"word recall, {length}"] == 1
        assert scores[f"word distance, {length}"] == pytest.approx(0.24)
    (tmp_path / "x" / "text.jsonl").write_text((tmp_path / "x" / "text.jsonl").read_text().replace('\\"', ""))
    with pytest.raises(ValueError, match=r"type 'text', row 0: benchmark\.read_words needs words in double quotes"):
        TIIF(name="tiif", file=str(tmp_path / "x"), questions=str(tmp_path / "x"), read_words=True)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("```\nPrompt Compliance: 4\nVisual Naturalness: 3\n```", 3.5),
        ("**Prompt Compliance**: 4\n- Integrity: 05", 4.5),
        ("Compliance: 4/5\nNaturalness: 3.5\nIntegrity: 4 (good)", None),
        ("Compliance： 4\nNaturalness:4\nIntegrity :  4", None),
        ("Compliance: 4; Naturalness: 3", None),
        ("a: ３\nb: 4", 3.5),
        ("a: 5\x0bb: 3", 4.0),
        ("a: 0\nb: 0\nc: 1", 0.33),
    ],
)
def test_imgedit_reads_these_ratings(reply: str, expected: float | None) -> None:
    """PKU-YuanGroup/ImgEdit, 547185d1, step1_get_avgscore.py."""
    assert read_score(reply) == expected


def test_imgedit_asks_again_where_ratings_are_above_the_best(tmp_path: Path) -> None:
    """Here we differ: PKU-YuanGroup/ImgEdit, 547185d1, counts the first reply as 9."""
    make_noise_image(0).save(tmp_path / "cat.png")
    (tmp_path / "edits.json").write_text(json.dumps({"1": {"id": "cat.png", "prompt": "p", "edit_type": "add"}}))
    (tmp_path / "prompts.json").write_text(json.dumps({"add": "rate <edit_prompt>"}))
    files = {"file": str(tmp_path / "edits.json"), "questions": str(tmp_path / "prompts.json")}
    benchmark = ImgEdit(name="imgedit", images=str(tmp_path), **files)
    (row,) = benchmark.judge_pictures(lambda target: PICTURE, Saying("a: 8\nb: 10", "a: 4\nb: 5"))
    assert benchmark.summarize([row], "j").scores["overall"] == 4.5
    (row,) = benchmark.judge_pictures(lambda target: PICTURE, Saying(*["a: 9"] * 3))
    assert row == Row("1.png", "add", "p", "failed", None, row.reason, {"replies": ["a: 9"] * 3})
