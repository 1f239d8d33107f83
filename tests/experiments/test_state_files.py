"""Files of state that are torn, empty, garbage or of another version are read tolerantly; what is written is whole."""

import json
from pathlib import Path

import pytest
from PIL import Image

from experiments.reports import read_run_report
from experiments.stage_configs import is_finished
from experiments.sweeps.points import Point, read_points
from experiments.sweeps.score import open_grid, read_scores
from tests.helpers.configs import compose_config

GARBAGE = [
    b"", b"\n", b"\0" * 100, b"\xff\xfe\x00", b"{", b"[", b"[]", b"null", b"1", b'"text"', b"{}", b'{"stages": []}',
    b'{"stages": {}}', b'{"stages": [1]}', b'{"name": "t2i_pretrain"}', b'{"name": 1, "steps": 2, "checkpoint": "x"}',
    b'{"name": "t2i_pretrain", "steps": "2", "checkpoint": "x"}', b"[" * 100_000, b'{"name": "\\ud800"}',
    b'{"stages": [{"name": "t2i_pretrain", "steps": 2', b"9" * 5000,
]  # fmt: skip
REPORT = {"name": "t2i_pretrain", "steps": 2, "val_loss_first": None, "val_loss_last": float("nan"), "checkpoint": "x"}


def write_run(folder: Path) -> Path:
    """A run folder as training leaves it."""
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text("- seed=1\n")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "x").touch()
    (folder / "report.json").write_text(json.dumps(REPORT))
    return folder


@pytest.mark.parametrize("content", GARBAGE, ids=lambda content: content[:30].decode(errors="replace"))
def test_a_damaged_report_makes_a_run_unfinished_and_stops_nothing(content: bytes, tmp_path: Path) -> None:
    run = write_run(tmp_path / "sweep" / "run")
    stages = [compose_config("train", f"run_dir={run}", "world=shapes", "stage=t2i_pretrain", "stage.steps=2")]
    assert is_finished(stages, run)
    assert len(read_points(run.parent, ["seed"])) == 1
    (run / "report.json").write_bytes(content)
    assert not is_finished(stages, run)
    assert read_run_report(run / "report.json") is None
    assert read_points(run.parent, ["seed"]) == []


@pytest.mark.parametrize("content", [*GARBAGE, b"- [1]\n- {a: 1}\n", b"!!python/object:os.system {}", b"a: b: c", None])
def test_a_damaged_list_of_overrides_is_one_point_that_isn_t_counted(content: bytes | None, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_run(tmp_path / name)
    file = tmp_path / "one" / ".hydra" / "overrides.yaml"
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    assert [point.folder.name for point in read_points(tmp_path, ["seed"])] == ["two"]


@pytest.mark.parametrize("content", GARBAGE, ids=lambda content: content[:30].decode(errors="replace"))
def test_damaged_scores_and_pictures_of_a_point_are_made_anew(content: bytes, tmp_path: Path) -> None:
    point = Point(write_run(tmp_path / "run"), {}, REPORT)
    assert read_scores(point.folder / "scores.json") is None
    scores = {"geneval": {}, "prompts": {}, "loss": 1.0, "without": {}, "layers": [], "suites": {}, "mix": None}
    (point.folder / "scores.json").write_text(json.dumps({**scores, "asked": []}))
    assert read_scores(point.folder / "scores.json") is not None
    (point.folder / "scores.json").write_bytes(content)
    assert read_scores(point.folder / "scores.json") is None
    (point.folder / "grid").mkdir()
    Image.new("RGB", (24, 24)).save(point.folder / "grid" / "00000.png")
    assert len(open_grid(point)) == 1
    (point.folder / "grid" / "00001.png").write_bytes(content)
    assert open_grid(point) == []


@pytest.mark.parametrize("content", GARBAGE, ids=lambda content: content[:30].decode(errors="replace"))
def test_a_damaged_id_of_a_run_is_none(content: bytes, tmp_path: Path) -> None:
    from tbac.training.tracking import read_run_id

    (tmp_path / "mlflow_run_id").write_bytes(content)
    assert read_run_id(tmp_path / "mlflow_run_id") is None
