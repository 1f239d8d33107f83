"""Parameter groups, optimizers and the schedule."""

import math
from itertools import pairwise

import pytest
import torch
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from tbac.models import UniImage
from tbac.training.optimizers import (
    adamw,
    adamw8bit,
    collect_named_state,
    load_named_state,
    make_parameter_groups,
    warmup_cosine,
)


def test_norms_biases_and_queries_don_t_decay(model: UniImage) -> None:
    groups = make_parameter_groups([model.ladder, model.denoiser], 0.05)
    assert [g["weight_decay"] for g in groups] == [0.05, 0, 0.05, 0]
    no_decay = {id(p) for g in groups if not g["weight_decay"] for p in g["params"]}
    assert id(model.ladder.queries) in no_decay
    named = [*model.ladder.named_parameters(), *model.denoiser.named_parameters()]
    assert len(named) == sum(len(g["params"]) for g in groups)
    for name, parameter in named:
        if name.endswith("bias") or "norm" in name:
            assert id(parameter) in no_decay, name
    assert any(parameter.ndim >= 2 and id(parameter) not in no_decay for _, parameter in named)


def test_modules_share_no_group_and_none_is_empty(model: UniImage) -> None:
    model.denoiser.requires_grad_(False)
    groups = make_parameter_groups([model.ladder, model.denoiser], 0.05)
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in model.ladder.parameters()}
    assert all(g["params"] for g in groups)


def test_decay_shrinks_matrices_alone() -> None:
    layer = torch.nn.Linear(4, 4)
    before = {k: v.detach().clone() for k, v in layer.named_parameters()}
    optimizer = adamw(make_parameter_groups([layer], 0.5), lr=0.1)
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(layer.weight, before["weight"] * (1 - 0.1 * 0.5))
    assert torch.equal(layer.bias, before["bias"])


def test_fused_adamw_equals_the_plain_one() -> None:
    results = []
    for fused in (True, False):
        torch.manual_seed(0)
        layer = torch.nn.Linear(16, 16)
        optimizer = adamw(make_parameter_groups([layer], 0.05), lr=1e-2, fused=fused)
        for step in range(20):
            optimizer.zero_grad()
            layer(torch.full((2, 16), float(step))).square().mean().backward()
            optimizer.step()
        results.append(layer.weight.detach())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [3, 5])
def test_state_of_another_shape_is_named_and_not_loaded(rows: int) -> None:
    def make(count: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        module = torch.nn.Linear(2, count, bias=False)
        return module, adamw(make_parameter_groups([module], 0.0), 1e-3)

    module, optimizer = make(4)
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = collect_named_state(optimizer, module)
    other, fresh = make(rows)
    with pytest.raises(ValueError, match=rf"weight has shape \({rows}, 2\) here, and \(4, 2\) in the stage before"):
        load_named_state(fresh, other, state)
    same, fresh = make(4)
    load_named_state(fresh, same, state)
    assert torch.equal(fresh.state[same.weight]["exp_avg"], optimizer.state[module.weight]["exp_avg"])


def test_adamw8bit_trains() -> None:
    torch.manual_seed(0)
    layer, inputs = torch.nn.Linear(64, 64), torch.randn(32, 64)
    targets = inputs @ torch.randn(64, 64)
    optimizer = adamw8bit(make_parameter_groups([layer], 0.0), lr=3e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (layer(inputs) - targets).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    states = {v.dtype for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v) and v.numel() == 4096}
    assert states == {torch.uint8}


def test_warm_up_then_cosine_to_the_floor() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-4)
    scheduler = warmup_cosine(optimizer, total_steps=100, warmup_steps=10, min_lr=1e-5)
    rates = []
    for _ in range(130):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[:10] == pytest.approx([1e-4 * (i + 1) / 10 for i in range(10)])
    middle = 10 + 90 // 2
    assert rates[middle] == pytest.approx(1e-5 + 9e-5 * 0.5 * (1 + math.cos(math.pi * 0.5)))
    assert rates[100:] == pytest.approx([1e-5] * 30)
    assert all(a >= b for a, b in pairwise(rates[10:]))


def test_the_schedule_is_that_of_transformers_from_the_peak_to_the_end() -> None:
    factories = (warmup_cosine, get_cosine_with_min_lr_schedule_with_warmup)
    names = ({"total_steps": 60, "warmup_steps": 7}, {"num_training_steps": 60, "num_warmup_steps": 7})
    found = []
    for factory, lengths in zip(factories, names, strict=True):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
        scheduler = factory(optimizer, **lengths, min_lr=2e-5)
        rates = []
        for _ in range(61):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        found.append(rates[7:])
    assert found[0] == pytest.approx(found[1], rel=1e-12)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"total_steps": 10, "warmup_steps": 11, "min_lr": 0.0}, "stage.warmup_steps=11"),
        ({"total_steps": 10, "warmup_steps": 1, "min_lr": 1.0}, "stage.min_lr=1.0"),
    ],
)
def test_schedules_that_don_t_fit_are_named(options: dict, words: str) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-4)
    with pytest.raises(ValueError, match=words):
        warmup_cosine(optimizer, **options)
