"""Facts of a run that its config doesn't hold: the revision of the code, and versions of packages."""

import contextlib
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

REVISION = "REVISION"  # file of a copy of this code that says which one it is of
PACKAGES = (
    "torch",
    "lightning",
    "transformers",
    "diffusers",
    "webdataset",
    "hydra-core",
    "bitsandbytes",
    "torchmetrics",
    "mlflow",
)


def read_git_revision() -> str:
    """Read the commit of this code, with `-dirty` for uncommitted changes; "unknown" outside a repository."""
    noted = Path(__file__).parents[2] / REVISION
    if noted.is_file():  # a copy of the code, made for a job
        return noted.read_text().strip()
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return run.stdout.strip()


def collect_run_facts() -> dict[str, str]:
    """Collect the git revision and package versions."""
    facts = {"git_revision": read_git_revision()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            facts[f"version/{package}"] = version(package)
    return facts
