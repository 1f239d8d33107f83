"""What the READMEs say is there: their links, the files that they name, and commands that compose."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.helpers.configs import ROOT, compose_config

ROOMS = ("conf", "data_prep", "experiments", "tbac", "tests")
READMES = [ROOT / "README.md", *sorted(file for room in ROOMS for file in (ROOT / room).rglob("README.md"))]
NAMES = [file.relative_to(ROOT).as_posix() for file in [*READMES, ROOT / "CONTRIBUTING.md"]]
LINK = re.compile(r"\]\(([^)\s]+)\)")
NAMED_FILE = re.compile(r"`([\w./-]+/[\w.-]+\.(?:py|yaml|md))`")
EXAMPLES = ("own/", "my_conf/", "local/", "outputs/", "data/")  # what a reader has, not the repository
NOT_FOR_MAKE = ("MAKE", "ARGS", "VIRTUAL_ENV", "CONDA")  # what would change what it runs
REQUIRED = {"train": ["run_dir=."]}


def read(page: str) -> str:
    return (ROOT / page).read_text()


def read_anchors(page: Path) -> set[str]:
    """Where a link into a page may lead, by the rule of GitHub."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def list_command_lines(text: str) -> list[str]:
    """Lines of code blocks, and code within sentences, that begin with `python` or `make`."""
    text = text.replace("\\\n", " ")
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", text)
    return [line for line in lines if re.match(r"(\w+=\S+ )?(python \w+/|make\b)", line) and "<" not in line]


def list_python_commands(line: str) -> list[list[str]]:
    """The commands of this repository that a line runs, as words; those that `make` would run where it is a target."""
    words = shlex.split(line, comments=True)
    while "=" in words[0]:
        words = words[1:]
    if words[0] == "python":
        return [words[1:]]
    dry = ["make", "--dry-run", "--assume-old=.venv/.ready", *words[1:]]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(NOT_FOR_MAKE)}
    printed = subprocess.run(dry, cwd=ROOT, check=True, capture_output=True, text=True, env=environment).stdout
    commands = [shlex.split(each) for each in printed.splitlines() if each.startswith(".venv/bin/python")]
    return [command[1:] for command in commands if command[1].endswith(".py")]


def list_points(overrides: list[str]) -> list[list[str]]:
    """Points of a sweep in which each choice occurs once."""
    names = [override.split("=", 1)[0] for override in overrides]
    values = [override.split("=", 1)[1] for override in overrides]
    choices = [[value] if re.search(r"[\[{'\"]", value) else value.split(",") for value in values]
    number = max(map(len, choices), default=1)
    return [[f"{name}={own[i % len(own)]}" for name, own in zip(names, choices, strict=True)] for i in range(number)]


def check_command(script: str, arguments: list[str]) -> None:
    """Compose the config of a command, with each choice that a sweep gives."""
    name = re.search(r'@command\("([\w/]+)"', (ROOT / script).read_text())
    assert name, f"{script} is no command"
    if any(argument.startswith("--config-dir") for argument in arguments):  # it names parts that a reader has
        return
    overrides = [argument for argument in arguments if "=" in argument and "…" not in argument]
    if not overrides:  # tests/experiments/test_configs.py composes it
        return
    for point in list_points(overrides) if "-m" in arguments else [overrides]:
        compose_config(name[1], *REQUIRED.get(name[1], []), *point)


@pytest.mark.parametrize("line", dict.fromkeys(line for page in NAMES for line in list_command_lines(read(page))))
def test_its_commands_compose(line: str) -> None:
    for script, *arguments in list_python_commands(line):
        check_command(script, arguments)


@pytest.mark.parametrize("page", NAMES)
def test_its_links_and_the_files_that_it_names_exist(page: str) -> None:
    text, folder = read(page), (ROOT / page).parent
    for link in LINK.findall(text):
        if not link.startswith("http"):
            path, _, anchor = link.partition("#")
            target = folder / path if path else ROOT / page
            assert target.exists(), link
            assert not anchor or anchor in read_anchors(target), link
    for path in NAMED_FILE.findall(text):
        if not path.startswith(EXAMPLES):
            assert (ROOT / path).exists() or (folder / path).exists(), path


def test_the_first_page_is_short_and_leads_to_all_others() -> None:
    text = read("README.md")
    assert len(text.splitlines()) <= 150
    assert {f"{room}/README.md" for room in ROOMS} <= {link.split("#")[0] for link in LINK.findall(text)}


def test_what_is_wrong_in_a_readme_is_found() -> None:
    text = "```\npython experiments/train.py \\\n  stage=finetune  # 1\nls\n```\nand `make stage2 MACHINE=cuda`."
    lines = list_command_lines(text)
    assert [shlex.split(line, comments=True)[-1] for line in lines] == ["stage=finetune", "MACHINE=cuda"]
    assert list_python_commands(lines[1]) == [["experiments/train.py", "stage=ti2i_pretrain", "machine=cuda"]]
    assert list_points(["a=1,2", "b=[3,4]"]) == [["a=1", "b=[3,4]"], ["a=2", "b=[3,4]"]]
    with pytest.raises(Exception, match="no_such_key"):
        check_command("experiments/train.py", ["no_such_key=1"])
