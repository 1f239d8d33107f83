"""Queries and connectors."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from tbac.models.config import LadderConfig
from tbac.models.ladder import ConnectorMLP, Ladder
from tbac.models.taps import TapRule, explicit, last_n, learned_mix, resolve_taps

HIDDEN, CHANNELS, QUERIES = 16, 24, 5


def ladder(rule: TapRule, **options: object) -> Ladder:
    torch.manual_seed(0)
    config = LadderConfig(**options)  # type: ignore[arg-type]
    return Ladder(resolve_taps(rule, 6, 4), QUERIES, HIDDEN, CHANNELS, config)


def states(built: Ladder) -> torch.Tensor:
    return torch.randn(len(built.plan.layers), 3, QUERIES, HIDDEN)


def test_the_shared_mlp_is_the_released_one() -> None:
    mlp = ConnectorMLP(HIDDEN, CHANNELS)
    x = torch.randn(3, HIDDEN)
    first, _, second, norm = mlp
    hidden = second(nn.functional.gelu(first(x), approximate="tanh"))
    expected = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-5) * math.sqrt(5.5)
    torch.testing.assert_close(mlp(x), expected)
    assert torch.equal(norm.weight, torch.full((CHANNELS,), math.sqrt(5.5)))


def test_one_context_per_block_in_block_order() -> None:
    built = ladder(partial(explicit, layers=(5, 1, 3, 1)))
    taps = states(built)
    contexts = built(taps)
    assert contexts.shape == (4, 3, QUERIES, CHANNELS)
    for block, layer in enumerate((5, 1, 3, 1)):
        torch.testing.assert_close(contexts[block], built.connector(taps[built.plan.layers.index(layer)]))


def test_one_mlp_per_tap() -> None:
    built = ladder(last_n, connector="per_tap_mlp")
    taps = states(built)
    contexts = built(taps)
    assert len(built.connector) == 4  # type: ignore[arg-type]
    for index in range(4):
        torch.testing.assert_close(contexts[index], built.connector[index](taps[index]))  # type: ignore[index]
    assert not torch.equal(built.connector[0](taps[0]), built.connector[1](taps[0]))  # type: ignore[index]


def test_the_transformer_connector_looks_both_ways() -> None:
    built = ladder(last_n, connector="transformer", num_heads=4)
    taps = states(built).requires_grad_()
    built(taps)[0, 0, 0].sum().backward()
    reached = taps.grad[0, 0].abs().sum(-1)  # type: ignore[index]
    assert (reached > 0).all()  # the first query's context depends on every query
    assert taps.grad[0, 1].abs().sum() == 0  # type: ignore[index]
    assert taps.grad[1].abs().sum() == 0  # type: ignore[index]


def test_a_learned_mix_starts_as_the_mean_and_learns() -> None:
    built = ladder(partial(learned_mix, layers=(1, 4, 6)))
    taps = states(built)
    contexts = built(taps)
    for block in range(4):
        torch.testing.assert_close(contexts[block], built.connector(taps.mean(0)))
    torch.testing.assert_close(built.compute_mix_weights().sum(-1), torch.ones(4))
    contexts[2].square().sum().backward()
    assert built.mix_logits.grad[2].abs().max() > 0  # type: ignore[index]
    assert built.mix_logits.grad[0].abs().max() == 0  # type: ignore[index]


def test_a_mix_that_has_decided_equals_the_explicit_taps() -> None:
    mixed = ladder(partial(learned_mix, layers=(1, 4, 6)))
    listed = ladder(partial(explicit, layers=(6, 1, 4, 4)))
    listed.load_state_dict({k: v for k, v in mixed.state_dict().items() if k != "mix_logits"})
    with torch.no_grad():
        for block, candidate in enumerate((2, 0, 1, 1)):
            mixed.mix_logits[block, candidate] = 100.0
    taps = torch.randn(3, 2, QUERIES, HIDDEN)
    torch.testing.assert_close(mixed(taps), listed(taps))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"connector": "mlp"}, "ladder.connector must be one of"),
        ({"connector": "transformer", "num_heads": 3}, "ladder.num_heads=3 must divide"),
    ],
)
def test_bad_options_are_named(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ladder(last_n, **options)
