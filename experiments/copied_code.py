"""Jobs of a cluster run a copy of this code: what is edited while they wait in the queue changes nothing for them.

A single job gets the copy's path (`experiments/slurm.py`), a multirun begins again from it (`cluster_multirun.py`).
"""

import shlex
import shutil
from pathlib import Path

from tbac.app.folders import make_new_folder
from tbac.files import write_whole
from tbac.training.run_facts import REVISION, read_git_revision

ROOT = Path(__file__).resolve().parents[1]
CODE = ("tbac", "experiments", "data_prep", "conf")  # what a job runs
FOLDER = ".code"  # of copies, in the folder of a run or of a multirun


def copy_code(folder: Path) -> Path:
    """Copy this code and its configs for a job, with a note of its revision; returns the copy's folder.

    A copy is never written over: jobs of an earlier submission in the same folder may still wait.

    Args:
        folder: of the run, or multirun.
    """
    place = Path(make_new_folder(str(folder / FOLDER)))
    for name in CODE:
        left_out = shutil.ignore_patterns("__pycache__", "*.png", "*.md")
        shutil.copytree(ROOT / name, place / name, ignore=left_out, symlinks=True)
    write_whole(place / REVISION, f"{read_git_revision()}\n".encode())
    return place


def export_path(code: Path) -> str:
    """Write the shell line after which Python imports this code.

    It comes before the working directory, which `python -m` would look into first. The line has no braces, since it
    goes through configs, which would take `${` for an interpolation.
    """
    before = '[ -z "$PYTHONPATH" ] || PYTHONPATH=":$PYTHONPATH"'
    return f'{before}; export PYTHONPATH={shlex.quote(str(code))}"$PYTHONPATH" PYTHONSAFEPATH=1'
