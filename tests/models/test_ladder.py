"""Queries and connectors."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from tbac.models.config import LadderConfig
from tbac.models.ladder import ConnectorMLP, Ladder
from tbac.models.taps import TapRule, attend, bundle, explicit, final, last_n, learned_mix, resolve_taps

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


def norm_plainly(states: torch.Tensor, norm: str) -> torch.Tensor:
    """Norm states (…, hidden) by the definition."""
    if norm == "layer":
        states = states - states.mean(-1, keepdim=True)
    return states if norm == "none" else states / (states.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def climb_plainly(built: Ladder, taps: torch.Tensor, norm: str) -> torch.Tensor:
    """Compute the contexts block by block and token by token, as the options are described."""
    plan = built.plan
    taps = norm_plainly(taps, norm)
    contexts = []
    mixing = [block for block, reading in enumerate(plan.list_readings()) if plan.mixed and len(reading) > 1]
    for block, reading in enumerate(plan.list_readings()):
        tokens = []
        for token in range(taps.shape[2]):
            states = [taps[position, :, token] for position in reading]
            if block in mixing:
                row = 0 if plan.mix == "shared" else mixing.index(block)
                scores = built.mix_logits[row].expand(taps.shape[1], -1)
                if built.mix_queries is not None:
                    keys = torch.stack([norm_plainly(state, "rms") for state in states], dim=1)
                    scores = scores + (keys * built.mix_queries[row]).sum(-1) / HIDDEN**0.5
                shares = scores.softmax(-1)
                if isinstance(built.connector, nn.ModuleList):  # one for each tap: what they give is mixed
                    states = [built.connector[position](taps[position, :, token]) for position in reading]
                mixed = sum(shares[:, i : i + 1] * state for i, state in enumerate(states))
                tokens.append(mixed if isinstance(built.connector, nn.ModuleList) else built.connector(mixed))
            elif isinstance(built.connector, nn.ModuleList):
                index = built.bundles.index(reading) if built.bundles else reading[0]
                tokens.append(built.connector[index](torch.cat(states, dim=-1)))
            else:
                tokens.append(built.connector(torch.cat(states, dim=-1)))
        contexts.append(torch.stack(tokens, dim=1))
    return torch.stack(contexts)


@pytest.mark.parametrize("norm", ["none", "rms", "layer"])
@pytest.mark.parametrize("connector", ["shared_mlp", "per_tap_mlp"])
@pytest.mark.parametrize(
    "rule",
    [
        last_n,
        final,
        bundle,
        partial(bundle, layers=[[1, 2], [3, 2], [1, 2], [6, 1]]),
        partial(bundle, blocks=[1, 2]),
        partial(learned_mix, layers="all"),
        partial(learned_mix, layers="all", shared=True),
        partial(learned_mix, layers=[2, 3], blocks=[2, 0]),
        partial(learned_mix, layers=[2, 3], shared=True, blocks=[2, 0]),
        attend,
        partial(attend, layers=[1, 4], blocks=[3, 1]),
    ],
)
def test_every_way_of_reading_layers_equals_the_plain_computation(rule: TapRule, connector: str, norm: str) -> None:
    built = ladder(rule, connector=connector, tap_norm=norm).double()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if name.startswith("mix_"):
                parameter.normal_()
    taps = (3 * states(built).double()).requires_grad_()
    contexts, expected = built(taps), climb_plainly(built, taps, norm)
    torch.testing.assert_close(contexts, expected, rtol=1e-5, atol=1e-6)  # norms are computed in float32
    weights = torch.randn_like(contexts)
    sources = [taps, *(p for name, p in built.named_parameters() if name != "queries")]
    for ours, plain in zip(
        torch.autograd.grad((contexts * weights).sum(), sources),
        torch.autograd.grad((expected * weights).sum(), sources),
        strict=True,
    ):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "rule", [attend, partial(learned_mix, layers=[1, 3], blocks=[0, 2]), partial(attend, blocks=[1])]
)
def test_the_shares_of_layers_tell_what_blocks_read(rule: TapRule) -> None:
    built = ladder(rule)
    taps = states(built)
    shares = built.compute_mix_weights(taps)
    assert shares.shape == (4, len(built.plan.layers))
    torch.testing.assert_close(shares.sum(-1), torch.ones(4))
    for row, reading in zip(shares, built.plan.list_readings(), strict=True):
        torch.testing.assert_close(row[list(reading)], torch.full((len(reading),), 1 / len(reading)))
    with pytest.raises(ValueError, match="taps=attend"):
        ladder(attend).compute_mix_weights()


def test_a_query_that_is_zero_attends_as_a_learned_mix() -> None:
    attending, mixing = ladder(attend), ladder(partial(learned_mix, layers="all"))
    mixing.load_state_dict({k: v for k, v in attending.state_dict().items() if k != "mix_queries"})
    taps = states(attending)
    torch.testing.assert_close(attending(taps), mixing(taps))
    attending(taps).square().sum().backward()
    assert attending.mix_queries.grad.abs().sum() > 0  # type: ignore[union-attr]


def test_norms_make_the_scale_of_a_layer_irrelevant() -> None:
    built = ladder(partial(learned_mix, layers="all"), tap_norm="rms")
    taps = states(built)
    scale = torch.tensor([0.5, 1, 2, 4, 8, 100]).view(-1, 1, 1, 1)
    torch.testing.assert_close(built(taps * scale), built(taps), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"connector": "mlp"}, "ladder.connector must be one of"),
        ({"tap_norm": "batch"}, "ladder.tap_norm must be one of none, rms, layer; got 'batch'"),
        ({"tap_norm": None}, "ladder.tap_norm must be one of"),
        ({"connector": "transformer", "num_heads": 3}, "ladder.num_heads=3 must divide"),
    ],
)
def test_bad_options_are_named(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ladder(last_n, **options)
