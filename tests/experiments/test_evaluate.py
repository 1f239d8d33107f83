"""GenEval's steps: a tree on any number of processes, scored and reported, and gone on with."""

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.experiments.test_applications import FEW, ran
from tests.experiments.test_errors import message

COMMON = ["checkpoint=run", "benchmark.num_inference_steps=2", "device=cpu", "samples=2", "benchmark.batch_size=5"]


def tree(out: str) -> dict[str, bytes]:
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in Path(out, "geneval").rglob("*") if p.is_file()}


@pytest.fixture(autouse=True)
def _trained(in_world: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ran("train", capfd, *FEW, "hydra.run.dir=run", "callbacks.samples.prompts=[]")


def test_processes_share_the_work_and_the_steps_go_on(capfd: pytest.CaptureFixture[str]) -> None:
    ran("evaluate", capfd, *COMMON, "out=one")
    report = json.loads(Path("one/report.json").read_text())
    rows = [json.loads(line) for line in Path("one/geneval.results.jsonl").read_text().splitlines()]
    assert report["pictures"] == len(rows) == sum(name.endswith(".png") for name in tree("one"))
    assert not report["missing"]
    assert not report["comparable"]
    assert "2 each; judge tbac.evaluation.detectors.TemplateDetector" in report["protocol"]
    assert Image.open("one/wrong.png").width > 100
    assert "Not comparable with published numbers" in Path("one/report.md").read_text()

    for rank in (0, 1, 2):
        ran("evaluate", capfd, *COMMON, "out=three", "steps=[generate]", f"rank={rank}", "world_size=3")
    assert tree("three") == tree("one")

    made = {p: p.stat().st_mtime_ns for p in Path("one/geneval").rglob("*.png")}
    gone, torn = sorted(made)[3], sorted(made)[7]
    gone.unlink()
    torn.write_bytes(torn.read_bytes()[:50])
    ran("evaluate", capfd, *COMMON, "out=one", "steps=[score,report]")
    report = json.loads(Path("one/report.json").read_text())
    assert [f"one/geneval/{name}" for name in report["missing"]] == [str(gone), str(torn)]
    assert "2 of " in Path("one/report.md").read_text()
    ran("evaluate", capfd, *COMMON, "out=one")
    assert tree("one") == tree("three")
    assert [p for p in made if p.stat().st_mtime_ns != made[p]] == [gone, torn]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["steps=[paint]"], "steps=['paint'] must be some of generate, score, report"),
        (["steps=[]"], "steps=[] must be some of"),
        (["samples=0"], "samples=0"),
        (["rank=3", "world_size=3", "steps=[generate]"], "rank=3 of world_size=3"),
        (["world_size=2"], "several processes take steps=[generate]"),
        (["steps=[report]"], "steps=[score] writes it"),
    ],
)
def test_bad_steps_are_named(arguments: list[str], words: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert words in message("evaluate", capfd, *COMMON, "out=x", *arguments)


def test_pictures_of_another_checkpoint_are_refused(capfd: pytest.CaptureFixture[str]) -> None:
    ran("evaluate", capfd, *COMMON, "out=one", "steps=[generate]")
    before = tree("one")
    ran("train", capfd, *FEW, "hydra.run.dir=other", "stage.lr=5e-3", "callbacks.samples.prompts=[]")
    text = message("evaluate", capfd, *COMMON, "checkpoint=other", "out=one")
    assert "was made otherwise (trained " in text
    assert tree("one") == before
    ran("evaluate", capfd, *COMMON, "checkpoint=other", "out=one", "overwrite=true", "steps=[generate]")
    assert tree("one").keys() == before.keys()
    assert tree("one") != before
