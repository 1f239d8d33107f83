"""Rewards that need no trained model: what they say follows from the pixels alone."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tbac.types import PicturePrompt, RewardError

REDNESS = "reward={red: {_target_: tests.helpers.rewards.Redness}}"
REINFORCE = [
    "stage=reinforce", "stage.previous=null", "debug=few_steps", "world=shapes", "~reward", f"+{REDNESS}",
    "stage.steps=6", "stage.val_every=3", "stage.ema_decay=0.5", "stage.batch_size=2",
    "stage.reinforce.drawing.group_size=3", "stage.reinforce.drawing.num_inference_steps=2",
    "callbacks.sample_grid.prompts=[]", "~callbacks.progress", "machine.accelerator=cpu",
]  # fmt: skip


class Redness:
    """How red pictures are, for prompts of its own.

    Args:
        texts: the prompts; None for any.
        down: while this file is there, it fails, as an endpoint that doesn't answer.
        good_for: how often it answers before it looks at that file.
        failures: how often it fails then, whether or not there is a file.
    """

    def __init__(
        self,
        texts: Sequence[str] | None = ("a red circle", "three squares", "a letter L", "a circle and a square"),
        down: str = "",
        good_for: int = 0,
        failures: int = 0,
    ) -> None:
        self.texts, self.down, self.good_for, self.failures = texts, down, good_for, failures
        self.asked = 0

    def list_prompts(self) -> list[PicturePrompt] | None:
        return None if self.texts is None else [PicturePrompt(text) for text in self.texts]

    def score(self, prompts: Sequence[PicturePrompt], pictures: Sequence[Image.Image]) -> list[float]:
        self.asked += 1
        failing = self.good_for < self.asked <= self.good_for + self.failures
        if failing or (self.down and self.asked > self.good_for and Path(self.down).exists()):
            raise RewardError("nobody is there")
        return [float(np.asarray(picture, np.float64)[..., 0].mean()) for picture in pictures]
