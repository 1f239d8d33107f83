"""Text files as people have them: the same lines and rows, whatever wrote the file."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep.datasets.image_folder import ImageFolder
from data_prep.datasets.rows import read_rows
from data_prep.shards.conversion import ConversionOptions, convert
from tbac.data.decoding import decode_text
from tbac.evaluation.benchmarks.dpg import read_dpg_questions
from tbac.evaluation.benchmarks.files import read_rows as read_benchmark_rows
from tbac.evaluation.benchmarks.folder import read_prompt_folder
from tbac.evaluation.benchmarks.imgedit import read_judge_prompts
from tbac.files import ForeignFileError, read_csv, read_json, read_lines, read_prompts
from tests.helpers.pictures import make_noise_image

# What one finds in captions: characters that break lines on a screen, and others that look like nothing.
TEXTS = [
    "a cat", "caf\xe9 \u732b \U0001f63a", "one\u2028two", "one\x85two", "one\u2029two", "one\x0btwo\x0cthree",
    "\xa0a\u3000b\u200b", "x" * 200_000,
]  # fmt: skip
WRITERS: dict[str, Callable[[str], bytes]] = {
    "plain": lambda text: text.encode(),
    "with a mark": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "of Windows": lambda text: text.replace("\n", "\r\n").encode(),
    "of Windows, with a mark": lambda text: b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode(),
    "of old Macs": lambda text: text.replace("\n", "\r").encode(),
    "without a last line break": lambda text: text.rstrip("\n").encode(),
    "with empty lines": lambda text: ("\n\n" + text.replace("\n", "\n\n")).encode(),
}


def write_lines(lines: list[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def write_json_lines(rows: list[Any], **options: Any) -> str:
    return write_lines([json.dumps(row, ensure_ascii=False, **options) for row in rows])


def write_csv(rows: list[dict[str, str]]) -> str:
    content = io.StringIO()
    table = csv.DictWriter(content, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return content.getvalue()


def read_dpg(file: Path) -> list[str]:
    questions = read_dpg_questions(file)
    return [question.text for questions_of_item in questions.values() for question in questions_of_item]


DPG = [{"item_id": f"i{n}", "proposition_id": "1", "dependency": "0", "tuple": "entity (x)",
        "question_natural_language": text} for n, text in enumerate(TEXTS)]  # fmt: skip
ROWS = [{"text": text, "image": "x.png"} for text in TEXTS]
# Place where text files are read -> name of the file, what is in it, and how its texts are read.
PLACES: dict[str, tuple[str, str, Callable[[Path], list[str]]]] = {
    "lines": ("x.txt", write_lines(TEXTS), lambda file: [line for line in read_lines(file) if line]),
    "prompts": ("x.txt", write_lines(TEXTS), lambda file: read_prompts(str(file), "prompt_file")),
    "prompts in JSON": ("x.jsonl", write_json_lines([{"prompt": t} for t in TEXTS]),
                        lambda file: read_prompts(str(file), "prompt_file")),
    "benchmark": ("x.jsonl", write_json_lines([{"prompt": t} for t in TEXTS]),
                  lambda file: [row["prompt"] for row in read_benchmark_rows(file, {"prompt": str})]),
    "benchmark of lines": ("x.txt", write_lines(TEXTS), lambda file: list(read_prompt_folder(file).values())),
    "benchmark in JSON": ("x.json", json.dumps(TEXTS, ensure_ascii=False, indent=1), read_json),
    "prompts of a judge": ("x.json", json.dumps({"add": f"<edit_prompt>{TEXTS[2]}"}, ensure_ascii=False, indent=1),
                           lambda file: list(read_judge_prompts(file, {"add"}).values())),
    "questions": ("x.csv", write_csv(DPG), read_dpg),
    "CSV": ("x.csv", write_csv(ROWS), lambda file: [row["text"] for row in read_csv(file)]),
    "table in CSV": ("x.csv", write_csv(ROWS), lambda file: [row["text"] for row in read_rows(file)]),
    "table in JSON lines": ("x.jsonl", write_json_lines(ROWS), lambda file: [row["text"] for row in read_rows(file)]),
    "table in a JSON list": ("x.json", json.dumps(ROWS, ensure_ascii=False, indent=1),
                             lambda file: [row["text"] for row in read_rows(file)]),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("writer", WRITERS)
def test_every_reader_finds_the_texts_that_were_written(writer: str, place: str) -> None:
    name, content, read = PLACES[place]
    expected = [f"<edit_prompt>{TEXTS[2]}"] if place == "prompts of a judge" else TEXTS
    if place in ("prompts", "benchmark of lines"):
        expected = [text.strip() for text in TEXTS]
    Path(name).write_bytes(WRITERS[writer](content))
    assert read(Path(name)) == expected


@pytest.mark.parametrize("writer", [name for name in WRITERS if name != "of old Macs"])
@pytest.mark.parametrize("text", ["a cat", "caf\xe9\u2028two", "first line\nsecond line"])
def test_a_caption_is_the_same_whatever_wrote_its_file(writer: str, text: str) -> None:
    content = WRITERS[writer](f"{text}\n") if writer != "with empty lines" else f"\n\n{text}\n\n".encode()
    assert decode_text({"txt": content}) == text
    Path("pictures").mkdir()
    make_noise_image(1).save("pictures/x.png")
    Path("pictures/x.txt").write_bytes(content)
    dataset = ImageFolder("pictures")
    counts = convert(dataset, Path("out"), ConversionOptions(val_samples=0))
    assert counts.total == 1
    from tbac.data.tars import TarReader

    assert decode_text(TarReader().read(Path("out/train-000000.tar"), 0)) == text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a,b\n1,\"2\n", r"x\.csv:2: it isn't CSV"),
        (b"a,b\n1,2\n1,2,3\n", r"x\.csv:3: a row of 3 fields where the first line has 2"),
        (b"a,a\n1,2\n", "two columns of one name"),
        (b"a,b\n\xff,1\n", "isn't UTF-8"),
        ("a,b\n1,2\n".encode("utf-16"), "isn't UTF-8"),
    ],
)  # fmt: skip
def test_what_isnt_csv_is_named(content: bytes, words: str) -> None:
    Path("x.csv").write_bytes(content)
    with pytest.raises(ForeignFileError, match=words):
        read_csv(Path("x.csv"))


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl"])
@pytest.mark.parametrize(
    "content", [b"", b"\n\n", b"\xff\xfe", b"\x89PNG", "a".encode("utf-16"), b'["a prompt"]', b'{"prompt": ["a"]}',
                b'{"prompt": "\\ud800"}', b"[" * 100_000, b'{"prompt": 1}', b"9" * 5000],
)  # fmt: skip
def test_a_prompt_file_gives_prompts_or_one_message(content: bytes, name: str) -> None:
    Path(name).write_bytes(content)
    try:
        prompts = read_prompts(name, "prompt_file")
    except ValueError as error:
        text = str(error)
        assert f"prompt_file={name}" in text, text
        assert len(text) < 300, text
        return
    assert name == "x.txt"
    assert all(prompts)
