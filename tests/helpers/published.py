"""The published files of benchmarks beside the repository; where they are absent, tests that read them are skipped."""

from pathlib import Path

import pytest

from tests.helpers.configs import ROOT

FOLDER = ROOT.parent / "shared" / "real"


def locate_published(name: str) -> Path:
    """Locate a published file or folder, or skip the test, saying so."""
    path = FOLDER / name
    if not path.exists():
        pytest.skip(f"the published files of benchmarks don't lie in ../shared/real ({name})")
    return path
