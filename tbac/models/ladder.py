"""The ladder: learnable queries, and connectors that turn tapped states into one context per denoiser block.

A connector is a module that turns states (tap, batch, token, hidden) into contexts (tap, batch, token, channel). It is
made by a callable that takes `num_taps`, `hidden_size` and `channels`. Two attributes of its class, False where they
are missing, say how it may be used:

- `per_token`: each token is projected apart from the others, so the prompt's tokens may follow the queries.
- `per_tap`: each tap has its own weights, so a learned mix is computed from the contexts and not from the states.
"""

import math

import torch
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn

from tbac.models.config import LadderConfig
from tbac.models.taps import TapPlan, check_call


class ConnectorMLP(nn.Sequential):
    """Linear, GELU (tanh), Linear, RMSNorm with weight sqrt(5.5), as released.

    Args:
        hidden_size: width of the MLLM.
        channels: caption channels of the denoiser.
    """

    per_token = True

    def __init__(self, hidden_size: int, channels: int) -> None:
        norm = RMSNorm(channels, eps=1e-5, elementwise_affine=True)
        nn.init.constant_(norm.weight, math.sqrt(5.5))
        super().__init__(
            nn.Linear(hidden_size, channels), nn.GELU(approximate="tanh"), nn.Linear(channels, channels), norm
        )


class TransformerConnector(nn.Module):
    """A bidirectional transformer encoder over the queries, then the MLP (the way of MetaQuery).

    Args:
        hidden_size: width of the MLLM and of the encoder.
        channels: caption channels of the denoiser.
        num_layers: encoder layers.
        num_heads: attention heads; must divide `hidden_size`.
    """

    def __init__(self, hidden_size: int, channels: int, num_layers: int, num_heads: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            hidden_size, num_heads, 4 * hidden_size, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        self.mlp = ConnectorMLP(hidden_size, channels)

    def forward(self, states: Tensor) -> Tensor:
        """(…, query, hidden) -> (…, query, channel)."""
        return self.mlp(self.encoder(states.flatten(0, -3)).view_as(states))


class PerTapMLP(nn.ModuleList):
    """One MLP per tap.

    Args:
        num_taps: how many.
        hidden_size: width of the MLLM.
        channels: caption channels of the denoiser.
    """

    per_tap = per_token = True

    def __init__(self, num_taps: int, hidden_size: int, channels: int) -> None:
        super().__init__(ConnectorMLP(hidden_size, channels) for _ in range(num_taps))

    def forward(self, states: Tensor) -> Tensor:
        """(tap, …, hidden) -> (tap, …, channel)."""
        return torch.stack([mlp(tap) for mlp, tap in zip(self, states, strict=True)])


def build_connector(config: LadderConfig, num_taps: int, hidden_size: int, channels: int) -> nn.Module:
    """Build the connector that a config names.

    Raises:
        ValueError: for a user's connector that doesn't take these sizes or isn't a module.
    """
    if config.connector == "shared_mlp":
        return ConnectorMLP(hidden_size, channels)
    if config.connector == "per_tap_mlp":
        return PerTapMLP(num_taps, hidden_size, channels)
    if config.connector == "transformer":
        return TransformerConnector(hidden_size, channels, config.num_layers, config.num_heads)
    assert callable(config.connector)
    sizes = {"num_taps": num_taps, "hidden_size": hidden_size, "channels": channels}
    check_call("ladder.connector", config.connector, **sizes)
    connector = config.connector(**sizes)
    if not isinstance(connector, nn.Module):
        raise ValueError(f"ladder.connector must make a torch module, got {connector!r}")
    check_connector_shape(connector, num_taps, hidden_size, channels)
    return connector


def check_connector_shape(connector: nn.Module, num_taps: int, hidden_size: int, channels: int) -> None:
    """Try a user's connector on zeros, so that a wrong shape is an error now and not at the first validation.

    Raises:
        ValueError: when it can't be run, or gives another shape than (tap, batch, token, channel).
    """
    first = next(connector.parameters(), torch.empty(0))
    states = torch.zeros(num_taps, 1, 2, hidden_size, device=first.device, dtype=first.dtype)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            contexts = connector(states)
    except Exception as error:
        raise ValueError(
            f"ladder.connector {type(connector).__name__} can't be run on states of shape {tuple(states.shape)}, which "
            f"are (tap, batch, token, hidden): {type(error).__name__}: {error}"
        ) from error
    expected, shape = (num_taps, 1, 2, channels), tuple(getattr(contexts, "shape", ()))
    if shape != expected:
        raise ValueError(
            f"ladder.connector {type(connector).__name__} gives the shape {shape} for states of shape "
            f"{tuple(states.shape)}; it must be {expected}, (tap, batch, token, channel)"
        )


class Ladder(nn.Module):
    """Queries and connectors.

    Args:
        plan: the taps, and which block reads which.
        num_queries: number of learnable queries.
        hidden_size: width of the MLLM.
        channels: caption channels of the denoiser.
        config: the ladder's options.

    Raises:
        ValueError: when the connector doesn't fit the MLLM's width, or mixes tokens that the prompt would join.
    """

    def __init__(
        self, plan: TapPlan, num_queries: int, hidden_size: int, channels: int, config: LadderConfig | None = None
    ) -> None:
        super().__init__()
        config = config or LadderConfig()
        config.check_width(hidden_size)
        self.plan = plan
        self.prompt_layers = plan.layers if config.prompt_context else ()  # where the prompt's own states are tapped
        self.queries = nn.Parameter(config.query_std * torch.randn(num_queries, hidden_size))
        self.connector = build_connector(config, len(plan.layers), hidden_size, channels)
        config.check_prompt_context(getattr(self.connector, "per_token", False))
        if plan.mixed:
            self.mix_logits = nn.Parameter(torch.zeros(plan.num_blocks, len(plan.layers)))

    def compute_mix_weights(self) -> Tensor:
        """Compute the share of each candidate layer in each block's tap: (block, candidate), rows sum to 1."""
        return self.mix_logits.softmax(dim=-1)

    def forward(self, taps: Tensor) -> Tensor:
        """Turn tapped states into contexts.

        Args:
            taps: (tap, batch, query, hidden), in the order of `plan.layers`.

        Returns:
            (block, batch, query, channel).
        """
        taps = taps.to(self.queries.dtype)
        if self.plan.mixed and getattr(self.connector, "per_tap", False):
            return self._mix(self.connector(taps))
        if self.plan.mixed:
            return self.connector(self._mix(taps))
        contexts = self.connector(taps)
        if self.plan.assignment == tuple(range(len(self.plan.layers))):
            return contexts
        return contexts[list(self.plan.assignment)]

    def _mix(self, states: Tensor) -> Tensor:
        """Mix taps for each block: (tap, batch, query, width) -> (block, batch, query, width)."""
        # k = block, t = tap, b = batch, q = query, w = width
        return torch.einsum("kt,tbqw->kbqw", self.compute_mix_weights().to(states.dtype), states)
