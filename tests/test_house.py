"""What is another library's own stays its own: no private attribute of one is read, set or overridden."""

import ast
import importlib
import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.configs import ROOT
from tests.helpers.source import CODE, list_files, parse

# (file, name) -> why nothing public does the job. At most five.
EXCEPTIONS = {
    ("tbac/models/autoencoder.py", "_apply"): "parts that wait to be read stay on the meta device when a module moves",
    ("experiments/costs.py", "torch._subclasses"): "tensors without numbers; documented, and at no public address",
    ("tbac/training/callbacks/watchdog.py", "os._exit"): "a thread ends its process; documented, in spite of its name",
    # diffusers' own pipelines name so the components that a caller may leave out.
    ("tbac/sampling/pipeline.py", "_optional_components"): "components that may be left out",
}
OVERRIDDEN = {("tbac/models/autoencoder.py", "_apply"), ("tbac/sampling/pipeline.py", "_optional_components")}
HYDRA = {"_target_", "_partial_", "_recursive_", "_convert_", "_self_"}  # words of its configs, not attributes


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name not in HYDRA


def list_own_names(trees: list[ast.Module]) -> set[str]:
    """Everything that these files define, as functions, classes, variables or attributes of `self`."""
    own = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            own.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
        elif is_of_self(node) and isinstance(node.ctx, ast.Store):  # type: ignore[attr-defined]
            own.add(node.attr)  # type: ignore[attr-defined]
    return own


def is_of_self(node: ast.AST) -> bool:
    """Whether it reads `self.name`, or `cls.name`, or `super().name`."""
    return isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "cls", "super()")


def list_private_names(tree: ast.Module, own: set[str]) -> Iterator[str]:
    """Private names in a file that belong to a library."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            yield f"{ast.unparse(node.value).split('.')[-1]}.{node.attr}"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            for name in names:
                parts = [part for part in f"{module}.{name}".split(".") if part]
                first = next((i for i, part in enumerate(parts) if is_private(part)), None)
                if first is not None and parts[0] not in CODE:
                    yield ".".join(parts[: first + 1])
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr", "delattr"):
            attribute = node.args[1]
            text = attribute.value if isinstance(attribute, ast.Constant) else None
            if isinstance(text, str) and is_private(text) and text not in own:
                yield f"{ast.unparse(node.args[0])}.{text}"


def list_static(root: Path) -> set[tuple[str, str]]:
    files = list_files(*CODE, root=root)
    own = list_own_names([parse(file) for file in files])
    return {
        (file.relative_to(root).as_posix(), name) for file in files for name in list_private_names(parse(file), own)
    }


def list_names_of_class(cls: type) -> set[str]:
    """Private names that a class defines, and that its methods set on `self`."""
    names = {name for name in vars(cls) if is_private(name)}
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError):  # of a class in C
        return names
    stored = (node for node in ast.walk(tree) if is_of_self(node) and isinstance(node.ctx, ast.Store))  # type: ignore[attr-defined]
    return names | {node.attr for node in stored if is_private(node.attr)}  # type: ignore[attr-defined]


def list_overridden(cls: type) -> set[str]:
    """Private names that a class of ours shares with the classes of libraries that it builds on."""
    bases = [base for base in cls.__mro__[1:-1] if base.__module__.split(".")[0] not in (*CODE, "tests")]
    theirs = set().union(*(list_names_of_class(base) for base in bases))
    machinery = {"_abc_impl", "_is_protocol", "_is_runtime_protocol", "_non_callable_proto_members_"}
    return list_names_of_class(cls) & theirs - machinery


def test_no_private_name_of_a_library_is_used_without_a_reason() -> None:
    assert list_static(ROOT) == EXCEPTIONS.keys() - OVERRIDDEN
    assert len(EXCEPTIONS) <= 5


def test_no_private_name_of_a_library_s_class_is_overridden_without_a_reason() -> None:
    found = set()
    for file in list_files("tbac"):
        path = file.relative_to(ROOT).as_posix()
        module = importlib.import_module(path.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
        classes = [cls for cls in vars(module).values() if isinstance(cls, type) and cls.__module__ == module.__name__]
        found |= {(path, name) for cls in classes for name in list_overridden(cls)}
    assert found == OVERRIDDEN


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("trainer._logger_connector.x = 1", "trainer._logger_connector"),
        ("def f(x):\n    return x.y._cdata", "y._cdata"),
        ("class A(B):\n    def f(self):\n        return self._b", "self._b"),
        ("from torch._utils import f", "torch._utils"),
        ("import a.b._c.d", "a.b._c"),
        ("from torch.distributed import _get_default_store", "torch.distributed._get_default_store"),
        ("getattr(x, '_y')", "x._y"),
    ],
)
def test_a_private_name_is_found(text: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "tbac").mkdir()
    (tmp_path / "tbac/x.py").write_text(text)
    assert list_static(tmp_path) == {("tbac/x.py", name)}


def test_what_is_set_over_a_library_s_own_is_found() -> None:
    from lightning.pytorch.strategies import ModelParallelStrategy

    class Ours(ModelParallelStrategy):
        def setup_environment(self) -> None:
            self._data_parallel_size = 1
            self._ours = 2

    assert list_overridden(Ours) == {"_data_parallel_size"}
