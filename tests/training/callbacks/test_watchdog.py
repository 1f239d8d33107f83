"""A stuck or dead process ends the job with a message that names it."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from tbac.training.callbacks.watchdog import Watchdog
from tests.helpers.training import BASE, TRAIN

LIMIT = 6  # seconds


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("Stuck,batches:[3],on_rank:0", "furthest behind: rank 0 at batch 3 of stage ti2i_pretrain"),
        ("Stuck,batches:[3],on_rank:1", "furthest behind: rank 1 at batch 3 of stage ti2i_pretrain"),
        ("Signal,batches:[3],on_rank:0", "rank 0 is gone; it was at"),
        ("Signal,batches:[3],on_rank:1", "terminated with code -9"),
    ],
)
def test_the_job_ends_in_time_and_says_why(
    world_folder: Path, tmp_path: Path, strategy: str, fault: str, words: str
) -> None:
    overrides = [
        "machine.devices=2", f"machine.strategy={strategy}", f"machine.timeout_minutes={LIMIT / 60}",
        f"+callbacks.fault={{_target_:experiments.studies.faults.inject.{fault}}}", f"hydra.run.dir={tmp_path}",
    ]  # fmt: skip
    environment = os.environ | {"TBAC_SHAPES": str(world_folder), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    output = tmp_path / "output.txt"
    with output.open("w") as file:
        process = subprocess.Popen([*TRAIN, *BASE, *overrides], env=environment, stdout=file, stderr=file)
        log = tmp_path / "sample_log" / "rank_1.jsonl"
        while not (log.exists() and len(log.read_text().splitlines()) >= 3) and process.poll() is None:
            time.sleep(0.1)
        assert log.exists(), output.read_text()
        reached = time.monotonic()
        assert process.wait(timeout=60) != 0
    assert time.monotonic() - reached < LIMIT + 15
    while words not in output.read_text():  # of a process that outlives the first one
        time.sleep(0.2)
        assert time.monotonic() - reached < LIMIT + 15, output.read_text()


def test_bad_limits_are_named() -> None:
    with pytest.raises(ValueError, match=r"callbacks.watchdog.gone_seconds must be positive, got 0"):
        Watchdog(gone_seconds=0)
