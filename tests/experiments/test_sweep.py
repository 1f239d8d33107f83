"""A committed sweep: trained, scored, reported, and gone on with."""

import json
from pathlib import Path
from statistics import stdev

import mlflow
import pytest
from omegaconf import DictConfig
from PIL import Image
from scipy.stats import t as student
from scipy.stats import ttest_rel

from experiments.sweeps import plots
from experiments.sweeps.losses import describe_losses
from experiments.sweeps.pairs import Comparison, compare_points, tabulate_comparisons
from experiments.sweeps.points import Point, read_choices, read_points
from experiments.sweeps.report import describe_spread, group_points, tabulate, tabulate_suites
from experiments.sweeps.score import open_data
from tbac.app import to_plain
from tbac.data.datamodule import ShardDataModule
from tests.helpers.commands import run_app
from tests.helpers.configs import ROOT, compose_config

SWEEPS = sorted(f.stem for f in (ROOT / "conf" / "sweep").glob("*.yaml"))
FEW = ["stage.steps=2", "stage.warmup_steps=0", "stage.val_every=1", "stage.val_samples=8", "stage.batch_size=4"]


def point(taps: str, seed: int, overall: float, loss: float = 0.1, **choices: str) -> Point:
    scores = {
        "geneval": {"overall": overall, "counting": overall / 2}, "loss": loss, "layers": [1, 2], "mix": None,
        "without": {"1": loss + 0.1, "2": loss + 0.2}, "suites": {},
    }  # fmt: skip
    return Point(Path(f"{taps}{seed}"), {"taps": taps, "seed": str(seed), **choices}, {"steps": 1}, scores)


@pytest.mark.parametrize("name", SWEEPS)
def test_every_sweep_names_its_command_and_varies_something(name: str) -> None:
    first = (ROOT / "conf" / "sweep" / f"{name}.yaml").read_text().splitlines()[1]
    assert f"make sweep SWEEP={name} " in first
    assert len(read_choices(name)) > 1


def test_an_unknown_sweep_is_named() -> None:
    with pytest.raises(ValueError, match=r"name=nothing isn't a sweep; conf/sweep/ has .*taps_x_lr"):
        read_choices("nothing")


def test_points_that_differ_in_the_seed_are_one_row_and_the_best_comes_first() -> None:
    points = [point("final", 0, 0.2), point("last_n", 1, 0.6), point("last_n", 0, 0.4), point("final", 1, 0.2)]
    groups = group_points(points)
    assert {name: [p.seed for p in found] for name, found in groups.items()} == {
        "taps=last_n": [0, 1],
        "taps=final": [0, 1],
    }
    assert list(groups) == ["taps=last_n", "taps=final"]
    row = tabulate(groups).splitlines()[2]
    assert row == "| taps=last_n | 1 2 | 2 | 0.500 ± 0.141 | 0.1000 ± 0.0000 | 0.25 |"


def test_rules_are_compared_with_the_final_state_seed_by_seed() -> None:
    points = [point("final", s, 0.2, 0.2, lr="1") for s in (0, 1, 2)] + [point("last_n", 0, 0.5, 0.1, lr="1")]
    points += [point("last_n", 1, 0.1, 0.4, lr="1"), point("last_n", 2, 0.3, 0.1, lr="2")]
    (score,) = compare_points(points, "taps", "final", "overall")
    assert score.differences == pytest.approx([0.3, -0.1])
    # The trusted reference: scipy's own interval of a paired test.
    interval = ttest_rel([0.5, 0.1], [0.2, 0.2]).confidence_interval(0.95)
    assert score.interval == pytest.approx((interval.low, interval.high))
    text = tabulate_comparisons(points)
    assert "| `last_n` | GenEval rules, overall | 2 | +0.1000 | -2.4412 to +2.6412 | 1 of 2 | open |" in text
    assert "| `last_n` | validation loss | 2 | +0.0500 |" in text
    assert tabulate_comparisons([point("uniform", 0, 0.1)]) == ""
    assert "one pair tells nothing" in tabulate_comparisons(points[:1] + points[3:4])


def test_a_plain_multirun_ends_with_its_losses_and_their_pairs() -> None:
    def trained(taps: str, seed: int, loss: float | None) -> Point:
        return Point(Path(f"{taps}{seed}"), {"taps": taps, "seed": str(seed)}, {"steps": 9, "val_loss_last": loss})

    points = [trained("last_n", seed, 0.30 + seed / 100) for seed in range(3)]
    points += [trained("final", seed, 0.20 + seed / 50) for seed in range(3)]
    points += [trained("uniform", 0, None)]  # it had no validation
    losses, pairs = describe_losses(points)
    assert losses.splitlines()[2:] == [
        "| taps=final | 3 | 0.2200 ± 0.0200 |",
        "| taps=last_n | 3 | 0.3100 ± 0.0100 |",
    ]
    interval = ttest_rel([0.30, 0.31, 0.32], [0.20, 0.22, 0.24]).confidence_interval(0.95)
    row = f"| `last_n` | validation loss | 3 | +0.0900 | {interval.low:+.4f} to {interval.high:+.4f} | 0 of 3 | worse |"
    assert row in pairs
    assert describe_losses(points[:3]) == [losses.replace("| taps=final | 3 | 0.2200 ± 0.0200 |\n", "")]
    assert describe_losses([]) == []


def test_a_difference_clear_of_0_is_found_on_its_side_and_seeds_are_counted() -> None:
    gains = (0.10, 0.12, 0.09)
    points = [point("final", s, 0.2, 0.2) for s in range(3)]
    points += [point("uniform", s, 0.2 + gain, 0.2 + gain) for s, gain in enumerate(gains)]
    rows = {line.split(" | ")[1]: line for line in tabulate_comparisons(points).splitlines() if "`uniform`" in line}
    assert "| better |" in rows["GenEval rules, overall"]
    assert "| worse |" in rows["validation loss"]
    comparison = Comparison("x", gains)
    needed = comparison.count_seeds(0.02)
    assert needed is not None
    # With so many pairs of the same spread the interval's half is 0.02 or less, and with one less it is longer.
    for count, narrow in ((needed, True), (needed - 1, False)):
        half = student.ppf(0.975, count - 1) * stdev(gains) / count**0.5
        assert (half <= 0.02) == narrow
    assert Comparison("x", (0.1,)).count_seeds(0.02) is None
    assert Comparison("x", (1.0, -9.0)).count_seeds(1e-9) is None


def test_further_suites_have_a_table_of_their_own() -> None:
    points = [point("final", s, 0.2) for s in (0, 1)]
    assert tabulate_suites(group_points(points)) == ""
    for number, p in enumerate(points):
        p.scores["suites"] = {"edits: score": 0.5 + number / 10, "dpg: overall": 40.0 + 20 * number}
    assert tabulate_suites(group_points(points)).splitlines()[2] == "| taps=final | 0.550 ± 0.071 | 50.0 ± 14.1 |"


def test_a_single_seed_has_no_spread() -> None:
    assert describe_spread([0.5]) == "0.500"


def test_a_metric_that_no_run_has_is_not_drawn(tmp_path: Path) -> None:
    assert not plots.draw_curves({"a": [{}]}, "val/loss", "loss", tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_a_checkpoint_s_data_are_opened_by_our_own_class_whatever_it_names(in_world: Path) -> None:
    config = to_plain(compose_config("train", "run_dir=.", "world=shapes"))
    config["data"] |= {"_target_": "pathlib.Path.write_text", "_args_": ["trace", "executed"]}
    config["data"]["dropout"] |= {"_target_": "os.system", "_args_": ["touch trace"]}
    assert type(open_data(config)) is ShardDataModule
    config["data"]["sources"] = [{"_target_": "os.system", "_args_": ["touch trace"]}]
    with pytest.raises(ValueError, match=r"os\.system"):
        open_data(config)
    assert not Path("trace").exists()


def test_what_a_run_folder_says_of_its_overrides_is_read_as_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "hidden")
    (tmp_path / "run" / ".hydra").mkdir(parents=True)
    (tmp_path / "run" / ".hydra" / "overrides.yaml").write_text("- taps=${oc.env:SECRET}\n- seed=1\n")
    (tmp_path / "run" / "report.json").write_text('{"name": "finetune", "steps": 1, "checkpoint": "x.ckpt"}')
    (found,) = read_points(tmp_path, ["taps", "seed"])
    assert found.choices == {"taps": "${oc.env:SECRET}", "seed": "1"}


@pytest.mark.usefixtures("in_world")
def test_a_sweep_trains_scores_and_reports_itself_and_goes_on(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    overrides = [*FEW, "taps=last_n,learned_mix", "seed=1", "callbacks.guard.log_every=1"]
    arguments = [
        "name=layer_selection_mini",
        f"out={tmp_path}/sweep",
        f"tracking_uri='sqlite:///{tmp_path}/mlflow.db'",
        "geneval.num_inference_steps=2",
        "overrides=[" + ",".join(f"'{o}'" for o in overrides) + "]",
    ]
    status, text = run_app("sweep", capfd, *arguments)
    assert status == 0, text
    out = tmp_path / "sweep"
    report = (out / "report.md").read_text()
    assert "2 of 12 points are finished, 2 steps of t2i_pretrain each" in report
    for name in ("scores", "tags", "loss", "mix", "tap_norms", "ablation", "grid"):
        assert Image.open(out / f"{name}.png").width > 100
        assert f"({name}.png)" in report
    found = json.loads((out / "report.json").read_text())
    choices = {(p["choices"]["taps"], p["choices"]["seed"]) for p in found}
    assert choices == {("last_n", "1"), ("learned_mix", "1")}
    assert all(p["scores"]["without"] for p in found)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "tbac"]
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [r for r in runs if r.info.run_name == "layer_selection_mini"]
    children = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == 2

    checkpoints = {f: f.stat().st_mtime_ns for f in out.glob("*/checkpoints/*.ckpt") if not f.is_symlink()}
    lost = next(out.glob("*taps=last_n*"))
    (lost / "report.json").unlink()  # as if this point had been killed before its end
    status, text = run_app("sweep", capfd, *arguments)
    assert status == 0, text
    assert {f: f.stat().st_mtime_ns for f in checkpoints} == checkpoints
    assert (lost / "report.json").is_file()
    assert len(client.search_runs([experiment.experiment_id])) == 3


def test_a_sweep_on_a_fresh_clone_begins_with_the_world(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TBAC_SHAPES", "absent")
    built: list[str] = []

    def build(cfg: DictConfig) -> None:
        built.append(cfg.out)
        raise ValueError("enough")

    monkeypatch.setattr("data_prep.shapes.parts.build_world", build)
    status, text = run_app("sweep", capfd, "name=layer_selection_mini", "out=sweep")
    assert status == 1
    assert "enough" in text
    assert built == ["absent"]


@pytest.mark.slow
@pytest.mark.usefixtures("in_world")
def test_options_of_the_model_are_swept_over_two_stages_with_further_suites(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    few = json.dumps(FEW)
    stages = [f"stage_overrides.{stage}={few}" for stage in ("t2i_pretrain", "ti2i_pretrain")]
    overrides = [*stages, "experiment=as_released,references", "seed=0"]
    arguments = [
        "name=weaknesses",
        f"out={tmp_path}/sweep",
        f"tracking_uri='sqlite:///{tmp_path}/mlflow.db'",
        "geneval.num_inference_steps=2",
        "edits.num_inference_steps=2",
        "suites=[edits,tiif]",
        "overrides=[" + ",".join(f"'{o}'" for o in overrides) + "]",
    ]
    status, text = run_app("sweep", capfd, *arguments)
    assert status == 0, text
    report = (tmp_path / "sweep" / "report.md").read_text()
    assert "2 of 12 points are finished, 2 steps of t2i_pretrain and 2 steps of ti2i_pretrain each" in report
    assert "| point | edits: score | edits: happened | edits: kept | tiif: overall, short |" in report
    assert "| experiment=references | 0." in report
    found = json.loads((tmp_path / "sweep" / "report.json").read_text())
    assert all("edits: kept" in point["scores"]["suites"] for point in found)
    status, text = run_app("sweep", capfd, *arguments, "suites=[faces]")
    assert status == 1
    assert "suites=['faces'] must be some of answers, corebench, dpg, edits" in text


@pytest.mark.usefixtures("in_world")
def test_an_option_that_no_point_has_is_one_message(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    store = f"tracking_uri='sqlite:///{tmp_path}/mlflow.db'"
    status, text = run_app("sweep", capfd, "name=taps_x_lr", "overrides=[foo=1]", f"out={tmp_path}/sweep", store)
    assert status == 1
    assert "foo isn't an option of this command" in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("sweep", "suites"),
    [
        ("ladder", ["words_unseen", "words_compositions", "words_distractors", "words_riddles", "words_dense"]),
        ("ladder_edits", ["words_edits", "words_edits_unseen", "words_unseen"]),
        ("taps_x_lr", []),
    ],
)
def test_a_sweep_is_scored_by_what_it_trains(
    sweep: str, suites: list[str], in_world: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from experiments import sweep as app

    asked: list[list[str]] = []

    def stop(cfg: DictConfig, mllm: Path) -> None:
        asked.append(list(cfg.suites))
        raise ValueError("no point is trained here")

    monkeypatch.setattr(app, "build_world_if_missing", stop)
    monkeypatch.setattr("sys.argv", ["sweep.py", f"name={sweep}", "out=x"])
    with pytest.raises(SystemExit):
        app.main()
    assert "no point is trained here" in capfd.readouterr().err
    assert asked == [suites]
