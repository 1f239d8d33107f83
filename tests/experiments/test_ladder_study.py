"""The record of the study of the ladder, and what it says of it."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import bootstrap

from experiments.studies.ladder.run import Measured, collect_points, compare, compute_interval
from tbac.files import ForeignFileError
from tests.helpers.configs import compose_config

UNSEEN, EDITS = "words_unseen", "words_edits"


def measured(arm: str, seed: int, score: float, stage: str = "t2i_pretrain", name: str = UNSEEN) -> Measured:
    return Measured(arm, stage, seed, 10, 0.2, {name: score})


def write_point(sweep: Path, arm: str, seed: int, unseen: float) -> None:
    """Write what training and scoring leave of a point."""
    folder = sweep / f"experiment=ladder_{arm},seed={seed}"
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(f"- experiment=ladder/{arm}\n- seed={seed}\n- sweep=ladder\n")
    report = {"name": "t2i_pretrain", "steps": 10, "checkpoint": "checkpoints/last.ckpt"}
    (folder / "report.json").write_text(json.dumps(report))
    scores = {"geneval": {"overall": 0.5}, "loss": 0.25, "suites": {"words_unseen: overall": unseen}, "mix": None}
    (folder / "scores.json").write_text(json.dumps(scores))


def test_points_of_several_sittings_come_together(tmp_path: Path) -> None:
    sweep, record = tmp_path / "sweep", tmp_path / "points.json"
    cfg = compose_config("study/ladder", f"sweeps=[{sweep},{tmp_path / 'none'}]", f"record={record}")
    write_point(sweep, "final", 0, 0.25)
    (first,) = collect_points(cfg)
    assert first == Measured("final", "t2i_pretrain", 0, 10, 0.25, {"words_seen": 0.5, UNSEEN: 0.25})
    # Another sitting has another folder; what the record holds stays.
    (tmp_path / "sweep").rename(tmp_path / "gone")
    write_point(sweep, "mix_normed", 0, 0.75)
    assert collect_points(cfg) == [
        first,
        Measured("mix_normed", "t2i_pretrain", 0, 10, 0.25, {"words_seen": 0.5, UNSEEN: 0.75}),
    ]
    assert collect_points(cfg) == collect_points(cfg)


@pytest.mark.parametrize("text", ["", "[{", "{}", '[{"arm": 1}]', '[["final"]]'])
def test_a_record_that_cannot_be_read_is_named_and_left_alone(tmp_path: Path, text: str) -> None:
    record = tmp_path / "points.json"
    record.write_text(text)
    with pytest.raises(ForeignFileError, match=r"points\.json"):
        collect_points(compose_config("study/ladder", f"sweeps=[{tmp_path}]", f"record={record}"))
    assert record.read_text() == text


def test_the_interval_is_that_of_a_percentile_bootstrap() -> None:
    differences = [0.03, -0.01, 0.04, 0.02, 0.05, -0.02]
    reference = bootstrap((differences,), np.mean, n_resamples=20000, method="percentile", rng=1).confidence_interval
    low, high = compute_interval(differences, 20000)
    assert (low, high) == pytest.approx((reference.low, reference.high), abs=6e-4)


def test_only_six_pairs_are_called_and_the_others_keep_their_interval() -> None:
    cfg = compose_config("study/ladder")
    points = [measured("final", seed, 0.2 + seed / 100) for seed in range(6)]
    points += [measured("mix_normed", seed, 0.3 + seed / 100) for seed in range(6)]
    points += [measured("last_n_raw", seed, 0.1 + seed / 100) for seed in range(6)]
    points += [measured("probed", seed, 0.2 + seed / 100 + (-1) ** seed / 10) for seed in range(6)]
    points += [measured("attend_normed", seed, 0.3 + seed / 100) for seed in range(3)]
    points += [measured("penultimate", 9, 0.3)]  # no pair has its seed
    table = compare(points, cfg)["unseen words"]
    rows = {line.split(" | ")[0].lstrip("| "): line for line in table.splitlines()}
    assert "| 6 | 0.325 | +0.100 | +0.100 to +0.100 | beats it |" in rows["mix_normed"]
    assert rows["last_n_raw"].endswith("| worse |")
    assert rows["probed"].endswith("| open |")
    assert "| 3 | 0.310 | +0.100 | +0.100 to +0.100 |  |" in rows["attend_normed"]
    assert rows["final"].endswith("| 6 | 0.225 |  |  |  |")
    assert rows["penultimate"].endswith("| 1 | 0.300 |  |  |  |")


def test_each_score_is_compared_after_its_own_stage() -> None:
    cfg = compose_config("study/ladder")
    points = [
        measured(arm, 0, score, "ti2i_pretrain", name)
        for arm, score in (("final", 0.1), ("probed", 0.4))
        for name in (EDITS,)
    ]
    tables = compare([*points, measured("probed", 0, 0.9, "ti2i_pretrain", UNSEEN)], cfg)
    assert list(tables) == ["edits"]
    assert "+0.300" in tables["edits"]
