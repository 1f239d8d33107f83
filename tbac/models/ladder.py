"""The ladder: learnable queries, and connectors that turn tapped states into one context per denoiser block."""

import math

import torch
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn

from tbac.models.taps import TapPlan

CONNECTORS = ("shared_mlp", "per_tap_mlp", "transformer")


def check_ladder(
    num_queries: int,
    hidden_size: int,
    connector: str = "shared_mlp",
    num_layers: int = 2,
    num_heads: int = 8,
    query_std: float = 0.02,
    prompt_context: bool = False,
) -> None:
    """Raise ValueError for options that no `Ladder` can be built from; arguments as there."""
    if num_queries < 1:
        raise ValueError(f"model.num_queries must be at least 1, got {num_queries}")
    if connector not in CONNECTORS:
        raise ValueError(f"ladder.connector must be one of {', '.join(CONNECTORS)}; got {connector!r}")
    if connector == "transformer" and (num_heads < 1 or hidden_size % num_heads):
        raise ValueError(f"ladder.num_heads={num_heads} must divide the MLLM's hidden size {hidden_size}")
    if connector == "transformer" and prompt_context:
        raise ValueError("ladder.prompt_context needs ladder.connector=shared_mlp or per_tap_mlp")
    if num_layers < 1 or query_std < 0:
        raise ValueError(
            f"ladder.num_layers must be at least 1 and ladder.query_std at least 0, got {num_layers}, {query_std}"
        )


class ConnectorMLP(nn.Sequential):
    """Linear, GELU (tanh), Linear, RMSNorm with weight sqrt(5.5), as released.

    Args:
        hidden_size: width of the MLLM.
        channels: caption channels of the denoiser.
    """

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

    def __init__(self, hidden_size: int, channels: int, num_layers: int = 2, num_heads: int = 8) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            hidden_size, num_heads, 4 * hidden_size, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        self.mlp = ConnectorMLP(hidden_size, channels)

    def forward(self, states: Tensor) -> Tensor:
        """(…, query, hidden) -> (…, query, channel)."""
        return self.mlp(self.encoder(states.flatten(0, -3)).view_as(states))


class Ladder(nn.Module):
    """Queries and connectors.

    Args:
        plan: taps and which block reads which.
        num_queries: number of learnable queries.
        hidden_size: width of the MLLM.
        channels: caption channels of the denoiser.
        connector: `shared_mlp` (released), `per_tap_mlp`, or `transformer` (shared by the taps).
        num_layers: encoder layers of the `transformer` connector.
        num_heads: its attention heads.
        query_std: standard deviation of the queries at the start.
        prompt_context: the prompt's own tapped states follow the queries in every context, through the same connectors.
    """

    def __init__(
        self,
        plan: TapPlan,
        num_queries: int,
        hidden_size: int,
        channels: int,
        connector: str = "shared_mlp",
        num_layers: int = 2,
        num_heads: int = 8,
        query_std: float = 0.02,
        prompt_context: bool = False,
    ) -> None:
        super().__init__()
        check_ladder(num_queries, hidden_size, connector, num_layers, num_heads, query_std, prompt_context)
        self.plan = plan
        self.prompt_context = prompt_context
        self.queries = nn.Parameter(query_std * torch.randn(num_queries, hidden_size))
        if connector == "per_tap_mlp":
            self.connector: nn.Module = nn.ModuleList(ConnectorMLP(hidden_size, channels) for _ in plan.layers)
        elif connector == "transformer":
            self.connector = TransformerConnector(hidden_size, channels, num_layers, num_heads)
        else:
            self.connector = ConnectorMLP(hidden_size, channels)
        if plan.mixed:
            self.mix_logits = nn.Parameter(torch.zeros(plan.num_blocks, len(plan.layers)))

    def mix_weights(self) -> Tensor:
        """(block, candidate), rows sum to 1: the share of each candidate layer in each block's tap."""
        return self.mix_logits.softmax(dim=-1)

    def forward(self, taps: Tensor) -> Tensor:
        """Contexts from tapped states.

        Args:
            taps: (tap, batch, query, hidden), in the order of `plan.layers`.

        Returns:
            (block, batch, query, channel).
        """
        taps = taps.to(self.queries.dtype)
        if isinstance(self.connector, nn.ModuleList):
            contexts = torch.stack([mlp(tap) for mlp, tap in zip(self.connector, taps, strict=True)])
        else:
            if self.plan.mixed:
                taps = torch.einsum("kt,tbqh->kbqh", self.mix_weights().to(taps.dtype), taps)
            contexts = self.connector(taps)
        if self.plan.mixed:
            if isinstance(self.connector, nn.ModuleList):
                return torch.einsum("kt,tbqc->kbqc", self.mix_weights().to(contexts.dtype), contexts)
            return contexts
        if self.plan.assignment == tuple(range(len(self.plan.layers))):
            return contexts
        return contexts[list(self.plan.assignment)]
