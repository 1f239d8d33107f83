"""Imports point one way; see the file map of the README."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Room -> rooms that it may import besides itself; "=" means that module alone and nothing below it.
ALLOWED = {
    "tbac.types": set(),
    "tbac.flow": {"tbac.types"},
    "tbac.distributed": set(),
    "tbac.files": set(),
    "tbac.models": {"tbac.flow", "tbac.types", "=tbac"},
    "tbac.data": {"tbac.flow", "tbac.types", "tbac.files"},
    "tbac.training": {"tbac.models", "tbac.data", "tbac.flow", "tbac.types", "tbac.sampling", "tbac.distributed"},
    "tbac.sampling": {"tbac.models", "tbac.flow", "tbac.types"},
    "tbac.evaluation": {"tbac.models", "tbac.data", "tbac.flow", "tbac.types", "tbac.files"},
    "tbac.app": {"tbac"},
    "data_prep": {"tbac"},
    "experiments": {"tbac", "data_prep"},
}
# Library -> prefixes of the files that may import it.
RESERVED = {
    "hydra": ("tbac/app.py", "experiments/", "data_prep/", "tests/"),
    "lightning": ("tbac/training/", "tbac/data/datamodule.py", "experiments/", "tests/"),
    "mlflow": ("tbac/training/tracking.py", "tests/"),
}


def imports(file: Path) -> Iterator[str]:
    """Dotted names that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports hide the direction"
            yield node.module or ""


def room_of(name: str) -> str | None:
    return max((r for r in ALLOWED if name == r or name.startswith(r + ".")), key=len, default=None)


def python_files() -> list[Path]:
    return [f for top in ("tbac", "experiments", "data_prep", "tests") for f in sorted((ROOT / top).rglob("*.py"))]


def violations(file: Path) -> list[str]:
    """What a file imports against the rules."""
    path = file.relative_to(ROOT).as_posix()
    module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    room = room_of(module)
    found = []
    for name in imports(file):
        library = name.split(".")[0]
        if library in RESERVED and not path.startswith(RESERVED[library]):
            found.append(f"{path} imports {name}")
        if room and library in ("tbac", "experiments", "data_prep", "tests"):
            allowed = ALLOWED[room] | {room}
            if not any(name == a.removeprefix("=") or name.startswith(a + ".") for a in allowed):
                found.append(f"{path} ({room}) imports {name}")
    return found


@pytest.mark.parametrize("file", python_files(), ids=lambda f: f.relative_to(ROOT).as_posix())
def test_imports_point_one_way(file: Path) -> None:
    assert violations(file) == []


def test_a_wrong_import_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    bad = tmp_path / "tbac" / "models" / "x.py"
    bad.parent.mkdir(parents=True)
    bad.write_text("import hydra\ndef f():\n    from tbac.data import stream\n")
    assert len(violations(bad)) == 2


def test_no_file_asks_which_world_it_is_in() -> None:
    for file in (ROOT / "tbac").rglob("*.py"):
        assert "shapes world" not in file.read_text().lower(), file


def test_no_test_file_imports_another() -> None:
    for file in (ROOT / "tests").rglob("*.py"):
        for name in imports(file):
            assert name.split(".")[0] != "tests" or name.startswith("tests.helpers."), f"{file} imports {name}"
