"""A benchmark's own script is read for the words that it asks with, and never executed."""

from pathlib import Path
from typing import Any

import pytest

from tbac.evaluation.benchmarks.tiif import TIIF
from tbac.evaluation.judges.base import JudgeError
from tbac.evaluation.published_scripts import fill, mark, read_script
from tests.helpers.published import locate_published

SCRIPT = '''
import os
os.mkdir("executed")
plain = """one
line"""
joined = ("two "
          "parts")
table = {"a": "first", 2: [3]}

class Judge:
    def __init__(self):
        self.question = "what?"
        self.question = "another"

def build(row):
    filled = f'Prompt: "{row["Prompt"]}"! {row}'
    return [
        {"role": "system", "content": [{"type": "text", "text": "be strict"}]},
        {"role": "user", "content": [{"type": "text", "text": f"rate {row['Prompt']}"}, {"type": "image_url"}]},
        {"role": "user", "content": "later"},
    ]
'''


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.py").write_text(SCRIPT)
    return tmp_path / "x.py"


def test_texts_messages_and_what_they_leave_open_are_read(script: Path) -> None:
    found = read_script(script, ["plain", "question"])
    assert found.get("plain") == "one\nline"
    assert found.get("joined") == "two parts"
    assert found.get("table") == {"a": "first", 2: [3]}
    assert found.get("question") == "what?"
    assert found.get("filled") == f'Prompt: "{mark("Prompt")}"! {mark("{row}")}'
    assert fill(found.get_message("user"), Prompt="a dog") == "rate a dog"
    assert found.get_message("system") == "be strict"
    assert found.entries["a"] == ["first"]
    assert not (script.parent / "executed").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("x = (", "isn't a Python script"),
        ("x = 1\0", "isn't a Python script"),
        ("(" * 5000, "isn't a Python script"),
        ("plain = input()", "assigns no text to plain"),
        ("", "assigns no text to plain"),
    ],
)
def test_what_isn_t_the_script_is_named(content: str, words: str, script: Path) -> None:
    script.write_text(content)
    with pytest.raises(ValueError, match=words):
        read_script(script, ["plain"])
    with pytest.raises(ValueError, match="isn't a file"):
        read_script(script.parent / "absent.py")


TEMPLATES = "".join(f'raw_prompt{end} = "{n}: ##YNQuestions##"\n' for n, end in enumerate(("", "_1", "_2")))
MESSAGES = 'messages = [{"role": "system", "content": "a critic"}, {"role": "user", "content": prompt}]\n'


class Critic:
    """Notes the manner in which it is asked, and what; never says anything of use."""

    identity, slow = "critic", False

    def __init__(self) -> None:
        self.manner: Any = None
        self.questions: list[str] = []

    def in_manner(self, manner: Any) -> "Critic":
        self.manner = manner
        return self

    def ask(self, question: str, images: Any) -> str:
        self.questions.append(question)
        return "hm"


def test_tiif_asks_in_its_three_templates_again_and_again_or_in_one_steadily(script: Path) -> None:
    script.write_text(TEMPLATES + MESSAGES)
    files = {"file": str(locate_published("tiif/testmini_prompts")), "script": str(script)}
    files["questions"] = str(locate_published("tiif/testmini_eval_prompts"))
    benchmark, critic = TIIF(name="tiif_mini", **files, tries=5), Critic()
    benchmark.prepare_judge(critic)
    assert (critic.manner.system, critic.manner.temperature, critic.manner.max_tokens) == ("a critic", 1, None)
    heard = []
    for target in benchmark.targets[:40]:
        critic.questions.clear()
        with pytest.raises(JudgeError, match="in 5 tries"):
            benchmark.judge_picture(target, None, critic)  # type: ignore[arg-type]
        questions = "\n".join(question.strip() for question in benchmark.pair_of[target.path].questions)
        assert {text[3:] for text in critic.questions} == {questions}
        heard.append("".join(text[0] for text in critic.questions))
    # Each template has its turn, at random, and the same for a picture each time.
    assert {letter for turns in heard for letter in turns} == set("012")
    assert len(set(heard)) > 20
    assert [t[0] for t in benchmark.list_wordings(benchmark.targets[0])] == list(heard[0])

    steady = TIIF(name="tiif_mini", **files, steady=True)
    steady.prepare_judge(critic)
    assert critic.manner.temperature == 0
    assert {text[0] for target in steady.targets for text in steady.list_wordings(target)} == {"0"}
    assert "one wording at temperature 0" in steady.describe_rules()
