"""A password on the command line or in the environment stands in no file that a run leaves, and in no output."""

from pathlib import Path

import pytest

from tbac.training import delivery
from tests.helpers.commands import FEW, run_app, run_to_success

SECRET = "geh3im"
STORE = f"http://me:{SECRET}@127.0.0.1:9"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "PATIENCE", 0.5)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


def list_files_with_secret() -> list[str]:
    """Every file below the working folder that holds the secret."""
    files = [file for file in Path().rglob("*") if file.is_file() and not file.is_symlink()]
    return [str(file) for file in files if SECRET.encode() in file.read_bytes() or SECRET in str(file)]


@pytest.mark.usefixtures("in_world")
@pytest.mark.parametrize("given", ["option", "environment"])
def test_the_address_of_mlflow(given: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", STORE)
    options = ["logger=mlflow", *([f"logger.tracking_uri={STORE}"] if given == "option" else [])]
    text = run_to_success("train", capfd, *FEW, *options, "hydra.run.dir=run", "callbacks.sample_grid.prompts=[]")
    assert "MLflow didn't take" in text
    assert SECRET not in text
    assert Path("run/checkpoints/t2i_pretrain-step=2.ckpt").is_file()
    assert list_files_with_secret() == []


@pytest.mark.usefixtures("in_world")
@pytest.mark.parametrize(
    "option",
    [
        f"stage.sources=[{{path: 'https://me:{SECRET}@127.0.0.1:9/x', split: train}}]",
        f"init=https://me:{SECRET}@host/x.ckpt",
        f"model.mllm=https://host/x?token={SECRET}",
        f"stage.lr=https://me:{SECRET}@host",
    ],
)
def test_an_option_that_is_refused(option: str, capfd: pytest.CaptureFixture[str]) -> None:
    status, text = run_app("train", capfd, *FEW, "hydra.run.dir=run", option)
    assert status
    assert SECRET not in text
    assert list_files_with_secret() == []


@pytest.mark.usefixtures("in_world")
def test_the_points_of_a_sweep(capfd: pytest.CaptureFixture[str]) -> None:
    options = ["-m", "hydra.sweep.dir=sweep", f"logger.tracking_uri={STORE}", "stage.lr=1e-3,x", "logger=mlflow"]
    _, text = run_app("train", capfd, *options, *FEW, "callbacks.sample_grid.prompts=[]")
    assert SECRET not in text
    assert list_files_with_secret() == []
