"""Several processes compute what one does: DDP, FSDP2, accumulation, and going on with another number of them."""

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tbac.models.saved import read_checkpoint
from tbac.training.strategies import make_strategy
from tests.helpers.processes import make_rank_variables, start_command
from tests.helpers.rewards import REINFORCE
from tests.helpers.shards import write_mixed_sizes
from tests.helpers.training import BASE, STEPS, TRAIN, assert_runs_close

pytestmark = pytest.mark.xdist_group("trainings")  # whose processes are forks of one

SLOW = pytest.mark.slow
GLOBAL_BATCH = 8


def train(
    world: Path,
    folder: Path,
    processes: int,
    *overrides: str,
    accumulate: int = 1,
    launcher: str = "outside",
    base: Sequence[str] = BASE,
) -> None:
    """Train in some processes that share the global batch.

    `launcher` says who starts them: "lightning", from the first one, or "outside", as torchrun and srun do.
    """
    arguments = [
        *base,
        f"machine.devices={processes}",
        f"stage.batch_size={GLOBAL_BATCH // processes // accumulate}",
        f"stage.accumulate={accumulate}",
        f"hydra.run.dir={folder}",
        *overrides,
    ]
    variables = {"TBAC_SHAPES": str(world), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    if launcher == "lightning":
        subprocess.run([*TRAIN, *arguments], env=os.environ | variables, check=True, timeout=300)
        return
    ranks = make_rank_variables(processes) if processes > 1 else [{}]
    commands = [
        start_command("experiments.train", arguments, folder / f"output_{number}.txt", variables | rank)
        for number, rank in enumerate(ranks)
    ]
    for command in commands:
        assert command.wait() == 0, command.text


def lines(folder: Path) -> list[dict[str, Any]]:
    """What all processes have logged, in the order of the sequence of draws."""
    found = [json.loads(t) for f in (folder / "sample_log").glob("*.jsonl") for t in f.read_text().splitlines()]
    return sorted(found, key=lambda line: line["positions"])


def losses(folder: Path) -> list[float]:
    """The mean loss of each step."""
    own = lines(folder)
    each = len(own) // STEPS
    return [sum(line["loss"] for line in own[i * each : (i + 1) * each]) / each for i in range(STEPS)]


def keys(folder: Path) -> list[str]:
    return [key for line in lines(folder) for key in line["keys"]]


def saved(folder: Path, step: int = STEPS) -> dict[str, Any]:
    return read_checkpoint(folder / "checkpoints" / f"ti2i_pretrain-step={step}.ckpt")


@pytest.fixture(scope="module")
def alone(world_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process with the same global batch."""
    folder = tmp_path_factory.mktemp("alone")
    train(world_folder, folder, 1)
    return folder


@pytest.mark.parametrize(
    ("strategy", "accumulate"),
    [("ddp", 1), ("fsdp", 2), pytest.param("ddp", 2, marks=SLOW), pytest.param("fsdp", 1, marks=SLOW)],
)
def test_two_processes_have_the_losses_of_one(
    strategy: str, accumulate: int, alone: Path, world_folder: Path, tmp_path: Path
) -> None:
    launcher = "lightning" if (strategy, accumulate) == ("ddp", 1) else "outside"
    train(world_folder, tmp_path, 2, f"machine.strategy={strategy}", accumulate=accumulate, launcher=launcher)
    assert keys(tmp_path) == keys(alone)
    assert losses(tmp_path) == pytest.approx(losses(alone), rel=2e-5)
    assert_runs_close(saved(alone), saved(tmp_path))


@pytest.mark.parametrize(
    ("before", "after"),
    [("fsdp", "auto"), pytest.param("auto", "fsdp", marks=SLOW), pytest.param("ddp", "auto", marks=SLOW)],
)
def test_going_on_with_another_number_of_processes(
    before: str, after: str, alone: Path, world_folder: Path, tmp_path: Path
) -> None:
    for strategy, steps in ((before, 3), (after, -1)):
        processes = 1 if strategy == "auto" else 2
        train(world_folder, tmp_path, processes, f"machine.strategy={strategy}", f"trainer.max_steps={steps}")
    assert keys(tmp_path) == keys(alone)
    assert_runs_close(saved(alone), saved(tmp_path))


@pytest.mark.parametrize(
    ("strategy", "accumulate"), [("ddp", 1), pytest.param("fsdp", 1, marks=SLOW), pytest.param("fsdp", 2, marks=SLOW)]
)
def test_two_processes_reinforce_as_one(strategy: str, accumulate: int, world_folder: Path, tmp_path: Path) -> None:
    """Each draws and scores pictures of its own prompts; policies and pauses are the same on both."""
    (tmp_path / "down").touch()
    base = [
        *(override for override in REINFORCE if "batch_size" not in override), "callbacks=audit",
        "stage.reinforce.supervised_weight=0.1", "stage.reinforce.loss.kl_weight=0.1", "stage.lr=1e-3",
        "stage.reinforce.rounds={steps: 2, decay: 0.5, decay_growth: 0.2}",
    ]  # fmt: skip
    pause = [
        f"+reward.red.down={tmp_path / 'down'}", "+reward.red.good_for=3",
        "stage.reinforce.patience={first_seconds: 0.2, longest_seconds: 0.2, give_up_minutes: 0.001}",
    ]  # fmt: skip
    train(world_folder, tmp_path / "one", 1, base=base)
    options = [f"machine.strategy={strategy}", *pause]
    with pytest.raises(AssertionError, match="the stage has waited for"):
        train(world_folder, tmp_path / "two", 2, *options, accumulate=accumulate, base=base)
    (tmp_path / "down").unlink()
    train(world_folder, tmp_path / "two", 2, *options, accumulate=accumulate, base=base)
    file = Path("checkpoints") / f"reinforce-step={STEPS}.ckpt"
    one, two = read_checkpoint(tmp_path / "one" / file), read_checkpoint(tmp_path / "two" / file)
    assert_runs_close(one, two)
    for name, policy in one["policies"].items():
        for part, weights in policy.items():
            torch.testing.assert_close(two["policies"][name][part], weights, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("strategy", ["fsdp", pytest.param("ddp", marks=SLOW)])
def test_batches_of_several_shapes_keep_no_process_waiting(strategy: str, world_folder: Path, tmp_path: Path) -> None:
    """Two processes have batches of different buckets in a step, one has the same ones after each other."""
    write_mixed_sizes("raw", 26)
    sources = f"[{{path: {Path('raw').absolute()}, split: train}}]"
    buckets = ["data.buckets=[[24,24],[16,32],[32,16]]", f"stage.sources={sources}", f"stage.val_sources={sources}"]
    more = ["stage.val_samples=26", "data.val_batch_size=4", *buckets]
    train(world_folder, tmp_path / "one", 1, *more, accumulate=2)
    train(world_folder, tmp_path / "two", 2, f"machine.strategy={strategy}", *more)
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert [line["keys"] for line in one] == [line["keys"] for line in two]
    assert [line["loss"] for line in one] == pytest.approx([line["loss"] for line in two], rel=2e-5)
    assert len(one) == 2 * STEPS
    assert_runs_close(saved(tmp_path / "one"), saved(tmp_path / "two"))


@pytest.mark.slow
def test_stages_that_train_different_parts_agree_too(world_folder: Path, tmp_path: Path) -> None:
    overrides = [
        "stages=[t2i_pretrain,ti2i_pretrain,finetune]",
        "stage_overrides.t2i_pretrain=['stage.trainable=[queries]']",
        "stage_overrides.ti2i_pretrain=['stage.accumulate=2']",
        "stage_overrides.finetune=['stage.trainable=[denoiser]','stage.keep_optimizer=true']",
    ]
    found = []
    for strategy, processes in (("auto", 1), ("ddp", 2), ("fsdp", 2)):
        launcher = "lightning" if strategy == "ddp" else "outside"  # which starts them once, for all stages
        folder = tmp_path / strategy
        train(world_folder, folder, processes, f"machine.strategy={strategy}", *overrides, launcher=launcher)
        stages = json.loads((folder / "report.json").read_text())["stages"]
        found.append([stage[name] for stage in stages for name in ("val_loss_first", "val_loss_last")])
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert found[2] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.slow
def test_a_sweep_of_two_processes_per_point(world_folder: Path, tmp_path: Path) -> None:
    pair = ["-m", "taps=last_n,final", f"hydra.sweep.dir={tmp_path}", "machine.strategy=ddp"]
    command = [*TRAIN, *pair[:1], *BASE, *pair[1:], "machine.devices=2", "stage.steps=2"]
    environment = os.environ | {"TBAC_SHAPES": str(world_folder), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, timeout=300, cwd=tmp_path)
    points = {f.parents[1].name: read_checkpoint(f) for f in tmp_path.glob("*/checkpoints/*-step=2.ckpt")}
    assert {tuple(c["tbac"]["config"]["model"]["taps"]["layers"]) for c in points.values()} == {(2, 3, 4, 5), (6,)}
    for name in points:
        assert {f.name for f in (tmp_path / name / "sample_log").iterdir()} == {"rank_0.jsonl", "rank_1.jsonl"}


def test_an_unknown_strategy_is_named() -> None:
    with pytest.raises(ValueError, match=r"machine.strategy must be one of auto, ddp, fsdp, got 'deepspeed'"):
        make_strategy("deepspeed")
    with pytest.raises(ValueError, match=r"machine.timeout_minutes must be positive, got 0"):
        make_strategy("ddp", 0)
