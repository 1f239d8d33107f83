"""What every test has: a folder of its own, and for those that ask for it a small shapes world that all share."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no hub is asked; the libraries look at it when they are imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for small models a second thread costs more than it saves

import contextlib
import io
import pickle
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from omegaconf import OmegaConf

from tests.helpers.composition import compose_choices_once
from tests.helpers.shared import build_once

if TYPE_CHECKING:
    from tbac.models import UniImage


# A shell that starts the tests in the background, or nohup, has them ignore these, and every process that they start.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _away_from_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that a test writes lands in the repository."""
    monkeypatch.chdir(tmp_path)
    if "torch" in sys.modules:  # tests that don't need it aren't kept waiting for it
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _compose_once() -> Iterator[None]:
    """Every command reads some eighty files of conf/; within a session each text, and each choice, is read once."""
    parsed: dict[str, bytes] = {}
    parse = OmegaConf.load

    def load(file: Any) -> Any:
        text = file.read() if hasattr(file, "read") else Path(file).read_text(encoding="utf-8")
        if text not in parsed:
            parsed[text] = pickle.dumps(parse(io.StringIO(text)))
        return pickle.loads(parsed[text])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OmegaConf, "load", load)
        compose_choices_once(patch)
        yield


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this test session share."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def world_folder(session_folder: Path) -> Path:
    """A shapes world with untrained backbones: backbones/{mllm,denoiser}, data/, benchmarks/. No test changes it."""
    from tests.helpers.worlds import build_small_world

    return build_once(session_folder / "world", build_small_world)


@pytest.fixture
def in_world(world_folder: Path, session_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Configs of the shapes world find that world, those of the world of words its suites, and MLflow a ready store."""
    from tbac.training.tracking import store

    make_tables = store.make_tables

    def copy_tables(file: Path) -> None:
        ready = build_once(session_folder / "mlflow_store", lambda folder: make_tables(folder / "store.db"))
        shutil.copyfile(ready / "store.db", file)

    monkeypatch.setattr(store, "make_tables", copy_tables)
    monkeypatch.setenv("TBAC_SHAPES", str(world_folder))
    monkeypatch.setenv("TBAC_WORDS", str(world_folder / "words"))
    # MLflow keeps the connection to an address: a relative one would lead to the store of the test before.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{Path.cwd()}/mlflow.db")
    return world_folder


@pytest.fixture
def model(in_world: Path) -> "UniImage":
    from tests.helpers.worlds import load_small_model

    return load_small_model(in_world)


@pytest.fixture
def trained_run(in_world: Path, session_folder: Path, capfd: pytest.CaptureFixture[str]) -> Path:
    """The run folder `run` of a training of two steps: trained once in a session, and each test has a copy."""
    from tests.helpers.commands import FEW, run_to_success

    def train(folder: Path) -> None:
        with contextlib.chdir(folder):
            run_to_success("train", capfd, *FEW, "hydra.run.dir=run")

    shared = build_once(session_folder / "trained", train)
    return shutil.copytree(shared / "run", "run", symlinks=True)
