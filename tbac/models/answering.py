"""How the MLLM writes an answer: greedily, or by drawing tokens."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch

from tbac.models.checks import check_flag, is_count, is_whole

SEEDS = 2**63
OF_DRAWING = ("temperature", "top_k", "top_p", "seed")


@dataclass(frozen=True)
class AnswerOptions:
    """How an answer is written, in the words of transformers' `generate`.

    Args:
        max_new_tokens: longest answer in tokens.
        do_sample: tokens are drawn; otherwise the likeliest one is taken.
        temperature: divides the logits that tokens are drawn by. Here and below None is what the model's own
            `generation_config.json` says.
        top_k: tokens are drawn among so many of the likeliest.
        top_p: tokens are drawn among the likeliest that have this probability together, in (0, 1].
        repetition_penalty: above 1, tokens that came before become less likely.
        seed: of the draws: the same seed gives the same answers; None draws by torch's own random numbers.

    Raises:
        ValueError: naming the option, its value and what is accepted.
    """

    max_new_tokens: int = 64
    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        check_count("max_new_tokens", self.max_new_tokens)
        if self.top_k is not None:
            check_count("top_k", self.top_k)
        check_flag("do_sample", self.do_sample)
        for name in ("temperature", "top_p", "repetition_penalty"):
            check_positive(name, getattr(self, name))
        if self.top_p is not None and self.top_p > 1:
            raise ValueError(f"top_p must be at most 1, got {self.top_p!r}")
        if self.seed is not None and not (is_whole(self.seed) and 0 <= self.seed < SEEDS):
            raise ValueError(f"seed must be a whole number from 0 to {SEEDS - 1}, got {self.seed!r}")
        unused = [name for name in OF_DRAWING if getattr(self, name) is not None]
        if unused and not self.do_sample:
            raise ValueError(
                f"{unused[0]}={getattr(self, unused[0])} is for answers that are drawn; give do_sample=True"
            )

    def list_generation_options(self) -> dict[str, Any]:
        """List the options for transformers' `generate`; what is None is left to the model."""
        names = ("max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @contextmanager
    def seeded(self, device: torch.device) -> Iterator[None]:
        """Draw by `seed` for a block, and leave torch's own random numbers as they were."""
        if self.seed is None:
            yield
            return
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.seed)
            yield


def check_count(name: str, value: Any) -> None:
    """Raise ValueError unless the value is a whole number of at least 1."""
    if not is_count(value):
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def check_positive(name: str, value: Any) -> None:
    """Raise ValueError unless the value is None or a number above 0."""
    if value is None:
        return
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not 0 < float(value) < math.inf:
        raise ValueError(f"{name} must be a number above 0, got {value!r}")
