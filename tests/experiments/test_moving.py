"""What a run writes can be read: in another folder or working folder, on another machine, by whom the umask lets."""

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tbac.models import UniImage
from tbac.models.saved import read_checkpoint
from tests.helpers.commands import FEW, run_to_message, run_to_success
from tests.helpers.worlds import load_small_model


@pytest.fixture
def moved(trained_run: Path) -> Path:
    """The run folder under another name, with its links gone as after a copy to a disk that has none."""
    folder = Path("elsewhere").absolute()
    shutil.move(trained_run, folder)
    for file in folder.rglob("*"):
        if file.is_symlink():
            file.unlink()
    return folder


COMMANDS = {
    "export": ["export", "out=out", "checkpoint={}"],
    "generate": ["generate", "prompts=[a]", "out=made", "num_inference_steps=1", "checkpoint={}"],
    "answer": ["answer", "question=what?", "max_new_tokens=2", "checkpoint={}"],
    "init": ["train", *FEW, "hydra.run.dir=next", "init={}"],
    "resume": ["train", *FEW, "stage.steps=3", "hydra.run.dir=next", "resume={}"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_folder_serves_after_a_move_and_without_its_links(
    moved: Path, command: str, capfd: pytest.CaptureFixture[str]
) -> None:
    name, *arguments = [part.format(moved) for part in COMMANDS[command]]
    run_to_success(name, capfd, *arguments)
    if command == "resume":
        assert read_checkpoint("next")["tbac"]["steps"] == 3


def test_a_run_goes_on_in_its_own_folder_after_a_move(moved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_to_success("train", capfd, *FEW, "stage.steps=3", f"hydra.run.dir={moved}")
    assert read_checkpoint(moved)["global_step"] == 3


def test_a_checkpoint_is_opened_from_any_working_folder_and_on_another_machine(
    in_world: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(in_world, "world")
    monkeypatch.setenv("TBAC_SHAPES", "world")  # a relative path, as people give it
    run_to_success("train", capfd, *FEW, "hydra.run.dir=run")
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.chdir(other)
    assert isinstance(UniImage.from_checkpoint(tmp_path / "run"), UniImage)
    # On another machine the parts lie elsewhere, and the message says with which options they are given.
    (tmp_path / "world").rename(tmp_path / "away")
    arguments = [f"checkpoint={tmp_path / 'run'}", "question=what?", "max_new_tokens=2"]
    text = run_to_message("answer", capfd, *arguments)
    assert "mllm=/path/to/folder" in text
    assert "denoiser=/path/to/folder" in text
    assert "model." not in text
    backbones = tmp_path / "away" / "backbones"
    run_to_success("answer", capfd, *arguments, f"mllm={backbones / 'mllm'}", f"denoiser={backbones / 'denoiser'}")


def test_a_table_of_word_embeddings_is_found_on_another_machine(
    in_world: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = load_small_model(in_world)
    model.mllm.prompt_embeddings = model.mllm.get_prompt_table().detach() * 0.9
    model.save_pretrained("tables")
    run_to_success("train", capfd, *FEW, "model.prompt_embeddings=tables", "hydra.run.dir=run")
    assert isinstance(UniImage.from_checkpoint("run"), UniImage)
    Path("tables").rename("away")
    arguments = ["checkpoint=run", "question=what?", "max_new_tokens=2"]
    text = run_to_message("answer", capfd, *arguments)
    assert f"error: prompt_embeddings={tmp_path / 'tables'}: no exported folder" in text
    run_to_success("answer", capfd, *arguments, "prompt_embeddings=away")


@pytest.fixture(params=[0o002, 0o027, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def list_wrong_modes(folder: Path, umask: int) -> list[str]:
    wrong = []
    for path in folder.rglob("*"):
        if not path.is_symlink():
            usual = 0o777 if path.is_dir() else 0o666
            mode = stat.S_IMODE(path.stat().st_mode)
            if mode != usual & ~umask:
                wrong.append(f"{path}: {mode:o}")
    return wrong


def test_files_have_the_modes_that_the_umask_gives(in_world: Path, umask: int) -> None:
    model = load_small_model(in_world)
    for standalone in (False, True):
        model.save_pretrained(f"out/{standalone}", standalone=standalone)
    assert Path("out/True/mllm/model.safetensors").is_file()
    assert list_wrong_modes(Path("out"), umask) == []


def test_a_run_s_files_have_the_modes_that_the_umask_gives(in_world: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = os.umask(0o027)
    try:
        run_to_success("train", capfd, *FEW, "hydra.run.dir=run")
        run_to_success("generate", capfd, "prompts=[a]", "out=made", "num_inference_steps=1", "checkpoint=run")
    finally:
        os.umask(before)
    assert list_wrong_modes(Path("run"), 0o027) + list_wrong_modes(Path("made"), 0o027) == []
