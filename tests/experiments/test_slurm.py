"""SLURM jobs: what is asked for, and what is refused."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from experiments.copied_code import CODE, copy_code, export_path
from tbac.app import quote
from tests.helpers.commands import run_app, run_to_message, run_to_success
from tests.helpers.configs import ROOT

pytestmark = pytest.mark.usefixtures("in_world")


def put_on_path(monkeypatch: pytest.MonkeyPatch, folder: Path, **programs: str) -> None:
    """Programs of these names and shell texts come before all others."""
    folder.mkdir()
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_a_job_asks_for_what_the_machine_says(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    put_on_path(monkeypatch, tmp_path / "bin", srun="", sbatch="echo Submitted batch job 7")
    overrides = ["machine.slurm.account=me", "machine.slurm.setup=[module load cuda]", "machine.slurm.mem_gb=64"]
    overrides += ["machine.slurm.container='apptainer exec image.sif'", "+machine.slurm.options.reservation=r"]
    run = tmp_path / "run"
    status, text = run_app("train", capfd, "world=shapes", "machine=slurm_2x8", *overrides, f"hydra.run.dir={run}")
    assert status == 0, text
    assert f"submitted job 7; its log is {run}/slurm-7.log" in text
    lines = (run / ".submitit" / "7_submission.sh").read_text().splitlines()
    assert lines[0] == "#!/bin/bash"
    expected = {
        "requeue", "job-name=tbac-t2i_pretrain", "nodes=2", "ntasks-per-node=8", "cpus-per-task=12", "gres=gpu:8",
        "mem=64GB", "account=me", "time=1440", "signal=USR1@180", f"output={run}/slurm-%j.log", "open-mode=append",
        "reservation=r", "wckey=submitit",
    }  # fmt: skip
    assert {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")} == expected
    (command,) = (line for line in lines if line.startswith("srun "))
    (path,) = (line for line in lines if "export PYTHONPATH=" in line)
    (code,) = (run / ".code").iterdir()
    assert path == export_path(code)
    assert lines.index("module load cuda") < lines.index(path) < lines.index(command)
    for words in ("squeue --jobs=7", f"tail -F {run}/slurm-7.log", "scancel 7"):
        assert words in text
    options, python = command.split(" apptainer exec image.sif ")
    assert {"--kill-on-bad-exit=1", "--open-mode=append", "--cpus-per-task=12"} < set(options.split())
    assert options.rpartition("--output ")[2].startswith(f"{run}/slurm-%j.log")
    assert "-m submitit.core._submit" in python


def test_a_cluster_without_sbatch_is_said(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    status, text = run_app("train", capfd, "world=shapes", "machine=slurm_2x8")
    assert status == 1
    assert "its programs aren't here" in text


def test_what_slurm_refuses_is_said(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    refusal = "echo 'invalid partition specified: x' >&2\nexit 1"
    put_on_path(monkeypatch, tmp_path / "bin", srun="", sbatch=refusal)
    status, text = run_app("train", capfd, "world=shapes", "machine=slurm_2x8", "hydra.run.dir=run")
    assert status == 1
    assert "sbatch refused" in text
    assert "invalid partition specified: x" in text
    (script,) = Path("run/.submitit").glob("*.sh")
    assert "srun" in script.read_text()


WRONG = {
    "stage.sources=[{path: absent}]": "shard folder absent doesn't exist",
    "taps=explicit taps.layers=[99,1,2,3]": "99",
    "stage.image_size=25": "25",
    "stage.min_lr=1": "min_lr",
    "init=absent": "absent",
    "machine.slurm.gpu_memory_gb=0.01": "GB on each GPU, and machine.slurm.gpu_memory_gb is 0.01",
    "machine.devices=auto": "machine.devices=auto must be a whole number of at least 1 on a cluster",
    "machine.devices=-1": "machine.devices=-1 must be a whole number of at least 1 on a cluster",
    "machine.slurm.minutes=3": "signal_seconds=180 must be less than the job's time, machine.slurm.minutes=3",
    "machine.slurm.gres=gpu:h100:4": "machine.slurm.gres=gpu:h100:4 gives a node fewer GPUs than machine.devices=8 use",
    "hydra.run.dir=50%j": "50%j has a % in its name, which SLURM replaces in the names of logs",
    "stage=ti2i_pretrain": "starts from a checkpoint of t2i_pretrain, and there is none",
}


@pytest.mark.parametrize("overrides", WRONG)
def test_what_is_wrong_never_reaches_sbatch(
    overrides: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    put_on_path(monkeypatch, tmp_path / "bin", srun="", sbatch=f"touch {tmp_path}/reached; echo Submitted batch job 7")
    words = overrides.split(" taps.") if "taps=explicit" in overrides else [overrides]
    words = [words[0], *(f"taps.{word}" for word in words[1:])]
    text = run_to_message("train", capfd, "world=shapes", "machine=slurm_2x8", *words)
    assert WRONG[overrides] in text
    assert not (tmp_path / "reached").exists()


def test_stages_are_jobs_that_follow_each_other_or_one(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    count = f"echo x >> {tmp_path}/count; echo Submitted batch job $(wc -l < {tmp_path}/count)"
    put_on_path(monkeypatch, tmp_path / "bin", srun="", sbatch=count)
    stages = ["stages=[t2i_pretrain,ti2i_pretrain]", "stage_overrides.ti2i_pretrain=[stage.lr=5e-4]", "seed=5"]
    common = ["world=shapes", "machine=slurm_2x8", *stages]
    text = run_to_success("train", capfd, *common, "hydra.run.dir=chained")
    files = {1: "chained/t2i_pretrain/.submitit/1_submission.sh", 2: "chained/ti2i_pretrain/.submitit/2_submission.sh"}
    scripts = {number: Path(file).read_text() for number, file in files.items()}
    assert "dependency" not in scripts[1]
    assert {"#SBATCH --dependency=afterok:1", "#SBATCH --kill-on-invalid-dep=yes"} <= set(scripts[2].splitlines())
    assert "squeue --jobs=1,2" in text
    assert "scancel 1 2" in text
    # Printed, the second one says what its processes run.
    shown = run_to_success("train", capfd, *common, "submit=false", "hydra.run.dir=shown")
    line = [line for line in shown.splitlines() if line.startswith("# each process runs: ")][1]
    words = shlex.split(line.removeprefix("# each process runs: "))
    wanted = {"stage=ti2i_pretrain", "stage.lr=5e-4", "seed=5", f"init={tmp_path}/shown/t2i_pretrain"}
    assert wanted < set(words)
    assert not [word for word in words if word.startswith(("stages=", "stage_overrides", "submit"))]
    assert shown.count("#SBATCH --nodes=2") == 2
    assert not Path("shown/.hydra").exists()
    assert not list(Path("shown").glob("**/.submitit"))
    run_to_success("train", capfd, *common, "machine.slurm.chain=false", "hydra.run.dir=one")
    assert [file.name for file in Path("one/.submitit").glob("*_submission.sh")] == ["3_submission.sh"]


def test_a_stage_that_goes_on_is_no_chain_of_jobs(
    trained_run: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    put_on_path(monkeypatch, tmp_path / "bin", srun="", sbatch=f"touch {tmp_path}/reached; echo Submitted batch job 7")
    stages = ["stages=[t2i_pretrain,ti2i_pretrain]", f"resume={trained_run}"]
    text = run_to_message("train", capfd, "world=shapes", "machine=slurm_2x8", *stages)
    assert "is of one stage, and each of stages=[t2i_pretrain, ti2i_pretrain] is a job of its own" in text
    assert not (tmp_path / "reached").exists()


def test_a_printed_script_reads_a_folder_with_spaces_as_one(capfd: pytest.CaptureFixture[str]) -> None:
    text = run_to_success("train", capfd, "world=shapes", "machine=slurm_2x8", "submit=false", "hydra.run.dir='a b'")
    (output,) = (line for line in text.splitlines() if line.startswith("#SBATCH --output="))
    assert shlex.split(output, comments=False)[1] == f"--output={Path.cwd()}/a b/slurm-%j.log"
    (srun,) = (line for line in text.splitlines() if line.startswith("srun "))
    assert f"{Path.cwd()}/a b/slurm-%j.log" in shlex.split(srun)


@pytest.mark.parametrize("printed", ["77", ""])
def test_what_sbatch_prints_without_a_number_is_said(
    printed: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    put_on_path(monkeypatch, tmp_path / "bin", srun="", sbatch=f"echo '{printed}'")
    text = run_to_message("train", capfd, "world=shapes", "machine=slurm_2x8")
    assert "squeue --me says whether it waits" in text


def test_a_job_s_code_is_a_copy_that_says_which_it_is(tmp_path: Path) -> None:
    from tbac.training.run_facts import REVISION, read_git_revision

    first, copy = copy_code(tmp_path), copy_code(tmp_path)
    assert first != copy  # jobs of an earlier submission may still wait for theirs
    assert (first / REVISION).is_file()
    assert (copy / REVISION).read_text().strip() == read_git_revision()
    assert {entry.name for entry in copy.iterdir()} == {*CODE, REVISION}
    run = "import tbac.app, tbac.training.run_facts as f; print(tbac.app.CONF); print(f.read_git_revision())"
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", run], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == [str(copy / "conf"), read_git_revision()], done.stderr


def test_a_multirun_begins_again_from_a_copy_of_the_code_and_tells_its_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from experiments import cluster_multirun

    started: list[tuple[str, list[str], dict[str, str]]] = []
    monkeypatch.setattr(cluster_multirun.os, "execve", lambda *given: started.append(given))
    monkeypatch.setattr(sys, "argv", ["experiments/train.py", "-m", "seed=1,2"])
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    sweep = tmp_path / "my sweep"
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        options = [f"hydra.sweep.dir='{sweep}'", "machine=slurm", "run_dir=."]
        cfg = compose("train", options, return_hydra_config=True)
    callback = cluster_multirun.ClusterMultirun()
    for _ in range(2):  # a second start doesn't write over the copy of the first, whose jobs may still wait
        callback.on_multirun_start(cfg)
    assert len(set(sweep.glob(".code/*"))) == 2
    _, command, environment = started[0]
    code = Path(command[1]).parents[1]
    assert code.parent == sweep / ".code"
    assert (code / "conf" / "train.yaml").is_file()
    assert command[2:] == ["-m", "seed=1,2", f"hydra.sweep.dir={quote(str(sweep))}"]
    assert environment["PYTHONPATH"] == f"{code}:/elsewhere"
    # In the copy its jobs get the path; a shell reads the line as it is meant.
    monkeypatch.setattr(cluster_multirun, "ROOT", code)
    callback.on_multirun_start(cfg)
    assert len(started) == 2
    (line,) = cfg.hydra.launcher.setup
    for before, after in (("/elsewhere", f"{code}:/elsewhere"), ("", str(code))):
        shell = subprocess.run(
            ["bash", "-c", f'{line}; echo "$PYTHONPATH"'],
            env={**os.environ, "PYTHONPATH": before}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert shell.stdout == f"{after}\n"
    cfg.machine.slurm.copy_code = False
    monkeypatch.setattr(cluster_multirun, "ROOT", ROOT)
    callback.on_multirun_start(cfg)
    assert len(started) == 2


@pytest.mark.slow
def test_points_that_cannot_be_trained_are_not_submitted_and_what_slurm_refuses_is_said(
    in_world: Path, tmp_path: Path
) -> None:
    for name, does in (
        ("sbatch", f'cp "$1" {tmp_path}/script; echo "no such partition" >&2; exit 1'),
        ("srun", "true"),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    points = ["stage.lr=1e-3,-1,2e-3", "logger=csv", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    done = subprocess.run(
        [sys.executable, "experiments/train.py", "-m", "world=shapes", "machine=slurm_2x8", *points],
        cwd=ROOT, env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert "stage.lr must be positive, got -1" in done.stderr
    assert done.stderr.rstrip().endswith("error: no such partition")
    assert "Traceback" not in done.stderr
    assert "#SBATCH --array=0-1%2" in (tmp_path / "script").read_text()
