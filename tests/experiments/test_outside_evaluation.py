"""A benchmark and a judge that the package doesn't know are used by the name of their YAML alone."""

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers.commands import run_to_message, run_to_success

MODULE = """
from dataclasses import dataclass
from statistics import mean
from typing import ClassVar

from tbac.evaluation.benchmarks.base import Needs, PictureBenchmark, PictureVerdict, Summary
from tbac.evaluation.judges.base import JudgeError
from tbac.evaluation.picture_tree import Target


@dataclass(kw_only=True, eq=False)
class Brightness(PictureBenchmark):
    needs: ClassVar[Needs] = "questions"
    words: list[str]
    title: str = "Brightness"

    def read_files(self):
        if not self.words:
            raise ValueError("benchmark.words must hold at least one word")

    def list_targets(self):
        return [Target(f"{word}.png", word, f"a {word} picture") for word in self.words]

    def find_group(self, target):
        return target.item

    def judge_picture(self, target, picture, judge):
        return PictureVerdict(float(judge.ask("how bright is it?", [picture])))

    def summarize(self, rows, judge_name):
        return Summary({"brightness": mean(row.score or 0 for row in rows)}, f"{len(rows)} words")


class LightMeter:
    slow = False

    def __init__(self, factor):
        self.factor = factor
        self.identity = f"a light meter of factor {factor}"

    def ask(self, question, images):
        if question != "how bright is it?":
            raise JudgeError("it only measures light")
        pixels = images[-1].convert("L").tobytes()
        return str(self.factor * sum(pixels) / len(pixels) / 255)


class NoBenchmark:
    pass


class Unfinished(PictureBenchmark):
    def read_files(self):
        pass

    def list_targets(self):
        return []
"""
BENCHMARK = """
_target_: outside_evaluation.Brightness
name: brightness
words: [dark, bright]
num_inference_steps: 2
"""
OWN = ["--config-dir=own", "benchmark=brightness", "judge=light_meter", "checkpoint=run", "device=cpu"]


@pytest.fixture(autouse=True)
def _outside(in_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module and its YAMLs somewhere on this machine."""
    (tmp_path / "outside_evaluation.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    for file, text in (
        ("benchmark/brightness.yaml", BENCHMARK),
        ("benchmark/nothing.yaml", "_target_: outside_evaluation.NoBenchmark"),
        ("benchmark/unfinished.yaml", "_target_: outside_evaluation.Unfinished\nname: unfinished"),
        ("judge/light_meter.yaml", "_target_: outside_evaluation.LightMeter\nfactor: 0.5"),
    ):
        (tmp_path / "own" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "own" / file).write_text(text)


@pytest.mark.usefixtures("trained_run")
def test_they_are_drawn_judged_and_reported_as_ours_are(capfd: pytest.CaptureFixture[str]) -> None:
    run_to_success("evaluate", capfd, *OWN, "out=one")
    light = [sum(Image.open(f"one/brightness/{word}.png").convert("L").tobytes()) for word in ("dark", "bright")]
    report = json.loads(Path("one/report.json").read_text())
    assert report["brightness"] == pytest.approx(0.5 * sum(light) / 2 / 24 / 24 / 255)
    assert report["protocol"] == "2 words; judge a light meter of factor 0.5"
    assert "# Brightness" in Path("one/report.md").read_text()
    run_to_success("evaluate", capfd, *OWN, "out=one", "judge.factor=1.0", "steps=[score,report]")
    assert json.loads(Path("one/report.json").read_text())["brightness"] == pytest.approx(2 * report["brightness"])


def test_their_mistakes_are_named_as_ours_are(capfd: pytest.CaptureFixture[str]) -> None:
    assert "benchmark.words must hold at least one word" in run_to_message(
        "evaluate", capfd, *OWN, "benchmark.words=[]"
    )
    text = run_to_message("evaluate", capfd, *OWN, "benchmark.num_inference_steps=0")
    assert "benchmark.num_inference_steps must be a whole number of at least 1, got 0" in text
    text = run_to_message("evaluate", capfd, *OWN, "benchmark=geneval")
    assert "GenEval needs a detector, judge=template or judge=mask2former; got LightMeter" in text
    text = run_to_message("evaluate", capfd, *OWN, "benchmark=nothing")
    assert "benchmark._target_=outside_evaluation.NoBenchmark isn't derived from PictureBenchmark" in text
    text = run_to_message("evaluate", capfd, *OWN, "benchmark=unfinished")
    assert "error: the benchmark Unfinished must define judge_picture, needs; see PictureBenchmark" in text
