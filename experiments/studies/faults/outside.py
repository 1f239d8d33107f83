"""Faults of what surrounds training: loggers, disks, loader processes, files of state, folders, signals.

Each function causes one fault and returns its row; its name is the row's name in the config.
"""

import contextlib
import re
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.studies.faults.runs import NONE, Row, Run, compare_samples, end_identically, say_yes_or_no

if TYPE_CHECKING:
    from experiments.studies.faults.run import Faults

UNSENT = "mlflow_unsent.jsonl"
ENDS = "an error of the logger ends training †"
SMALL_DISK = 96  # MiB
STAGES = "stages=[t2i_pretrain,ti2i_pretrain,finetune]"
# In their order, since a run doesn't go back: after a stage's last step it goes on with the next stage.
MOMENTS = (
    ("t2i_pretrain", "first_validation", "SIGINT"), ("t2i_pretrain", "batch", "SIGTERM"),
    ("t2i_pretrain", "last_batch", "SIGTERM"), ("ti2i_pretrain", "setup", "SIGHUP"),
    ("ti2i_pretrain", "first_validation", "SIGTERM"), ("ti2i_pretrain", "validation", "SIGINT"),
    ("ti2i_pretrain", "teardown", "SIGTERM"), ("finetune", "train_start", "SIGHUP"),
    ("finetune", "batch", "SIGINT"), ("finetune", "last_batch", "SIGTERM"),
)  # fmt: skip


@contextlib.contextmanager
def mount_disk(folder: Path, megabytes: int = SMALL_DISK) -> Iterator[Path]:
    """Mount a small file system for a block; needs root."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def log_to(store: str) -> list[str]:
    """Override the logger: MLflow with this store, which is told every step."""
    return ["logger=mlflow", f"logger.tracking_uri={store}", "trainer.log_every_n_steps=1"]


def list_logged_steps(database: Path) -> set[int]:
    """List the steps whose loss is in an MLflow database."""
    with contextlib.closing(sqlite3.connect(database)) as opened:
        return {step for (step,) in opened.execute("SELECT step FROM metrics WHERE key = 'train/loss'")}


def compare(faults: "Faults", run: Run, *overrides: str) -> tuple[bool, str]:
    """Compare how a run ended with the reference: whether all bits are equal, and which samples differ."""
    reference = faults.reference(*overrides)
    equal = run.status == 0 and end_identically(run, reference)
    return equal, compare_samples(run.list_kept_keys(), reference.list_kept_keys())


def train_with_logger(faults: "Faults", name: str, title: str, store: str, **options: Any) -> tuple[Run, Row]:
    """Train with MLflow; the run must end as one without."""
    run = faults.train(name, *log_to(store), **options)
    equal, samples = compare(faults, run)
    kept = len((run.folder / UNSENT).read_bytes().splitlines()) if (run.folder / UNSENT).is_file() else 0
    ours = f"training went on; {kept} records are kept for the next start" if kept else "training went on"
    return run, Row(title, ENDS, ours, say_yes_or_no(equal), samples, equal and samples == NONE)


def send_later(faults: "Faults", run: Run, row: Row, store: Path) -> Row:
    """Start a run again whose records couldn't be sent, now that its store is there, and see that all have come."""
    again = faults.train(run.folder.name, *log_to(f"sqlite:///{store}"))
    sent = list_logged_steps(store)
    ours = f"{row.ours}, which sent {len(sent)} of 24 steps"
    holds = row.holds and again.status == 0 and len(sent) == 24 and not (run.folder / UNSENT).exists()
    return replace(row, ours=ours, holds=holds)


def logger_down(faults: "Faults") -> Row:
    run, row = train_with_logger(faults, "logger_down", "MLflow's server is down", "http://127.0.0.1:9")
    store = faults.root / "logger_down.db"
    return send_later(faults, run, row, store)


def logger_deleted(faults: "Faults") -> Row:
    store = faults.root / "logger_deleted.db"
    fault = f"Removed,batches:[10],path:'{store}'"
    title = "MLflow's database is deleted in mid-run"
    _, row = train_with_logger(faults, "logger_deleted", title, f"sqlite:///{store}", fault=fault)
    later = {step for step in list_logged_steps(store) if step > 12} if store.exists() else set()
    ours = f"{row.ours}; a new one holds what was logged after it"
    return replace(row, ours=ours, holds=row.holds and len(later) >= 10)


def logger_locked(faults: "Faults") -> Row:
    store = faults.root / "logger_locked.db"
    with contextlib.closing(sqlite3.connect(store, check_same_thread=False)) as held:
        held.execute("CREATE TABLE t (x)")
        held.execute("BEGIN EXCLUSIVE")
        title = "MLflow's database is locked all the time"
        run, row = train_with_logger(faults, "logger_locked", title, f"sqlite:///{store}")
        held.rollback()
        held.execute("DROP TABLE t")
    return send_later(faults, run, row, store)


def logger_full(faults: "Faults") -> Row:
    with mount_disk(faults.root / "logger_disk", 1) as disk:
        (disk / "ballast").write_bytes(bytes(2**20 - 2**16))
        title = "the disk of MLflow's database is full"
        run, row = train_with_logger(faults, "logger_full", title, f"sqlite:///{disk}/x.db")
    return replace(row, holds=row.holds and (run.folder / UNSENT).is_file())


def killed_worker(faults: "Faults") -> Row:
    workers = "machine.num_workers=2"
    run = faults.train("killed_worker", workers, fault="KilledWorker,batches:[4,13]")
    equal, samples = compare(faults, run, workers)
    count = run.text.count("the loader's processes are started anew")
    ours = f"{count} times the loader's processes were started anew"
    holds = equal and samples == NONE and count > 0
    title = "kill -9 of a loader process, twice"
    return Row(title, "an error ends training †", ours, say_yes_or_no(equal), samples, holds)


def full_disk(faults: "Faults") -> Row:
    drawn = ["callbacks.sample_grid.prompts=[a red circle]", "callbacks.sample_grid.num_inference_steps=2"]
    drawn += ["trainer.log_every_n_steps=1"]  # so that there are files to write at every step
    with mount_disk(faults.root / "full_disk") as disk:
        fault = f"Filled,batches:[0,16],folder:'{disk}'"
        run = faults.train("full_disk/run", *drawn, fault=fault)
        equal, samples = compare(faults, run)
        named = {
            "checkpoints": "couldn't be written",
            "sample pictures": "are left out",
            "the record of samples": r"rank_0\.jsonl can't be written",
            "the CSV file": r"LastingCSVLogger\.save failed",
        }
        reported = [name for name, words in named.items() if re.search(words, run.text)]
    ours = f"training went on; reported: {', '.join(reported)}"
    title = "no space left on a small file system that holds the run folder, from step 1 to 16"
    holds = equal and samples == NONE and len(reported) == len(named)
    return Row(title, "an error ends training †", ours, say_yes_or_no(equal), samples, holds)


def full_disk_at_end(faults: "Faults") -> Row:
    with mount_disk(faults.root / "full_disk_at_end") as disk:
        name = "full_disk_at_end/run"
        run = faults.train(name, fault=f"Filled,batches:[15,9999],folder:'{disk}'")
        message = re.search(r"^error: the last checkpoint couldn't be written.*", run.text, re.MULTILINE)
        (disk / "filling").unlink()
        again = faults.train(name)
        equal, samples = compare(faults, again)
    ours = "ends with a message; goes on when there is space" if message else "no message"
    holds = equal and samples == NONE and bool(message) and run.status == 1
    return Row("the same, to the end", "an error of torch †", ours, say_yes_or_no(equal), samples, holds)


def torn_state(faults: "Faults") -> Row:
    store = f"sqlite:///{faults.root}/torn_state.db"
    run = faults.train("torn_state", *log_to(store), "trainer.max_steps=14")
    for name in ("report.json", "mlflow_run_id", ".hydra/overrides.yaml", ".hydra/config.yaml", UNSENT):
        (run.folder / name).write_bytes(b"" if name.endswith("json") else b"\0{torn")
    (run.folder / "checkpoints" / f".{run.folder.name}.torn").write_bytes(b"x")
    again = faults.train("torn_state", *log_to(store))
    equal, samples = compare(faults, again)
    title = "report, id of the MLflow run, config and overrides torn or empty"
    ours = "named where it matters; goes on in a new MLflow run"
    holds = equal and samples == NONE and "holds no id of an MLflow run" in again.text
    return Row(title, "has no such files", ours, say_yes_or_no(equal), samples, holds)


def moved_folder(faults: "Faults") -> Row:
    run = faults.train("moved", "trainer.max_steps=14")
    run.folder.rename(faults.root / "elsewhere")
    copy = faults.root / "copied"
    shutil.copytree(faults.root / "elsewhere", copy, ignore=shutil.ignore_patterns("last.ckpt", "best.ckpt"))
    ends = [compare(faults, faults.train(name)) for name in ("elsewhere", "copied")]
    equal = all(same for same, _ in ends)
    samples = NONE if all(difference == NONE for _, difference in ends) else "some"
    title = "run folder moved; copied without its links"
    return Row(title, "absolute paths †", "both go on", say_yes_or_no(equal), samples, equal and samples == NONE)


def flipped_bit(faults: "Faults") -> Row:
    run = faults.train("flipped_bit", "trainer.max_steps=14")
    newest = max((run.folder / "checkpoints").glob("*-step=*.ckpt"), key=lambda p: int(p.stem.partition("step=")[2]))
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 64
    newest.write_bytes(content)
    row = faults.goes_on("flipped_bit", "one bit of the newest checkpoint flipped", "trains on with it †", "", run)
    named = "passing over" in (run.folder / "output.txt").read_text()
    return replace(row, ours="named and passed over" if named else "not named", holds=row.holds and named)


def failing_point(faults: "Faults") -> Row:
    folder = faults.root / "failing_point"
    run = Run(folder)
    options = ["-m", "taps=last_n,final", "stage.lr=1e-3,1e30", "stage.steps=6", f"hydra.sweep.dir={folder}"]
    again = [faults.finish(run, faults.start(run, *options, "callbacks.guard.max_rejects=3")) for _ in range(2)][1]
    done = len(list(folder.glob("*/report.json")))
    ours = f"{done} of 4 points finished, exit status {again.status}; the same command repeats only those that failed"
    title = "a sweep of four points, two of which diverge"
    return Row(title, "has no sweeps", ours, "", NONE, done == 2 and again.status == 1)


def signals(faults: "Faults") -> Row:
    overrides = [STAGES, "stage.steps=6", "stage.val_every=3", "callbacks.checkpoint.every=3"]
    causes = []
    for number, (stage, moment, name) in enumerate(MOMENTS):
        once, group = faults.root / f"signal_{number}", str(number % 2 == 1).lower()
        options = f"stage:{stage},moment:{moment},name:{name},once:'{once}',times:{1 + number % 3},group:{group}"
        causes.append(f"+callbacks.fault_{number}={{_target_:experiments.studies.faults.inject.SignalAt,{options}}}")
    ends: list[int] = []
    # The same command, until it ends by itself.
    while not ends or (ends[-1] and len(ends) < 2 * len(MOMENTS)):
        run = faults.train("signals", *overrides, *causes)
        ends.append(run.status)
    obeyed = sum(status in (129, 130, 143) for status in ends)
    equal, samples = compare(faults, run, *overrides)
    ours = f"{obeyed} of {len(MOMENTS)} obeyed, the same command went on each time"
    others = [status for status in ends if status not in (0, 129, 130, 143)]
    if others:
        ours += f"; other ends: {others}"
    title = f"signals at {len(MOMENTS)} moments of a run of three stages, some of them twice or to the group"
    holds = equal and samples == NONE and obeyed == len(MOMENTS) and not others
    return Row(title, "the steps since its checkpoint are lost †", ours, say_yes_or_no(equal), samples, holds)


OUTSIDE: dict[str, Callable[["Faults"], Row]] = {
    cause.__name__: cause
    for cause in (
        logger_down, logger_deleted, logger_locked, logger_full, killed_worker, full_disk, full_disk_at_end, torn_state,
        moved_folder, flipped_bit, failing_point, signals,
    )
}  # fmt: skip
