"""Benchmark files, results and records from elsewhere: each is accepted as it stands or refused by one message."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from experiments.scores.results import read_results
from tbac.evaluation.benchmarks.answers import Answers
from tbac.evaluation.benchmarks.corebench import CoReBench
from tbac.evaluation.benchmarks.dpg import DPG
from tbac.evaluation.benchmarks.edits import Edits
from tbac.evaluation.benchmarks.folder import Folder
from tbac.evaluation.benchmarks.geneval import GenEval
from tbac.evaluation.benchmarks.geneval2 import GenEval2
from tbac.evaluation.benchmarks.imgedit import ImgEdit
from tbac.evaluation.benchmarks.longtext import LongText
from tbac.evaluation.benchmarks.rows import PictureVerdict, ScoreError
from tbac.evaluation.benchmarks.tiif import TIIF
from tbac.evaluation.benchmarks.unigenbench import UniGenBench
from tbac.evaluation.benchmarks.wise import WISE
from tbac.evaluation.judges.cache import Cache, CachedJudge
from tbac.evaluation.picture_tree import Target, Tree, TreeError
from tests.helpers.pictures import make_noise_image

DEEP = "[" * 100_000
SURROGATE = "\\ud800"  # half of a pair, as JSON may hold it
LONG = "x" * 300
SEPARATED = "a\u2028red\x85circle"  # signs that Python's splitlines takes for the end of a line
GENEVAL = {"tag": "colors", "prompt": "a red dog", "include": [{"class": "dog", "count": 1, "color": "red"}]}
EDIT = {"id": "a.png", "prompt": "make it red", "edit_type": "adjust"}
WISE_ROW = {"prompt_id": 401, "Prompt": "p", "Explanation": "e", "Category": "time"}
SCAN = {"background": "white", "objects": [{"name": "dog", "color": "red", "box": [0, 0, 4, 4]}]}
EDITS_ROW = {"image": "a.png", "instruction": "i", "kind": "k", "source": SCAN, "target": SCAN}
ANSWER = {"image": "a.png", "question": "q", "answer": "a"}
TIIF_ROW = {"type": "text", "short_description": "s", "long_description": "l"}
ASKED = {"type": "text", "yn_question_list": ["q?"], "yn_answer_list": ["yes"]}
CSV = "item_id,proposition_id,dependency,tuple,question_natural_language\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a picture, beside files that nothing may read."""
    inside = tmp_path / "inside"
    inside.mkdir()
    for place in (inside, tmp_path):
        make_noise_image(0).save(place / "a.png")
    (inside / "text.png").write_text("a secret")
    (inside / "eps.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    (inside / "link.png").symlink_to(tmp_path / "a.png")
    (inside / "zero.png").symlink_to("/dev/zero")
    (inside / "round.png").symlink_to("round.png")
    (inside / "good.png").symlink_to("a.png")
    return inside


def geneval(folder: Path, text: str) -> GenEval:
    (folder / "x.jsonl").write_text(text)
    return GenEval(name="geneval", file=str(folder / "x.jsonl"))


def imgedit(folder: Path, text: str) -> ImgEdit:
    (folder / "x.json").write_text(text)
    return ImgEdit(name="imgedit", file=str(folder / "x.json"), images=str(folder))


def wise(folder: Path, text: str) -> WISE:
    (folder / "x.json").write_text(text)
    return WISE(name="wise", file=str(folder / "x.json"))


def edits(folder: Path, text: str) -> Edits:
    (folder / "x.jsonl").write_text(text)
    return Edits(name="edits", file=str(folder / "x.jsonl"))


def answers(folder: Path, text: str) -> Answers:
    (folder / "x.jsonl").write_text(text)
    return Answers(name="answers", file=str(folder / "x.jsonl"))


def tiif(folder: Path, text: str) -> TIIF:
    for name, content in (("prompts", json.dumps(TIIF_ROW)), ("questions", text)):
        (folder / name).mkdir()
        (folder / name / "text.jsonl").write_text(content)
    return TIIF(name="tiif", file=str(folder / "prompts"), questions=str(folder / "questions"))


def dpg(folder: Path, text: str) -> DPG:
    (folder / "prompts").mkdir()
    (folder / "prompts" / "one.txt").write_text("a red dog")
    (folder / "x.csv").write_text(text)
    return DPG(name="dpg", file=str(folder / "prompts"), questions=str(folder / "x.csv"))


def prompts(folder: Path, text: str) -> Folder:
    (folder / "x.txt").write_text(text)
    return Folder(name="folder", file=str(folder / "x.txt"))


def write_and_make(kind: type, folder: Path, text: str) -> Any:
    (folder / "x").write_text(text)
    return kind(name="x", file=str(folder / "x"))


def geneval2(folder: Path, text: str) -> Any:
    return write_and_make(GenEval2, folder, text)


def longtext(folder: Path, text: str) -> Any:
    return write_and_make(LongText, folder, text)


def corebench(folder: Path, text: str) -> Any:
    return write_and_make(CoReBench, folder, text)


def unigenbench(folder: Path, text: str) -> Any:
    return write_and_make(UniGenBench, folder, text)


ATOMS = {"prompt": "p", "atom_count": 3, "vqa_list": [["q?", "Yes"]], "skills": ["object"]}
LONG_TEXT = {"prompt_id": 1, "prompt": "p", "text": ["a word"]}
CHECKED = {"Prompt": "p", "Checklist": [{"question": "q?"}]}
UNI = "index,prompt_en,sub_dims_en\n"
POINTS = json.dumps({"Testpoints": ["Style"], "Testpoint Description": ["ink"]}).replace('"', '""')
Make = Callable[[Path, str], Any]
REFUSED: list[tuple[Make, str]] = [
    *((make, text) for make in (geneval, edits, answers) for text in ("", DEEP, "[1]", "null", '"x"', "{}", "\0")),
    *((make, text) for make in (imgedit, wise) for text in ("", DEEP, "1", "null", "[[]]", "{}", "[]")),
    *((geneval, json.dumps({**GENEVAL, "prompt": value})) for value in (1, True, None, [], "", " ")),
    (geneval, json.dumps(GENEVAL).replace("red dog", SURROGATE)),
    (geneval, json.dumps({**GENEVAL, "tag": ["colors"]})),
    *(
        (geneval, json.dumps({**GENEVAL, part: [{"class": "dog", "count": 1, **change}]}))
        for part in ("include", "exclude")
        for change in (
            {"count": True}, {"count": 1.0}, {"count": "1"}, {"count": 0}, {"count": None}, {"class": ["dog"]},
            {"class": None}, {"color": ["red"]}, {"color": 1}, {"color": None}, {"position": "above"},
            {"position": ["above", True]}, {"position": ["above", 0]}, {"position": [["above"], 0]},
        )
    ),
    (geneval, json.dumps(GENEVAL).replace('"count": 1', f'"count": {"9" * 5000}')),
    (geneval, json.dumps(GENEVAL).replace('"count": 1', '"count": NaN')),
    *(
        (imgedit, json.dumps({key: EDIT}))
        for key in ("", LONG, "a\0b", "../x", "/tmp/x", "a\nb", ".", "..", "\u202ex", ".hidden", "猫" * 80)
    ),
    (imgedit, f'{{"{SURROGATE}": {json.dumps(EDIT)}}}'),
    *(
        (make, json.dumps(row if make is not imgedit else {"1": row}))
        for make, key, base in ((imgedit, "id", EDIT), (edits, "image", EDITS_ROW), (answers, "image", ANSWER))
        for row in (
            {**base, key: value}
            for value in (
                "", ".", "..", "../a.png", "/etc/passwd", "link.png", "zero.png", "round.png", "text.png", "eps.png",
                "absent.png", "a\0.png", LONG, "x/../../a.png", 1, None, ["a.png"], "~/a.png",
            )
        )
    ),
    *((wise, json.dumps([{**WISE_ROW, "prompt_id": value}])) for value in (True, -1, 10**300, 10**10, 1.0, [], "1")),
    (wise, json.dumps([WISE_ROW, WISE_ROW])),
    (wise, json.dumps([WISE_ROW]).replace('"prompt_id": 401', f'"prompt_id": {"1" * 5000}')),
    *((wise, json.dumps([{**WISE_ROW, "Category": value}])) for value in (1, "alchemy", LONG)),
    *(
        (edits, json.dumps({**EDITS_ROW, name: {**SCAN, **change}}))
        for name in ("source", "target")
        for change in (
            {"objects": 1}, {"objects": [1]}, {"objects": [{}]}, {"background": 1},
            {"objects": [{"name": "dog", "color": "red", "box": [1, 2]}]},
            {"objects": [{"name": "dog", "color": "red", "box": [1, 2, 3, "x"]}]},
            {"objects": [{"name": ["dog"], "color": "red", "box": [1, 2, 3, 4]}]},
        )
    ),
    (edits, json.dumps({**EDITS_ROW, "anywhere": "yes"})),
    *(
        (tiif, json.dumps({**ASKED, **change}))
        for change in (
            {"yn_question_list": []}, {"yn_question_list": [], "yn_answer_list": []}, {"yn_question_list": [1]},
            {"yn_question_list": [[]]}, {"yn_answer_list": ["maybe"]}, {"yn_answer_list": [True]}, {"type": "x"},
            {"type": []}, {"yn_question_list": [" "]},
        )
    ),
    *(
        (dpg, CSV + row)
        for row in (
            "", "one", "one,1", "one,1,0", "one,x,0,a,q\n", "one,1,x,a,q\n", "one,1e3,0,a,q\n", "two,1,0,a,q\n",
            '"one,1,0,a,q\n', f"one,{'9' * 5000},0,a,q\n",
        )
    ),
    (dpg, ""),
    (dpg, "\0\0"),
    *((prompts, text) for text in ("", "\n\n", " \n")),
    *((make, text) for make in (geneval2, longtext) for text in ("", DEEP, "[1]", "null", "{}", "\0")),
    *((make, text) for make in (corebench, unigenbench) for text in ("", DEEP, "[1]", "null", "{}", "\0")),
    *((geneval2, json.dumps({**ATOMS, "vqa_list": value})) for value in ([], [1], [["q"]], [["q", 1]], [["", "a"]])),
    *((geneval2, json.dumps({**ATOMS, "skills": value})) for value in ([], ["luck"], [1], ["object"] * 2, None)),
    *((geneval2, json.dumps({**ATOMS, "atom_count": value})) for value in (True, "3", None, 1.5)),
    *((longtext, json.dumps({**LONG_TEXT, "prompt_id": value})) for value in (True, -1, 10**9, "1", 1.0)),
    *((longtext, json.dumps({**LONG_TEXT, "text": value})) for value in ([], [1], "a", ["..."], [None])),
    (longtext, json.dumps(LONG_TEXT) + "\n" + json.dumps(LONG_TEXT)),
    *((corebench, json.dumps({key: CHECKED})) for key in ("", "../x", "C-MI", "C-MI-", "c-mi-001", "C-MI-0/1", LONG)),
    *((corebench, json.dumps({"C-MI-001": {**CHECKED, "Checklist": value}})) for value in ([], [1], [{}], "q")),
    (corebench, json.dumps({"C-MI-001": {**CHECKED, "Prompt": " "}})),
    *((unigenbench, UNI + row) for row in ("0", "0,p", "x,p,{}", "-1,p,{}", "0,p,[]", f"{'9' * 30},p,{{}}", "0,p,{")),
    (unigenbench, f'{UNI}0,p,"{POINTS}"\n0,p,"{POINTS}"\n'),
]  # fmt: skip


@pytest.mark.parametrize(("make", "text"), REFUSED, ids=lambda value: getattr(value, "__name__", str(value)[:60]))
def test_what_can_t_be_used_is_refused_when_the_benchmark_is_made(make: Make, text: str, folder: Path) -> None:
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(ValueError, match=r"\S") as error:
        make(folder, text)
    message = str(error.value)
    assert 10 < len(message) < 1000
    assert set(before) <= set(folder.parent.rglob("*"))


ACCEPTED: list[tuple[Make, str]] = [
    (geneval, json.dumps(GENEVAL) + "\r\n\r\n" + json.dumps(GENEVAL)),
    (geneval, "\ufeff" + json.dumps(GENEVAL)),
    (geneval, json.dumps({**GENEVAL, "prompt": SEPARATED}, ensure_ascii=False)),
    (imgedit, json.dumps({"猫": EDIT, "a/b": EDIT, "a b(1)": {**EDIT, "id": "good.png"}}, ensure_ascii=False)),
    (wise, "\ufeff" + json.dumps([WISE_ROW])),
    (edits, json.dumps(EDITS_ROW)),
    (answers, json.dumps({**ANSWER, "question": SEPARATED}, ensure_ascii=False)),
    (tiif, json.dumps(ASKED)),
    (dpg, "\ufeff" + CSV.replace("\n", "\r\n") + f"one,1,0,{'a' * 200_000},q"),
    (prompts, f"\ufeff{SEPARATED}\r\na blue circle"),
    (geneval2, "\ufeff" + json.dumps(ATOMS) + "\r\n"),
    (longtext, json.dumps({**LONG_TEXT, "prompt": SEPARATED}, ensure_ascii=False)),
    (corebench, json.dumps({"R-LR-001": CHECKED, "C-MI-001": CHECKED})),
    (unigenbench, f'\ufeff{UNI}7,p,"{POINTS}"\r\n'),
]


@pytest.mark.parametrize(("make", "text"), ACCEPTED, ids=lambda value: getattr(value, "__name__", str(value)[:40]))
def test_files_as_people_have_them_are_read(make: Make, text: str, folder: Path) -> None:
    benchmark = make(folder, text)
    if make is prompts:
        assert list(benchmark.prompts.values()) == [SEPARATED, "a blue circle"]
    if make is geneval and SEPARATED in text:
        assert benchmark.prompts[0]["prompt"] == SEPARATED


def write_results(folder: Path, change: Callable[[list[dict]], Any] = lambda rows: None) -> tuple[Path, GenEval]:
    benchmark = geneval(folder, "\n".join([json.dumps(GENEVAL)] * 3))
    rows: list[dict] = [
        {
            "picture": target.path, "group": "colors", "prompt": target.prompt, "state": "scored", "score": 1.0,
            "reason": "", "details": {},
        }
        for target in benchmark.list_targets()
    ]  # fmt: skip
    change(rows)
    file = folder / "geneval.results.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in [{"judge": "j"}, *rows]) + "\n")
    return file, benchmark


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("score", value) for value in (float("nan"), float("inf"), -0.1, 1.1, "1", True, [1], {}, 10**400)),
        *(("state", value) for value in ("", "done", None, 1, ["scored"], "failed")),
        *(("picture", value) for value in ("../x.png", "/etc/passwd", "", None, 1, "00001/samples/00000.png")),
        *(("prompt", value) for value in ("another", None, [])),
        *(("details", value) for value in (None, [], "x")),
        *(("reason", value) for value in (None, 1)),
        ("more", 1),
    ],
)
def test_results_that_were_damaged_are_refused(name: str, value: Any, folder: Path) -> None:
    file, benchmark = write_results(folder, lambda rows: rows[0].update({name: value}))
    with pytest.raises(ValueError, match=r"results\.jsonl:[23]"):
        read_results(file, benchmark)


@pytest.mark.parametrize("content", ["", "\n", "{}", '{"judge": 1}', "[]", "null", "x", DEEP, '{"judge": "j"}', "\0"])
def test_a_torn_file_of_results_says_how_to_make_it_anew(content: str, folder: Path) -> None:
    file, benchmark = write_results(folder)
    assert len(read_results(file, benchmark).rows) == 3
    file.write_text(content)
    with pytest.raises(ValueError, match=r"results\.jsonl"):
        read_results(file, benchmark)


@pytest.mark.parametrize("score", [float("nan"), float("inf"), -1, 2, "1", True, [0.5]])
def test_a_judge_s_score_that_is_none_fails_its_picture_and_no_other(score: Any, folder: Path) -> None:
    class Strange(GenEval):
        def judge_picture(self, target: Target, picture: Image.Image, judge: Any) -> PictureVerdict:
            return PictureVerdict(score if target.item == "00001" else 1.0)

    (folder / "x.jsonl").write_text("\n".join([json.dumps(GENEVAL)] * 3))
    benchmark = Strange(name="geneval", file=str(folder / "x.jsonl"))
    rows = list(benchmark.judge_pictures(lambda target: make_noise_image(0), None))
    assert [row.state for row in rows] == ["scored", "failed", "scored"]
    assert "score" in rows[1].reason
    assert benchmark.summarize(rows, "j").scores["overall"] == pytest.approx(2 / 3)
    with pytest.raises(ScoreError):
        PictureVerdict(score)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"null", b"1", b'"x"', b"{}" * 2, DEEP.encode()])
def test_a_torn_record_of_a_picture_makes_it_anew(content: bytes, tmp_path: Path) -> None:
    tree, target = Tree(tmp_path / "tree", {"seed": 1}), Target("a.png", "a", "a dog")
    tree.write(target, [make_noise_image(0)])
    assert tree.is_made(target)
    (tmp_path / "tree.records" / "a.png.json").write_bytes(content)
    assert not tree.is_made(target)
    tree.write(target, [make_noise_image(0)])
    assert tree.is_made(target)
    with pytest.raises(TreeError, match="was made otherwise"):
        Tree(tmp_path / "tree", {"seed": 2}).is_made(target)


def test_the_longest_name_has_room_for_its_records(tmp_path: Path) -> None:
    tree, target = Tree(tmp_path / "tree", {}), Target("猫" * 65 + ".png", "a", "a dog")
    tree.write(target, [make_noise_image(0)])
    assert tree.is_made(target)


class Counting:
    """A judge that counts how often it was asked."""

    slow, identity, asked = True, "counting", 0

    def ask(self, question: str, images: Any) -> str:
        self.asked += 1
        return f"reply {self.asked}"


@pytest.mark.parametrize("value", ["1", "null", "[1]", '{"a": 1}', "true"])
@pytest.mark.parametrize("torn", [b"", b"\xff\xfe\n", b'{"key": "x", "val', b"[]\n", DEEP.encode() + b"\n"])
def test_replies_that_were_damaged_are_asked_for_again_and_others_are_kept(
    value: str, torn: bytes, tmp_path: Path
) -> None:
    file, judge, images = tmp_path / "judged.jsonl", Counting(), [make_noise_image(0)]
    kept = CachedJudge(judge, Cache(file))
    assert [kept.ask(question, images) for question in "abb"] == ["reply 1", "reply 2", "reply 2"]
    file.write_bytes(torn + b"\n" + file.read_bytes().replace(b'"reply 1"', value.encode()) + torn)
    again = CachedJudge(judge, Cache(file))
    assert [again.ask(question, images) for question in "abab"] == ["reply 3", "reply 2", "reply 3", "reply 2"]
    assert CachedJudge(judge, Cache(file)).ask("a", images) == "reply 3"


def test_a_judge_s_replies_that_find_no_room_are_still_given(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = CachedJudge(Counting(), Cache(tmp_path / "no" / "such" / "folder.jsonl"))
    assert [kept.ask("a", []), kept.ask("a", [])] == ["reply 1", "reply 1"]
    assert "isn't kept" in caplog.text


def test_a_picture_in_a_download_of_the_hub_may_be_a_link_to_its_blob(tmp_path: Path) -> None:
    blobs, images = tmp_path / "blobs", tmp_path / "snapshots" / "abc" / "images"
    blobs.mkdir()
    images.mkdir(parents=True)
    make_noise_image(0).save(blobs / "0123", format="PNG")
    (images / "a.png").symlink_to("../../../blobs/0123")
    assert imgedit(images, json.dumps({"1": EDIT})).edits["1"].image == images / "a.png"
    shutil.copy(blobs / "0123", tmp_path / "private.png")
    (images / "a.png").unlink()
    (images / "a.png").symlink_to("../../../private.png")
    with pytest.raises(ValueError, match="must stay inside"):
        imgedit(images, json.dumps({"1": EDIT}))
