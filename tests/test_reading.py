"""What can be counted of how the code reads, nested comprehensions and arguments, and where a model's options stand."""

import ast
from dataclasses import fields
from pathlib import Path

import pytest

from tbac.models.config import ArchitectureConfig, LadderConfig, ModelConfig
from tests.helpers.configs import ROOT
from tests.helpers.source import CODE, list_files, parse
from tests.helpers.thermometers import count_arguments, count_lines, list_functions, list_nested_comprehensions

FILES = list_files(*CODE)
MOST_ARGUMENTS = 7
CALLED_AS_DIFFUSERS_DOES = {("tbac/sampling/pipeline.py", "UniImagePipeline.__call__")}

# Options that may stand in more than three files, and why. Those of the parts are also the names of the parts.
PARTS = {
    "mllm",
    "denoiser",
    "taps",
    "ladder",
    "connector",
    "lora",
    "architecture",
    *(f.name for f in fields(ArchitectureConfig)),
}
SHARED = {
    "dtype": "every tensor has one",
    "seed": "every command has one",
    "compile": "also a function of re and of torch",
    "num_layers": "also a size of each part",
    "image_pixels": "a size of what is released and of what a judge sees",
    "max_text_tokens": "a size of what is released and of what a judge reads",
    "num_queries": "a size that others follow from",
    "system_prompt": "part of what is released",
    "quantization": "a judge has it too, and a study compares its kinds",
    "prompt_embeddings": "a table that checkpoints and exports hold",
    "random_init": "what is planned and measured has no weights to read",
}
OPTIONS = sorted({f.name for config in (ModelConfig, LadderConfig, ArchitectureConfig) for f in fields(config)})


def path_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def test_comprehensions_stand_alone() -> None:
    nested = {path_of(file): lines for file in FILES if (lines := list_nested_comprehensions(file))}
    count = sum(len(lines) for lines in nested.values())
    assert count <= sum(map(count_lines, FILES)) / 1000, nested


def test_functions_take_few_arguments() -> None:
    many = {
        (path_of(file), name)
        for file in FILES
        for name, function in list_functions(file)
        if count_arguments(function) > MOST_ARGUMENTS
    }
    assert many == CALLED_AS_DIFFUSERS_DOES


def test_what_is_counted_is_found(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text(
        "class A:\n"
        "    def f(self, a, b, /, c, *rest, d=1, **options):\n"
        "        return [x for x in (y for y in a)]\n"
        "def g():\n"
        "    return [x for x in b], {y for y in c}\n"
    )
    assert list_nested_comprehensions(file) == [3]
    assert {name: count_arguments(function) for name, function in list_functions(file)} == {"A.f": 6, "g": 0}


def list_names(file: Path) -> set[str]:
    """Names that a file reads, sets, passes or spells, the last parts of dotted ones."""
    found = set()
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.arg | ast.keyword):
            found.add(node.arg)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value.split(".")[-1])
    return found


@pytest.mark.parametrize("option", [name for name in OPTIONS if name not in {*PARTS, *SHARED}])
def test_an_option_stands_in_three_files_at_most(option: str) -> None:
    """Its field, its use, and what builds the part."""
    files = [path_of(file) for file in FILES if option in list_names(file)]
    assert "tbac/models/config.py" in files
    assert len(files) <= 3, files


def test_no_exception_outlives_its_option() -> None:
    assert set(SHARED) <= set(OPTIONS)
