"""A SLURM cluster of several nodes on this machine, for trying out what a real one does to training.

python -m experiments.studies.faults.local_slurm COMMAND …        runs a command beside a cluster of two nodes

Needs Debian's packages slurm-wlm and munge, and root. Everything that the daemons write is in one temporary folder, and
the machine's own SLURM or munge, if it has one, isn't touched.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
# What training needs on this cluster: one process per node, and one address for all nodes.
OVERRIDES = [
    "machine=slurm_2x8", "machine.accelerator=cpu", "machine.devices=1", "machine.strategy=ddp",
    "machine.precision=32-true", "machine.num_workers=0", "machine.slurm.gres=null", "machine.slurm.cpus_per_task=1",
    "machine.slurm.minutes=30", "machine.slurm.setup=['export MASTER_ADDR=127.0.0.1 OMP_NUM_THREADS=1']",
]  # fmt: skip


def list_missing_programs() -> list[str]:
    """List the programs of SLURM and munge that aren't installed."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


def _find_free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for opened in sockets:
            opened.bind(("", 0))
        return [opened.getsockname()[1] for opened in sockets]
    finally:
        for opened in sockets:
            opened.close()


def format_configuration(folder: Path, nodes: int) -> str:
    """Format `slurm.conf`: jobs of the partition `low` are requeued when a job of `high` needs their nodes."""
    host = socket.gethostname().split(".")[0]
    controller, *daemons = _find_free_ports(nodes + 1)
    names = ",".join(f"n{i + 1}" for i in range(nodes))
    # All daemons run on this machine as root, and write into the one folder; short intervals keep tests short.
    lines = [
        "ClusterName=local",
        f"SlurmctldHost={host}(127.0.0.1)",
        f"SlurmctldPort={controller}",
        "SlurmUser=root",
        "SlurmdUser=root",
        "AuthType=auth/munge",
        f"AuthInfo=socket={folder}/munge.socket",
        f"StateSaveLocation={folder}/state",
        f"SlurmdSpoolDir={folder}/spool.%n",
        f"SlurmctldPidFile={folder}/slurmctld.pid",
        f"SlurmdPidFile={folder}/slurmd.%n.pid",
        f"SlurmctldLogFile={folder}/slurmctld.log",
        f"SlurmdLogFile={folder}/slurmd.%n.log",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "MpiDefault=none",
        "ReturnToService=2",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_CPU",
        "PreemptType=preempt/partition_prio",
        "PreemptMode=REQUEUE",
        "KillWait=20",
        "SchedulerParameters=sched_interval=2,batch_sched_delay=1",
    ]
    lines += [
        f"NodeName=n{i + 1} NodeHostname={host} NodeAddr=127.0.0.1 Port={daemons[i]} CPUs=1" for i in range(nodes)
    ]
    lines += [
        f"PartitionName=low Nodes={names} Default=YES PriorityTier=1 GraceTime=60 MaxTime=INFINITE State=UP",
        f"PartitionName=high Nodes={names} PriorityTier=9 PreemptMode=OFF MaxTime=INFINITE State=UP",
    ]
    return "\n".join(lines) + "\n"


@contextmanager
def run_cluster(nodes: int = 2) -> Iterator[Path]:
    """Run a cluster while the `with` block lasts; yields its folder, and sets `SLURM_CONF` to the configuration in it.

    Raises:
        RuntimeError: when a daemon doesn't start, with the end of its log.
    """
    # All that the daemons read and write is in one folder; munge refuses a key that others may read.
    folder = Path(tempfile.mkdtemp(prefix="slurm"))
    folder.chmod(0o755)
    for name in ("state", *(f"spool.n{i + 1}" for i in range(nodes))):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(secrets.token_bytes(1024))
    (folder / "munge.key").chmod(0o400)
    (folder / "slurm.conf").write_text(format_configuration(folder, nodes))
    # SLURM's programs look for the cluster where this variable points.
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    munge = [f"--{option}={folder}/munge.{suffix}" for option, suffix in files.items()]
    # The daemons authenticate through munge, so its socket must exist before they start.
    daemons: list[subprocess.Popen] = []
    try:
        with (folder / "output.txt").open("w") as output:
            commands = [["munged", "--force", "--foreground", *munge], ["slurmctld", "-D"]]
            commands += [["slurmd", "-D", "-N", f"n{i + 1}"] for i in range(nodes)]
            for command in commands:
                daemons.append(subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True))
                if command[0] == "munged":
                    _wait_for_daemons(lambda: (folder / "munge.socket").exists(), folder, daemons)
        _wait_for_daemons(lambda: _count_idle_nodes() == nodes, folder, daemons)
        yield folder
    finally:
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in reversed(daemons):
            try:
                daemon.wait(30)
            except subprocess.TimeoutExpired:
                daemon.kill()
        os.environ.pop("SLURM_CONF")
        if before is not None:
            os.environ["SLURM_CONF"] = before
        shutil.rmtree(folder, ignore_errors=True)


def _count_idle_nodes() -> int:
    """Count the nodes that are ready for a job."""
    done = subprocess.run(["sinfo", "-h", "-N", "-p", "low", "-t", "idle", "-o", "%N"], capture_output=True, text=True)
    return len(done.stdout.split())


def _wait_for_daemons(
    ready: Callable[[], bool], folder: Path, daemons: list[subprocess.Popen], seconds: float = 60
) -> None:
    limit = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > limit or any(d.poll() is not None for d in daemons):
            logs = [f"{f.name}: " + "\n".join(f.read_text().splitlines()[-5:]) for f in folder.glob("*.log")]
            raise RuntimeError(
                "the SLURM cluster didn't start\n" + "\n".join([*logs, (folder / "output.txt").read_text()])
            )
        time.sleep(0.2)


def read_job_state(job: str) -> str:
    """Read the state of a job, such as PENDING, RUNNING or COMPLETED."""
    done = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True)
    for word in done.stdout.split():
        if word.startswith("JobState="):
            return word.removeprefix("JobState=")
    return "UNKNOWN"


def start_requeued_job(job: str) -> None:
    """Let a requeued job start at once; otherwise SLURM makes it wait for two minutes."""
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], capture_output=True)


def wait_until(ready: Callable[[], object], seconds: float = 180) -> None:
    """Wait until `ready` returns something true.

    Raises:
        TimeoutError: after so many seconds, with the state of the queue.
    """
    limit = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > limit:
            raise TimeoutError(subprocess.run(["squeue"], capture_output=True, text=True).stdout)
        time.sleep(0.2)


if __name__ == "__main__":
    with run_cluster():
        sys.exit(subprocess.run(sys.argv[1:]).returncode)
