"""The exact detector of the small world."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tbac.evaluation.detectors.template import TemplateDetector


@pytest.fixture
def detector(in_world: Path) -> "TemplateDetector":
    from tbac.evaluation.detectors.template import TemplateDetector

    return TemplateDetector.from_world(in_world / "benchmarks" / "world.json")
