"""Makes a small module, its data and its trainer, and starts trainings in separate processes."""

import sys
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate

from tbac.models import UniImage
from tbac.training.checkpoints import describe_model
from tbac.training.module import LadderTuningModule
from tbac.training.optimizers import adamw, warmup_cosine
from tbac.training.stages import Stage
from tests.helpers.configs import compose_config
from tests.helpers.processes import Command, start_command

TRAIN = [sys.executable, "-m", "experiments.train"]
STEPS = 6  # steps of a training with the overrides BASE
BASE = [
    "stage=ti2i_pretrain", "stage.previous=null", "debug=few_steps",
    f"stage.steps={STEPS}", "stage.val_every=4", "stage.ema_decay=0.5", "callbacks=audit",
    "machine.accelerator=cpu", "~callbacks.progress", "stage.dropout.caption_drop_prob=0.3",
]  # fmt: skip
PARTS = ("state_dict", "current_model_state")
RUN = [
    "stage=ti2i_pretrain", "stage.previous=null", "debug=few_steps",
    "stage.steps=16", "stage.val_every=3", "stage.ema_decay=0.5",
    "callbacks.sample_grid.prompts=[]", "machine.num_workers=1",
]  # fmt: skip


def make_stage(name: str = "t2i_pretrain", **options: Any) -> Stage:
    defaults: dict[str, Any] = {
        "optimizer": lambda groups: adamw(groups, lr=1e-2),
        "scheduler": lambda optimizer, total_steps: warmup_cosine(optimizer, total_steps, 1, 1e-3),
        "weight_decay": 0.05,
        "steps": 4,
    }
    return Stage(name, **(defaults | options))


def make_module(model: UniImage, **options: Any) -> LadderTuningModule:
    return LadderTuningModule(model, make_stage(**options), facts=describe_model(model))


def make_trainer(steps: int, **options: Any) -> Any:
    import lightning as L

    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "accelerator": "cpu",
    }
    return L.Trainer(max_steps=steps, max_epochs=-1, num_sanity_val_steps=0, **(quiet | options))


def make_data(model: UniImage, *overrides: str) -> Any:
    data = instantiate(
        compose_config("train", "run_dir=.", "stage.batch_size=4", "stage.val_samples=8", *overrides).data
    )
    data.bind(model.prompt)
    return data


def train_and_list_losses(model: UniImage, data: Any, steps: int = 6) -> list[float]:
    """Train on data that is bound to the model's prompts; returns the loss of each step."""
    module = make_module(model, steps=steps)
    losses: list[float] = []
    inner = module.training_step

    def step(batch: Any, batch_idx: int) -> Any:
        loss = inner(batch, batch_idx)
        losses.append(loss.item())
        return loss

    module.training_step = step  # type: ignore[method-assign]
    make_trainer(steps).fit(module, datamodule=data)
    return losses


def assert_runs_close(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Assert that two checkpoints agree: weights to float32 tolerance, the optimizer's state in names and shapes."""
    for part in PARTS:
        assert one[part].keys() == other[part].keys()
        for name, value in one[part].items():
            torch.testing.assert_close(other[part][name], value, rtol=1e-3, atol=2e-4)
    assert one["tbac"]["optimized"] == other["tbac"]["optimized"]
    states = [c["optimizer_states"][0]["state"] for c in (one, other)]
    assert states[0].keys() == states[1].keys()
    for index, values in states[0].items():
        assert values.keys() == states[1][index].keys()
        assert values["step"] == states[1][index]["step"]
        assert values["exp_avg"].shape == states[1][index]["exp_avg"].shape


def start_training(world: Path, folder: Path, *overrides: str) -> Command:
    """Start a training with the overrides `RUN` in a separate process; `folder` is its run folder."""
    variables = {"TBAC_SHAPES": str(world), "CUDA_VISIBLE_DEVICES": ""}
    arguments = [*RUN, f"hydra.run.dir={folder}", *overrides]
    return start_command("experiments.train", arguments, folder / "output.txt", variables)
