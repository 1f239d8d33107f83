"""Families of many inputs that look alike: `make test` takes a seeded sample of them, `make test-slow` all."""

from collections.abc import Sequence
from random import Random
from typing import Any

import pytest


def sample_family(cases: Sequence[Any], count: int, seed: int = 0) -> list[Any]:
    """Mark all but `count` cases as slow; which ones follows from the seed alone."""
    kept = set(Random(seed).sample(range(len(cases)), count))
    marked = []
    for number, case in enumerate(cases):
        values = case if isinstance(case, tuple) else (case,)
        marked.append(pytest.param(*values, marks=[] if number in kept else pytest.mark.slow))
    return marked
