"""Imports point one way, file by file, without a circle (DESIGN.md, "The house")."""

from pathlib import Path

import pytest

from tests.helpers.configs import ROOT
from tests.helpers.source import CODE, find_circle, list_arrows, list_files, list_imports

# Rooms from top to bottom: a file imports from its own row and from those below.
ROWS = [
    ["experiments/"],
    ["data_prep/"],
    ["tbac/app/"],
    ["tbac/training/", "tbac/sampling/", "tbac/evaluation/"],
    ["tbac/models/", "tbac/data/"],
    [
        "tbac/flow.py",
        "tbac/reinforcement.py",
        "tbac/types.py",
        "tbac/files.py",
        "tbac/pictures.py",
        "tbac/distributed.py",
        "tbac/redaction.py",
        "tbac/__init__.py",
    ],
]
# Rooms of one row that import nothing of one another; training and evaluation may draw with what sampling has.
STRANGERS = [
    ("tbac/models/", "tbac/data/"),
    ("tbac/training/", "tbac/evaluation/"),
]
NEVER_UP = [("tbac/sampling/", "tbac/training/"), ("tbac/sampling/", "tbac/evaluation/")]
# Library -> the files that may import it.
RESERVED = {
    "hydra": ("experiments/", "data_prep/", "tbac/app/"),
    "lightning": ("tbac/training/", "tbac/data/datamodule.py"),
    "mlflow": ("tbac/training/tracking/store.py",),
}


def row_of(path: str) -> int:
    rows = [number for number, rooms in enumerate(ROWS) for room in rooms if path.startswith(room)]
    assert len(rows) == 1, f"{path} belongs to no room of DESIGN.md"
    return rows[0]


def is_forbidden(importer: str, imported: str) -> bool:
    """Whether an arrow from one file to another points up, or to a room that is none of the importer's business."""
    if row_of(imported) < row_of(importer):
        return True
    pairs = [*STRANGERS, *((b, a) for a, b in STRANGERS), *NEVER_UP]
    return any(importer.startswith(a) and imported.startswith(b) for a, b in pairs)


def list_violations(root: Path) -> list[str]:
    """Every import against the rules."""
    found = []
    for importer, imported in list_arrows(root).items():
        row_of(importer)
        found += [f"{importer} imports {other}" for other in sorted(imported) if is_forbidden(importer, other)]
    for file in list_files(*CODE, root=root):
        path = file.relative_to(root).as_posix()
        libraries = {name.split(".")[0] for name in list_imports(file)}
        found += [
            f"{path} imports {library}"
            for library, allowed in RESERVED.items()
            if library in libraries and not path.startswith(allowed)
        ]
        if "tests" in libraries:
            found.append(f"{path} imports tests")
    return found


def test_imports_point_one_way() -> None:
    assert list_violations(ROOT) == []


def test_no_files_import_each_other_in_a_circle() -> None:
    assert find_circle(list_arrows()) == []


@pytest.mark.parametrize(
    ("path", "text", "words"),
    [
        ("tbac/models/x.py", "import hydra.utils", "tbac/models/x.py imports hydra"),
        ("data_prep/x.py", "def f():\n    from lightning import Trainer", "data_prep/x.py imports lightning"),
        ("tbac/training/x.py", "import mlflow", "tbac/training/x.py imports mlflow"),
        (
            "tbac/models/x.py",
            "def f():\n    from tbac.data import order",
            "tbac/models/x.py imports tbac/data/order.py",
        ),
        ("tbac/data/x.py", "from tbac.models.taps import last_n", "tbac/data/x.py imports tbac/models/taps.py"),
        ("tbac/models/x.py", "from tbac.sampling.solver import solve", "imports tbac/sampling/solver.py"),
        ("tbac/sampling/x.py", "import tbac.training.module", "tbac/sampling/x.py imports tbac/training/module.py"),
        ("data_prep/x.py", "import experiments.train", "data_prep/x.py imports experiments/train.py"),
        ("tbac/x.py", "", "tbac/x.py belongs to no room"),
        ("tbac/models/x.py", "from tests.helpers import y", "tbac/models/x.py imports tests"),
    ],
)
def test_a_wrong_import_is_found(path: str, text: str, words: str, tmp_path: Path) -> None:
    others = ["tbac/data/order.py", "tbac/models/taps.py", "tbac/sampling/solver.py", "tbac/training/module.py"]
    for name in [*others, "experiments/train.py", path]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / path).write_text(text)
    try:
        found = list_violations(tmp_path)
    except AssertionError as error:
        found = [str(error)]
    assert len(found) == 1
    assert words in found[0]


def test_a_circle_is_found_lazy_imports_counted_and_those_for_types_not(tmp_path: Path) -> None:
    (tmp_path / "tbac/models").mkdir(parents=True)
    texts = {
        "a": "import tbac.models.b",
        "b": "def f():\n    from tbac.models.c import g",
        "c": "from tbac.models import a",
        "d": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from tbac.models import e",
        "e": "from tbac.models import d",
    }
    for name, text in texts.items():
        (tmp_path / f"tbac/models/{name}.py").write_text(text)
    circle = find_circle(list_arrows(tmp_path))
    assert set(circle) == {f"tbac/models/{name}.py" for name in "abc"}
    (tmp_path / "tbac/models/c.py").write_text("")
    assert find_circle(list_arrows(tmp_path)) == []


def test_no_test_file_imports_another() -> None:
    for file in list_files("tests"):
        for name in list_imports(file):
            assert name.split(".")[0] != "tests" or name.startswith("tests.helpers."), f"{file} imports {name}"


def test_no_file_asks_which_world_it_is_in() -> None:
    for file in list_files("tbac"):
        assert "shapes world" not in file.read_text().lower(), file
