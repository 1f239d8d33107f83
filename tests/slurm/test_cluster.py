"""Training on a real SLURM cluster: two nodes on this machine."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest

from experiments.copied_code import CODE
from experiments.studies.faults.local_slurm import (
    OVERRIDES,
    list_missing_programs,
    read_job_state,
    run_cluster,
    start_requeued_job,
    wait_until,
)
from experiments.studies.faults.runs import are_identical
from tbac.models.saved import read_checkpoint
from tests.helpers.configs import ROOT
from tests.helpers.training import assert_runs_close

pytestmark = [
    pytest.mark.xdist_group("slurm"),
    pytest.mark.slow,
    pytest.mark.slurm,
    pytest.mark.skipif(
        bool(list_missing_programs()) or os.getuid() != 0, reason=f"needs root and {', '.join(list_missing_programs())}"
    ),
]
STEPS = 12
# a few batches of the smallest size; the time limit doesn't matter
RUN = [
    "stage=ti2i_pretrain", "stage.previous=null", "debug=few_steps", f"stage.steps={STEPS}", "stage.val_every=6",
    "callbacks=audit", "callbacks.sample_grid.prompts=[]",
]  # fmt: skip
MACHINE = [o for o in OVERRIDES if not o.startswith("machine=")]


@pytest.fixture(scope="module")
def slurm() -> Iterator[Path]:
    with run_cluster(nodes=2) as folder:
        yield folder


def submitted(folder: Path, *overrides: str, logger: str = "csv") -> str:
    """Submit a two-node job as a user does; returns its number."""
    words = [*RUN, f"logger={logger}", *MACHINE, *overrides, f"hydra.run.dir={folder}"]
    arguments = " ".join(f"'{o}'" if "'" not in o else f'"{o}"' for o in words)
    command = ["make", "-s", "stage2", "MACHINE=slurm_2x8", f"ARGS={arguments}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"submitted job (\d+); its log is (.*)", done.stdout)
    assert found, done.stdout
    assert found[2] == str(folder / f"slurm-{found[1]}.log")
    return found[1]


def finished(job: str, folder: Path) -> None:
    """Wait for its end."""
    start_requeued_job(job)
    wait_until(lambda: read_job_state(job) in ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT"))
    assert read_job_state(job) == "COMPLETED", (folder / f"slurm-{job}.log").read_text()


def last(folder: Path) -> dict:
    return read_checkpoint(folder / "checkpoints" / f"ti2i_pretrain-step={STEPS}.ckpt")


def lines(folder: Path, rank: int = 0) -> int:
    file = folder / "sample_log" / f"rank_{rank}.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


@pytest.fixture(scope="module")
def whole(slurm: Path, world_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-node stage that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    os.environ["TBAC_SHAPES"] = str(world_folder)
    job = submitted(folder)
    finished(job, folder)
    return folder


def test_a_stage_runs_on_two_nodes(whole: Path, tmp_path: Path) -> None:
    assert json.loads((whole / "report.json").read_text())["steps"] == STEPS
    assert lines(whole, 0) == lines(whole, 1) == STEPS
    single = [*RUN, "logger=csv", "machine.accelerator=cpu", "stage.batch_size=8", f"hydra.run.dir={tmp_path}"]
    subprocess.run([sys.executable, "-m", "experiments.train", *single], check=True, cwd=ROOT)
    assert_runs_close(last(tmp_path), last(whole))


def test_a_preempted_job_goes_on_in_the_same_run(whole: Path, in_world: Path, tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path}/mlflow.db"
    slow = "+callbacks.fault={_target_:experiments.studies.faults.inject.Slow,seconds:1.0}"
    job = submitted(tmp_path, slow, f"logger.tracking_uri={store}", logger="mlflow")
    wait_until(lambda: lines(tmp_path) >= 3)
    other = subprocess.run(
        ["sbatch", "--parsable", "-p", "high", "-N", "2", "--output=/dev/null", "--wrap", "sleep 3"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    wait_until(lambda: read_job_state(other.stdout.strip()) == "COMPLETED" and read_job_state(job) == "PENDING")
    finished(job, tmp_path)
    text = (tmp_path / f"slurm-{job}.log").read_text()
    assert "stopped by SIGTERM after step" in text
    assert "going on from" in text
    for part in ("state_dict", "current_model_state", "optimizer_states", "lr_schedulers"):
        assert are_identical(last(tmp_path)[part], last(whole)[part]), part
    for rank in (0, 1):
        own, reference = (_keys(f, rank) for f in (tmp_path, whole))
        assert own == reference
    client = mlflow.MlflowClient(store)
    (experiment,) = [e for e in client.search_experiments() if e.name == "tbac"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert [m.step for m in client.get_metric_history(run.info.run_id, "val/loss")] == [0, 5, 11]


def test_a_cancelled_job_saves_and_stays_cancelled(slurm: Path, in_world: Path, tmp_path: Path) -> None:
    slow = "+callbacks.fault={_target_:experiments.studies.faults.inject.Slow,seconds:0.7}"
    job = submitted(tmp_path, slow)
    wait_until(lambda: lines(tmp_path) >= 3)
    subprocess.run(["scancel", job], check=True)
    wait_until(lambda: "stopped by SIGTERM after step" in (tmp_path / f"slurm-{job}.log").read_text())
    wait_until(lambda: read_job_state(job) == "CANCELLED")
    time.sleep(3)
    assert read_job_state(job) == "CANCELLED"
    assert "back in its queue" not in (tmp_path / f"slurm-{job}.log").read_text()


def test_a_job_near_its_time_limit_goes_back_into_the_queue(whole: Path, in_world: Path, tmp_path: Path) -> None:
    slow = "+callbacks.fault={_target_:experiments.studies.faults.inject.Slow,seconds:0.7}"
    job = submitted(tmp_path, slow)
    wait_until(lambda: lines(tmp_path) >= 3)
    subprocess.run(["scancel", "--signal=USR1", job], check=True)  # what sbatch --signal sends ahead of the limit
    wait_until(lambda: read_job_state(job) == "PENDING")
    finished(job, tmp_path)
    text = (tmp_path / f"slurm-{job}.log").read_text()
    assert "stopped by SIGUSR1 after step" in text
    assert f"SLURM job {job} is back in its queue" in text
    assert are_identical(last(tmp_path)["state_dict"], last(whole)["state_dict"])


def test_a_sweep_submits_a_job_per_point(slurm: Path, in_world: Path, tmp_path: Path) -> None:
    machine = ["machine=slurm_2x8", *MACHINE]
    points = ["taps=last_n,final", f"hydra.sweep.dir={tmp_path}", "stage.steps=2"]
    done = subprocess.run(
        [sys.executable, "experiments/train.py", "-m", *RUN, *machine, "logger=csv", *points],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = list(tmp_path.glob("*/checkpoints/ti2i_pretrain-step=2.ckpt"))
    taps = {tuple(read_checkpoint(file)["tbac"]["config"]["model"]["taps"]["layers"]) for file in found}
    assert taps == {(2, 3, 4, 5), (6,)}
    jobs = {re.sub(r"_\d+_(log|result).*", "", f.name) for f in tmp_path.glob(".submitit/*/*_result.pkl")}
    assert len(jobs) == 2


def test_a_point_of_a_sweep_near_its_time_limit_goes_back_into_the_queue(
    whole: Path, in_world: Path, tmp_path: Path
) -> None:
    slow = "+callbacks.fault={_target_:experiments.studies.faults.inject.Slow,seconds:0.7}"
    folder = tmp_path / "point"
    options = [*RUN, "machine=slurm_2x8", *MACHINE, "logger=csv", slow, f"hydra.sweep.dir={tmp_path}"]
    sweep = subprocess.Popen(
        [sys.executable, "experiments/train.py", "-m", *options, "hydra.sweep.subdir=point"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    wait_until(lambda: lines(folder) >= 3)
    job = subprocess.run(["squeue", "-h", "-o", "%A"], capture_output=True, text=True, check=True).stdout.strip()
    subprocess.run(["scancel", "--signal=USR1", job], check=True)
    wait_until(lambda: read_job_state(job) == "PENDING")
    start_requeued_job(job)
    text, _ = sweep.communicate(timeout=300)
    assert sweep.returncode == 0, text
    assert are_identical(last(folder)["state_dict"], last(whole)["state_dict"])


def test_stages_are_jobs_that_follow_each_other(slurm: Path, in_world: Path, tmp_path: Path) -> None:
    few = ["debug=few_steps", "stage.steps=2", "callbacks.sample_grid.prompts=[]", "logger=csv"]
    words = [*few, *MACHINE, f"hydra.run.dir={tmp_path}/chain"]
    arguments = " ".join(f"'{o}'" if "'" not in o else f'"{o}"' for o in words)
    command = ["make", "-s", "stages", "MACHINE=slurm_2x8", f"ARGS={arguments}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    jobs = re.findall(r"submitted job (\d+)", done.stdout)
    assert len(jobs) == 3
    assert read_job_state(jobs[2]) == "PENDING"
    stages = ("t2i_pretrain", "ti2i_pretrain", "finetune")
    for job, stage in zip(jobs, stages, strict=True):
        finished(job, tmp_path / "chain" / stage)
    for before, stage in itertools.pairwise(stages):
        text = next((tmp_path / "chain" / stage).glob("slurm-*.log")).read_text()
        assert f"starting from the weights of {tmp_path}/chain/{before}\n" in text


def copy_repository(place: Path) -> Path:
    """Copy what a user has cloned; it is edited while jobs wait or run."""
    for name in CODE:
        shutil.copytree(ROOT / name, place / "repository" / name, ignore=shutil.ignore_patterns("__pycache__", "*.png"))
    return place / "repository"


def edit_code(repository: Path) -> None:
    """Edit code and configs so that a job which reads them ends."""
    for file in ("tbac/training/module.py", "experiments/train.py", "experiments/slurm.py", "tbac/app/command.py"):
        (repository / file).write_text("raise SystemExit('this was edited after the job was submitted')\n")
    (repository / "conf" / "stage" / "ti2i_pretrain.yaml").write_text("steps: nonsense\n")


def test_a_requeue_after_an_edit_runs_the_code_of_before(
    slurm: Path, in_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = copy_repository(tmp_path)
    folder = tmp_path / "run"
    slow = "+callbacks.fault={_target_:experiments.studies.faults.inject.Slow,seconds:0.7}"
    words = [*RUN, "logger=csv", "machine=slurm_2x8", *MACHINE, slow, f"hydra.run.dir={folder}"]
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    done = subprocess.run(
        [sys.executable, "experiments/train.py", *words],
        cwd=repository,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    job = re.findall(r"submitted job (\d+)", done.stdout)[0]
    wait_until(lambda: lines(folder) >= 3)
    edit_code(repository)
    subprocess.run(["scancel", "--signal=USR1", job], check=True)
    wait_until(lambda: read_job_state(job) == "PENDING")
    finished(job, folder)
    text = (folder / f"slurm-{job}.log").read_text()
    assert "going on from" in text
    assert "this was edited" not in text
    assert (folder / "checkpoints" / f"ti2i_pretrain-step={STEPS}.ckpt").is_file()


def test_a_sweep_is_an_array_of_few_at_once_of_one_code_and_a_failing_point_is_one(
    slurm: Path, in_world: Path, tmp_path: Path
) -> None:
    repository, sweep, log = copy_repository(tmp_path), tmp_path / "sweep", tmp_path / "log"
    machine = ["machine=slurm_2x8", *MACHINE, "machine.slurm.points_at_once=1"]
    quick = ["stage.steps=4", "callbacks.guard.max_rejects=1", "callbacks.guard.over=1", "logger=csv"]
    points = ["stage.lr=1e-3,1e38,2e-3,-1", f"hydra.sweep.dir={sweep}"]
    with log.open("w") as file:
        multirun = subprocess.Popen(
            [sys.executable, "experiments/train.py", "-m", *RUN, *machine, *quick, *points],
            cwd=repository, env={**os.environ, "PYTHONPATH": str(repository)}, stdout=file, stderr=file,
        )  # fmt: skip
    # The code changes while the first point trains and the others wait.
    wait_until(lambda: bool(list(sweep.glob("*/sample_log/rank_0.jsonl"))))
    edit_code(repository)
    status, text = multirun.wait(500), log.read_text()
    assert status == 1, text
    assert "this was edited" not in text
    assert "2 of 4 points finished; these failed" in text
    assert "steps were rejected" in text
    assert len(list(sweep.glob("*/report.json"))) == 2
    # What can't be trained at all isn't submitted.
    assert "stage.lr must be positive, got -1" in text
    (script,) = sweep.glob(".submitit/*/*_submission.sh")
    assert "#SBATCH --array=0-2%1" in script.read_text()


def _keys(folder: Path, rank: int) -> list[list[str]]:
    """Keys by position; where a position comes twice, the later line counts."""
    found = map(json.loads, (folder / "sample_log" / f"rank_{rank}.jsonl").read_text().splitlines())
    return [keys for _, keys in sorted({line["positions"][0]: line["keys"] for line in found}.items())]
