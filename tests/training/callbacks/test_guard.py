"""The guard: a rejected step is as if its batch had never been drawn."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from tbac.data.datamodule import StagedDataModule
from tbac.models import UniImage
from tbac.models.saved import read_checkpoint
from tbac.training.callbacks.ema import EMA
from tbac.training.callbacks.guard import DivergedError, Guard
from tbac.training.callbacks.stage_transition import StageTransition
from tbac.training.gradients import find_component
from tbac.training.spikes import RobustRule
from tests.helpers.training import make_data, make_module, make_trainer
from tests.helpers.worlds import load_small_model


class Poison(L.Callback):
    """Spoils the latents of some batches, counted from 0."""

    def __init__(self, spoil: Callable[[torch.Tensor], torch.Tensor], *batches: int) -> None:
        self.spoil, self.batches = spoil, batches

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx in self.batches:
            batch.latents = self.spoil(batch.latents)


class Skip(L.Callback):
    """Leaves batches out: what a rejected step must be equal to."""

    def __init__(self, *batches: int) -> None:
        self.batches = batches

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_idx in self.batches:
            pl_module.reject_step()


def nan(latents: torch.Tensor) -> torch.Tensor:
    return latents * float("nan")


def huge(latents: torch.Tensor) -> torch.Tensor:
    return latents * 100


def guard_of(**options: Any) -> Guard:
    return Guard(RobustRule(window=16, warmup=4), **({"then": "skip"} | options))


def trained(model: UniImage, state: dict, steps: int, *callbacks: L.Callback, **options: Any) -> Any:
    """Train from `state`; returns everything that a step changes."""
    model.load_trained_state(state, "x")
    module = make_module(model, steps=20)
    average = EMA(0.5)
    trainer = make_trainer(steps, callbacks=[average, *callbacks], gradient_clip_val=1.0, **options)
    held: dict[str, Any] = {}

    class Keep(L.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            optimizer = trainer.optimizers[0]
            held["weights"] = [p.detach().clone() for p in pl_module.parameters()]
            held["average"] = [a.clone() for a in average.average]
            held["moments"] = [v.clone() for p in pl_module.parameters() for v in optimizer.state[p].values()]
            held["rate"] = optimizer.param_groups[0]["lr"]

    trainer.callbacks.insert(0, Keep())
    trainer.fit(module, datamodule=make_data(model))
    return module, held


def assert_same(one: dict, other: dict) -> None:
    assert one["rate"] == other["rate"]
    for part in ("weights", "average", "moments"):
        assert all(torch.equal(a, b) for a, b in zip(one[part], other[part], strict=True)), part


@pytest.fixture
def start(model: UniImage) -> dict:
    return {k: v.clone() for k, v in model.get_trained_state().items()}


@pytest.mark.parametrize(("spoil", "at"), [(nan, 0), (nan, 6), (huge, 6)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_rejected_step_is_an_exact_no_op(model: UniImage, start: dict, spoil: Any, at: int, accumulate: int) -> None:
    batches = range(at * accumulate, (at + 1) * accumulate)
    options = {"accumulate_grad_batches": accumulate}
    module, guarded = trained(model, start, 8, Poison(spoil, batches[-1]), guard_of(), **options)
    assert module.steps == 7
    _, expected = trained(model, start, 8, Skip(batches[-1]), **options)
    assert_same(guarded, expected)
    assert not any(w.isnan().any() for w in guarded["weights"])


def test_without_faults_the_guard_changes_no_bit(model: UniImage, start: dict) -> None:
    assert_same(trained(model, start, 6, guard_of())[1], trained(model, start, 6)[1])


def test_a_rejection_names_norm_threshold_loss_stage_components_and_samples(
    model: UniImage, start: dict, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        trained(model, start, 8, Poison(huge, 6), guard_of())
    (message,) = [r.getMessage() for r in caplog.records if "rejected" in r.getMessage()]
    for words in (
        "after 6 of stage t2i_pretrain",
        "threshold",
        "loss",
        "queries",
        "connector",
        "block_00",
        "tap_02",
        "tap_05",
        "rank 0: t2i",
    ):
        assert words in message


def test_rewinding_goes_back_to_the_snapshot_and_on_past_the_spike(model: UniImage, start: dict) -> None:
    module, rewound = trained(model, start, 9, Poison(nan, 3, 4), guard_of(then="rewind", patience=2))
    assert module.steps == 4
    _, expected = trained(model, start, 9, Skip(0, 1, 2, 3, 4))  # the snapshot is the start: only 5 to 8 count
    assert_same(rewound, expected)


def test_lowering_the_rate_lasts(model: UniImage, start: dict) -> None:
    _, lowered = trained(model, start, 8, Poison(nan, 3, 4), guard_of(then="lower_lr", patience=2, lr_factor=0.25))
    _, plain = trained(model, start, 8, Skip(3, 4))
    assert lowered["rate"] == pytest.approx(0.25 * plain["rate"], rel=1e-6)


def test_too_many_rejects_stop_with_a_message(model: UniImage, start: dict) -> None:
    with pytest.raises(DivergedError, match=r"3 of the last 5 steps.*max_rejects=3.*loss is nan"):
        trained(model, start, 9, Poison(nan, 2, 3, 4), guard_of(max_rejects=3))


def test_the_norm_is_that_of_the_gradients(model: UniImage) -> None:
    module = make_module(model)
    for index, parameter in enumerate(module.parameters()):
        parameter.grad = torch.full_like(parameter, float(index % 3))
    norms = module.measure_gradients()
    whole = torch.cat([p.grad.flatten() for p in module.parameters()]).double().norm()
    torch.testing.assert_close(norms.total, whole)
    parts = norms.by_component()
    assert sum(v**2 for v in parts.values()) == pytest.approx(whole.item() ** 2)
    assert {"queries", "connector", "denoiser", "block_00", "block_01"} <= set(parts)


@pytest.mark.parametrize("taps", ["last_n", "final", "learned_mix"])
def test_the_norm_of_a_tap_is_that_of_the_contexts_it_feeds(in_world: Path, taps: str) -> None:
    model = load_small_model(in_world, f"taps={taps}")
    module = make_module(model)
    module.measure_taps = True
    batch = next(iter(make_data(model).train_dataloader()))
    noise, sigma = torch.randn_like(batch.latents), torch.tensor([0.1, 0.4, 0.7, 1.0])
    states = []
    encode = model.encode_condition

    def kept(prompt: Any) -> Any:
        condition = encode(prompt)
        condition.states.retain_grad()
        states.append(condition.states)
        return condition

    model.encode_condition = kept  # type: ignore[method-assign]
    for _ in range(2):  # two batches of one step
        module.compute_loss(batch, noise, sigma, batch.latents).backward()
    squares = sum(s.grad.double().square().sum((1, 2, 3)) for s in states)
    expected = {"last_n": squares.sqrt(), "final": squares.sum().sqrt()[None], "learned_mix": squares.sqrt()}[taps]
    torch.testing.assert_close(torch.tensor(list(module.compute_tap_norms().values())).double(), expected)


def test_components_have_names() -> None:
    assert find_component("ladder.queries") == "queries"
    assert find_component("denoiser.transformer.transformer_blocks.11.attn1.to_q.weight") == "block_11"
    assert find_component("ladder.mix_logits") == "mix"


def test_after_going_on_a_rewind_leads_to_the_checkpoint(model: UniImage, tmp_path: Path) -> None:
    trainer = make_trainer(4, callbacks=[guard_of(then="rewind")])
    trainer.fit(make_module(model), datamodule=StagedDataModule([make_data(model)]))
    trainer.save_checkpoint(tmp_path / "four.ckpt")
    checkpoint = read_checkpoint(tmp_path / "four.ckpt")
    model.load_trained_state(checkpoint["state_dict"], "four.ckpt")
    module = make_module(model, steps=20)
    transition = StageTransition([module.stage], checkpoint=checkpoint)
    guarded = [Poison(nan, 1, 2), guard_of(then="rewind", patience=2)]
    transition.fit(
        lambda stage, callbacks: make_trainer(4, callbacks=[*guarded, *callbacks]),
        module,
        StagedDataModule([make_data(model)]),
    )
    assert module.run_step == 8
    assert module.steps == 5  # step 5 was taken and undone, two were rejected, the last one counts


class SpoilAverage(L.Callback):
    """Spoils one value of the weight average after a batch, and notes the weights then."""

    def __init__(self, average: EMA, value: float, at: int) -> None:
        self.average, self.value, self.at = average, value, at

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.at:
            self.average.average[3].flatten()[0] = self.value


@pytest.mark.parametrize("saved", [False, True], ids=["validated", "saved"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e30, 1e6])
def test_an_average_that_is_none_starts_anew_before_it_is_used_or_saved(
    model: UniImage, tmp_path: Path, value: float, saved: bool, caplog: pytest.LogCaptureFixture
) -> None:
    average = EMA(0.9)
    validation = {"limit_val_batches": 0} if saved else {"val_check_interval": 1, "check_val_every_n_epoch": None}
    trainer = make_trainer(4, callbacks=[average, SpoilAverage(average, value, 3), guard_of()], **validation)

    class Save(L.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.save_checkpoint(tmp_path / "x.ckpt")

    trainer.callbacks.append(Save())
    trainer.fit(make_module(model), datamodule=StagedDataModule([make_data(model)]))
    state = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert all(v.isfinite().all() and v.abs().max() < 1e4 for v in state["state_dict"].values())
    assert "the weight average is broken in" in caplog.text
    assert all(p.isfinite().all() for p in model.denoiser.parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 100.0])
def test_the_validation_loss_of_the_average_is_watched(
    model: UniImage, value: float, caplog: pytest.LogCaptureFixture
) -> None:
    module = make_module(model, steps=8)
    module.validation_step = lambda batch, batch_idx: module.log(  # type: ignore[method-assign]
        "val/loss", torch.tensor(value if module.steps > 4 else 0.5), batch_size=1
    )
    options = {"val_check_interval": 1, "check_val_every_n_epoch": None}
    trainer = make_trainer(6, callbacks=[EMA(0.9), guard_of()], **options)
    data = make_data(model)
    if value == 100.0:
        trainer.fit(module, datamodule=data)
        assert "the validation loss after step 5 is 100" in caplog.text
        return
    with pytest.raises(DivergedError, match=f"validation loss after step 5 of stage t2i_pretrain is {value}"):
        trainer.fit(module, datamodule=data)


def test_a_snapshot_is_of_weights_that_work(model: UniImage, start: dict, caplog: pytest.LogCaptureFixture) -> None:
    guard = guard_of(then="rewind", patience=2)

    class SpoilWeights(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 3:
                next(pl_module.parameters()).data.flatten()[0] = float("nan")
                guard.on_save_checkpoint(trainer, pl_module, {})

    module, held = trained(model, start, 9, SpoilWeights(), guard)
    assert "the weights after step 4 aren't finite" in caplog.text
    assert all(w.isfinite().all() for w in held["weights"])
    assert module.steps == 3  # back to the start after two rejected steps, and three more
