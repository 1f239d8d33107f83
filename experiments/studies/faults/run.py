"""Causes every fault that training promises to survive, and compares the outcome with a run that had none.

python experiments/studies/faults/run.py

Needs the shapes world (`make demo`, or `python data_prep/shapes/build.py`). Each row trains stage 2 for some steps in
separate processes, and compares every bit of weights, weight average, moments, schedule and data position.
"""

import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from omegaconf import DictConfig

from experiments.reports import format_table
from experiments.studies.faults.local_slurm import (
    OVERRIDES,
    list_missing_programs,
    read_job_state,
    run_cluster,
    start_requeued_job,
    wait_until,
)
from experiments.studies.faults.outside import OUTSIDE, STAGES
from experiments.studies.faults.runs import NONE, Row, Run, compare_samples, end_identically, say_yes_or_no
from tbac.app import command

log = logging.getLogger(__name__)
ROOT = Path(__file__).parents[3]
STAGE = "ti2i_pretrain"
STEPS = 24
BATCH = 4
BASE = [
    f"stage={STAGE}", "stage.previous=null", "world=shapes", "logger=csv", "callbacks=audit", "~callbacks.progress",
    "callbacks.sample_grid.prompts=[]", f"stage.batch_size={BATCH}", f"stage.steps={STEPS}", "stage.warmup_steps=2",
    "stage.val_every=6", "stage.val_samples=8", "stage.noise_samples_per_prompt=1", "machine.accelerator=cpu",
    "guard.warmup=6", "guard.window=16", "callbacks.guard.then=skip",
]  # fmt: skip
PAIR = ["machine.devices=2", "machine.strategy=ddp", f"stage.batch_size={BATCH // 2}"]


class Faults:
    """Runs training with and without faults, in folders under `root`."""

    def __init__(self, root: Path, kills: int, seed: int) -> None:
        self.root, self.kills, self.seed = root, kills, seed
        self._references: dict[tuple[str, ...], Run] = {}

    def start(self, run: Run, *overrides: str) -> subprocess.Popen:
        chosen = {override.partition("=")[0] for override in overrides}
        base = [override for override in BASE if override.partition("=")[0] not in chosen]
        if STAGES in overrides:
            base = [override for override in base if not override.startswith("stage=")]
        command = [sys.executable, str(ROOT / "experiments" / "train.py")]
        # Flags come before overrides; a multirun has its own folder.
        command += sorted([*base, *overrides], key=lambda argument: not argument.startswith("-"))
        if "-m" not in overrides:
            command.append(f"hydra.run.dir={run.folder}")
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        run.folder.mkdir(parents=True, exist_ok=True)
        with (run.folder / "output.txt").open("w") as output:
            # A shell that starts this study in the background has it ignore signals that rows send.
            return subprocess.Popen(
                ["env", "--default-signal=INT,HUP", *command],
                env=environment, cwd=ROOT, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip

    def finish(self, run: Run, process: subprocess.Popen) -> Run:
        started = time.monotonic()
        run.status = process.wait(timeout=600)
        run.seconds = time.monotonic() - started
        run.text = (run.folder / "output.txt").read_text()
        return run

    def train(self, name: str, *overrides: str, fault: str | None = None) -> Run:
        """Train in the folder `name`; a run that is there already is resumed."""
        run = Run(self.root / name)
        return self.finish(run, self.start(run, *overrides, *_make_fault_override(fault)))

    def reference(self, *overrides: str, fault: str | None = None) -> Run:
        """Train a run to compare with, once: without a fault, or with the steps left out that must be rejected."""
        key = (*overrides, fault or "")
        if key not in self._references:
            run = self.train(f"reference_{len(self._references)}", *overrides, fault=fault)
            assert run.status == 0, run.text
            self._references[key] = run
        return self._references[key]

    def release(self, name: str, *overrides: str, fault: str) -> str:
        """Train without the guard, as the release takes every step, and describe what becomes of the weights."""
        others = [o for o in overrides if not o.startswith("callbacks.guard")]
        run = self.train(f"{name}_release", "~callbacks.guard", *others, fault=fault)
        weights = run.read_checkpoint()["current_model_state"]
        broken = sum(not bool(v.isfinite().all()) for v in weights.values())
        if broken:
            return f"the step is taken: {broken} of {len(weights)} tensors NaN or infinite"
        calm = self.reference(*others)
        return f"the step is taken: validation loss {run.read_loss():.3f} instead of {calm.read_loss():.3f}"

    def rejected(self, name: str, fault: str, title: str, left_out: list[int], *overrides: str) -> Row:
        """Cause a fault whose steps must be rejected: the run must end as one that leaves them out."""
        run = self.train(name, *overrides, fault=fault)
        reference = self.reference(*overrides, fault=f"LeftOut,batches:{left_out}".replace(" ", ""))
        equal = run.status == 0 and end_identically(run, reference)
        count = run.text.count("rejected the step after")
        ours = f"{count} step{'s' * (count > 1)} rejected, the rest as if never drawn"
        if "back from step" in run.text:
            ours += f"; {run.text.count('back from step')} times back to the newest checkpoint"
        samples = compare_samples(run.list_drawn_keys(), reference.list_drawn_keys())
        released = self.release(name, *overrides, fault=fault)
        return Row(title, released, ours, say_yes_or_no(equal), samples, equal and samples == NONE)

    def goes_on(self, name: str, title: str, release: str, ours: str, run: Run, *overrides: str) -> Row:
        """Start a run again that a fault has ended: it must end as a run without the fault."""
        again = self.train(name, *overrides)
        reference = self.reference(*overrides)
        equal = again.status == 0 and end_identically(again, reference)
        samples = compare_samples(again.list_kept_keys(), reference.list_kept_keys())
        return Row(title, release, ours, say_yes_or_no(equal), samples, equal and samples == NONE)

    # Each method below causes one fault; its name is the row's name in the config.

    def nan_loss(self) -> Row:
        return self.rejected("nan_loss", "SpoiltBatch,batches:[10]", "NaN loss", [10])

    def inf_on_one_rank(self) -> Row:
        fault = "SpoiltGradient,batches:[10],kind:inf,on_rank:1"
        return self.rejected("inf_on_one_rank", fault, "infinite gradients on one rank of two", [10], *PAIR)

    def spike(self) -> Row:
        return self.rejected(
            "spike", "SpoiltBatch,batches:[10],scale:1000", "latents, so loss, 1000 times as large", [10]
        )

    def ten_spikes(self) -> Row:
        batches = str(list(range(10, 20))).replace(" ", "")
        policy = ["callbacks.guard.then=rewind", "callbacks.guard.patience=5"]
        undone = list(range(6, 20))  # back to the checkpoint of step 6, and on past the spikes
        return self.rejected(
            "ten_spikes",
            f"SpoiltBatch,batches:{batches},scale:1000",
            "ten spikes in a row, `then=rewind`",
            undone,
            *policy,
        )

    def nan_at_first(self) -> Row:
        return self.rejected("nan_at_first", "SpoiltBatch,batches:[0]", "NaN in the very first step", [0])

    def nan_accumulated(self) -> Row:
        title = "NaN in the first of two accumulated batches"
        return self.rejected("nan_accumulated", "SpoiltBatch,batches:[10]", title, [11], "stage.accumulate=2")

    def half_overflow(self) -> Row:
        fault = "SpoiltGradient,batches:[10],kind:half"
        return self.rejected("half_overflow", fault, "gradients overflow half precision", [10])

    def kill_9(self) -> Row:
        overrides = ["stage.steps=400", "stage.val_every=100", "callbacks.checkpoint.every=4"]
        moments, writing, run = random.Random(self.seed), 0, Run(self.root / "kill_9")
        for kill in range(self.kills):
            # Every attempt must train at least one batch, so that the run comes to its end.
            process = self.start(run, *overrides)
            seen = run.count_batches()
            while run.count_batches() == seen and process.poll() is None:
                time.sleep(0.01)
            if kill % 2:
                time.sleep(moments.uniform(0, 1.5))
            else:  # every other kill comes while a checkpoint is written
                while not list((run.folder / "checkpoints").glob("*.tmp*")) and process.poll() is None:
                    pass
            assert process.poll() is None, f"kill {kill} came too late; make the run longer"
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            writing += bool(list((run.folder / "checkpoints").glob("*.tmp*")))
        ours = f"{self.kills} kills, {writing} of them with a half-written checkpoint on disk; goes on each time"
        return self.goes_on(
            "kill_9", f"kill -9 at {self.kills} random moments", self._weights_only(), ours, run, *overrides
        )

    def _weights_only(self) -> str:
        """Measure how many samples are drawn twice when only weights are restored, and say so."""
        run = self.train("weights_only", "trainer.max_steps=12")
        again = self.train("weights_only_again", f"init={run.folder}", "resume=null", "trainer.max_steps=12")
        repeated = len(set(run.list_kept_keys()) & set(again.list_kept_keys()))
        return (
            f"restores weights alone: moments, schedule and position start anew (measured: of 12 + 12 steps' "
            f"{2 * 12 * BATCH} samples {repeated} are drawn twice)"
        )

    def truncated(self) -> Row:
        run = self.train("truncated", "trainer.max_steps=14")
        newest = max((run.folder / "checkpoints").glob(f"{STAGE}-step=*.ckpt"), key=lambda p: p.stat().st_mtime_ns)
        newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
        row = self.goes_on("truncated", "newest checkpoint cut in half", "reads it and fails †", "", run)
        text = (run.folder / "output.txt").read_text()
        named = f"passing over a checkpoint: {newest} can't be read" in text
        return replace(row, ours="named and passed over" if named else "not named", holds=row.holds and named)

    def disk_full(self) -> Row:
        run = self.train("disk_full", fault="DiskFull,batches:[4,14]")
        failed = run.text.count("couldn't be written")
        ours = f"{failed} checkpoints reported and given up, older ones kept, training went on"
        row = self.goes_on(
            "disk_full", "no space during checkpoints, from step 4 to 14", "writes in place: a torn file †", ours, run
        )
        return replace(row, holds=row.holds and failed > 0 and run.status == 0)

    def deleted_shard(self) -> Row:
        data = Path(os.environ.get("TBAC_SHAPES", "outputs/shapes")).absolute() / "data" / "edit"
        copy = self.root / "shards"
        shutil.copytree(data, copy, dirs_exist_ok=True)
        sources = f"stage.sources=[{{path: '{copy}', split: train}}]"
        # The samples of all shards are mixed, so that some shards are still unopened when they are deleted.
        options = [sources, "machine.num_workers=0", "data.shuffle_buffer=8000"]
        run = self.train("deleted_shard", *options, fault=f"Deleted,batches:[1],folder:'{copy}'")
        message = re.search(r"^error: .*", run.text, re.MULTILINE)
        for file in copy.glob("*.deleted"):
            file.rename(file.with_suffix(""))
        named = bool(message and ".tar" in message[0])
        ours = "ends with a message that names the shard; goes on when it is back" if named else "no message"
        row = self.goes_on(
            "deleted_shard", "a shard deleted mid-epoch", "error of the tar reader †", ours, run, *options
        )
        return replace(row, holds=row.holds and named and run.status == 1)

    def dead_rank(self) -> Row:
        run = self.train("dead_rank", *PAIR, fault="Signal,batches:[10],on_rank:1")
        ended = "Child process with PID" in run.text or "stops the job" in run.text
        ours = f"ended with a message {run.seconds:.0f} s after its start; goes on"
        row = self.goes_on(
            "dead_rank", "kill -9 of one rank of two", "waits for the collective's time-out †", ours, run, *PAIR
        )
        return replace(row, holds=row.holds and ended)

    def stuck_rank(self) -> Row:
        limit = "machine.timeout_minutes=0.2"
        run = self.train("stuck_rank", *PAIR, limit, fault="Stuck,batches:[10],on_rank:1")
        message = re.search(r"no progress for (\d+) s; furthest behind: rank 1 at batch 10", run.text)
        ours = "not named"
        if message:
            ours = f"named and ended {message[1]} s after it stopped (limit 12 s); goes on"
        row = self.goes_on(
            "stuck_rank", "one rank of two hangs", "waits for the collective's time-out †", ours, run, *PAIR
        )
        return replace(row, holds=row.holds and bool(message))

    def sigterm(self) -> Row:
        run = self.train("sigterm", fault="Signal,batches:[10],name:SIGTERM")
        saved = bool(re.search(r"stopped by SIGTERM after step 11", run.text))
        ours = f"checkpoint after the step in hand, exit status {run.status}; goes on"
        row = self.goes_on("sigterm", "SIGTERM", "ends; the steps since its checkpoint are lost †", ours, run)
        return replace(row, holds=row.holds and saved and run.status == 143)

    def slurm_requeue(self) -> Row:
        absent = list_missing_programs()
        if absent:
            raise ValueError(f"the row slurm_requeue needs SLURM on this machine; {', '.join(absent)} are missing")
        run = Run(self.root / "slurm_requeue")
        machine = [o for o in OVERRIDES if not o.startswith("machine.accelerator")]
        slow = _make_fault_override("Slow,seconds:0.5")
        with run_cluster():
            # Let the job train for a while, and then start another that has priority on both nodes.
            process = self.start(run, *machine, f"stage.batch_size={BATCH // 2}", *slow)
            job = self.finish(run, process).text.partition("submitted job ")[2].partition(";")[0]
            log = run.folder / f"slurm-{job}.log"
            wait_until(lambda: run.count_batches() >= 16)
            other = ["sbatch", "--parsable", "-p", "high", "-N", "2", "--output=/dev/null", "--wrap", "sleep 2"]
            subprocess.run(other, check=True, capture_output=True)
            # The job must save, go back into the queue, and finish when the other one is done.
            wait_until(lambda: read_job_state(job) == "PENDING")
            start_requeued_job(job)
            wait_until(lambda: read_job_state(job) not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"))
            ended = read_job_state(job)
        # It must end as two processes that nobody stopped.
        reference = self.reference(*PAIR, "machine.num_workers=0")
        equal = end_identically(run, reference)
        samples = compare_samples(run.list_kept_keys(), reference.list_kept_keys())
        stopped = re.search(r"stopped by SIGTERM after step (\d+)", log.read_text())
        ours = (
            f"two-node job saved after step {stopped[1]}, back in its queue, {ended.lower()}"
            if stopped
            else "not saved"
        )
        holds = equal and samples == NONE and ended == "COMPLETED" and stopped is not None
        title = "another job takes the place of a SLURM job"
        return Row(title, "the job script isn't put back †", ours, say_yes_or_no(equal), samples, holds)


ROWS = (
    "nan_loss", "inf_on_one_rank", "spike", "ten_spikes", "nan_at_first", "nan_accumulated", "half_overflow", "kill_9",
    "truncated", "disk_full", "deleted_shard", "dead_rank", "stuck_rank", "sigterm", *OUTSIDE, "slurm_requeue",
)  # fmt: skip


def _make_fault_override(text: str | None) -> list[str]:
    return [f"+callbacks.fault={{_target_:experiments.studies.faults.inject.{text}}}"] if text else []


def cause_faults(faults: Faults, names: list[str]) -> Iterator[tuple[str, Row]]:
    """Cause the named faults one after the other; yields the row of each."""
    for name in names:
        row: Row = OUTSIDE[name](faults) if name in OUTSIDE else getattr(faults, name)()
        log.info("%s: %s", name, row)
        yield name, row


@command("study/faults")
def main(cfg: DictConfig) -> None:
    unknown = set(cfg.rows) - set(ROWS)
    if unknown:
        raise ValueError(f"rows={sorted(unknown)} aren't rows; there are {', '.join(ROWS)}")
    out = Path(cfg.out).absolute()
    shutil.rmtree(out / "work", ignore_errors=True)
    rows = dict(cause_faults(Faults(out / "work", cfg.kills, cfg.seed), list(cfg.rows) or list(ROWS)))
    (out / "report.json").write_text(json.dumps({n: asdict(r) for n, r in rows.items()}, indent=2) + "\n")
    head = ["fault", "release", "ours", "equal to the bit", "samples lost or repeated", "holds"]
    cells = [[r.fault, r.release, r.ours, r.equal, r.samples, "yes" if r.holds else "NO"] for r in rows.values()]
    print("\n" + format_table(head, cells))
    failed = [name for name, row in rows.items() if not row.holds]
    if failed:
        raise SystemExit(f"these rows don't hold: {', '.join(failed)}")


if __name__ == "__main__":
    main()
