"""The command that probes layers."""

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers.commands import run_to_message, run_to_success
from tests.helpers.worlds import load_small_model

FEW = ("world=shapes", "captions.count=250", "hydra.run.dir=run")


def test_layers_are_probed_and_taps_recommended(in_world: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = run_to_success("probe", capfd, *FEW, "rules=[final, 'bundle taps.size=2', 'single taps.layer=1']")
    report = json.loads(Path("run/report.json").read_text())
    assert set(report["forecast"]) == {"final", "bundle taps.size=2", "single taps.layer=1"}
    for source in ("queries", "prompt"):
        for concepts in report["accuracy"][source].values():
            assert set(concepts) == {"shape", "color", "count", "relation", "color of the left or upper"}
            assert all(len(values) == 7 for values in concepts.values())
        assert report["recommended"][source]["taps"].startswith("taps=")
    assert report["reads"] == "queries"
    assert f"python experiments/train.py world=shapes {report['recommended']['queries']['taps']}" in text
    with Image.open("run/layers.png") as picture:
        assert min(picture.size) > 300


def test_a_checkpoint_is_probed_by_your_own_captions(
    in_world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    load_small_model(in_world, "ladder.prompt_context=true", "taps=first").save_pretrained(tmp_path / "export")
    rows = [
        f"a {color} circle {i},{'train' if i % 2 else 'seen'},{color}" for i in range(20) for color in ("red", "blue")
    ]
    Path("my.csv").write_text("caption,split,color\n" + "\n".join(rows) + "\n")
    options = ["captions=table", "captions.path=my.csv", f"checkpoint={tmp_path / 'export'}", "rules=[]"]
    run_to_success("probe", capfd, "world=shapes", "hydra.run.dir=run", *options)
    report = json.loads(Path("run/report.json").read_text())
    assert report["captions"] == {"train": 20, "seen": 20, "unseen": 0}
    assert report["reads"] == "prompt"
    assert max(report["accuracy"]["prompt"]["seen"]["color"]) > 0.9


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["rules=[last]"], "last"),
        (["rules=['explicit']"], "taps.layers"),
        (["rules=['single taps.layer=9']"], "tap index 9"),
        (["captions.count=0"], "captions.count"),
        (["captions.count=2"], "needs captions"),
        (["captions=table"], "captions.path"),
        (["captions=table", "captions.path=nowhere.csv"], "nowhere.csv"),
        (["most_layers=0"], "most_layers"),
        (["checkpoint=nowhere"], "nowhere"),
    ],
)
def test_what_can_t_be_probed_is_one_message(
    in_world: Path, capfd: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    assert words in run_to_message("probe", capfd, *FEW[::2], *options)
