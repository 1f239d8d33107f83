"""The ladder: learnable queries, norms and mixtures of tapped states, connectors to one context per denoiser block.

Tapped states are normed first (`ladder.tap_norm`), then joined or mixed as the tap plan says, then projected. With
`prompt_context` all of this holds for the prompt's tokens as for the queries, since nothing looks across tokens.

A connector is a module that turns states (tap, batch, token, hidden) into contexts (tap, batch, token, channel). It is
made by a callable that takes `num_taps`, `hidden_size` and `channels`; where a block reads several joined layers, a tap
is such a bundle, and `hidden_size` is that of all its layers. Two attributes of its class, False where they
are missing, say how it may be used:

- `per_token`: each token is projected apart from the others, so the prompt's tokens may follow the queries.
- `per_tap`: each tap has its own weights, so a learned mix is computed from the contexts and not from the states.
"""

import math

import torch
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn
from torch.nn.functional import layer_norm, rms_norm

from tbac.models.config import LadderConfig
from tbac.models.taps import TapPlan, check_call

NORM_EPS = 1e-6


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


def normalize_states(states: Tensor, norm: str) -> Tensor:
    """Norm each token of tapped states by itself, without weights, in float32.

    Args:
        states: (…, hidden).
        norm: `none`; `rms`: divided by the root mean square; `layer`: the mean is subtracted before.

    Returns:
        (…, hidden), of the type that came in.
    """
    if norm == "none":
        return states
    normed = layer_norm if norm == "layer" else rms_norm
    return normed(states.float(), states.shape[-1:], eps=NORM_EPS).to(states.dtype)


def compute_attended_weights(queries: Tensor, biases: Tensor, states: Tensor) -> Tensor:
    """Compute how learned queries attend over the layers of each token.

    The share of layer l in a token with states h is the softmax over l of `query . rms(h_l) / sqrt(hidden) + bias_l`.

    Args:
        queries: (mix, hidden).
        biases: (mix, layer).
        states: (layer, batch, token, hidden).

    Returns:
        (mix, layer, batch, token); sums over layers are 1.
    """
    # m = mix, l = layer, b = batch, t = token, h = hidden
    keys = normalize_states(states, "rms")
    scores = torch.einsum("mh,lbth->mlbt", queries.to(keys.dtype), keys) / math.sqrt(keys.shape[-1])
    return (scores.float() + biases[:, :, None, None]).softmax(dim=1)


class Ladder(nn.Module):
    """Queries, norms, mixtures and connectors.

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
        config.check_width(hidden_size, plan.bundle_size)
        self.plan = plan
        self.tap_norm = config.tap_norm
        self.prompt_layers = plan.layers if config.prompt_context else ()  # where the prompt's own states are tapped
        self.queries = nn.Parameter(config.query_std * torch.randn(num_queries, hidden_size))
        # What is computed once, and which block reads what of it.
        contexts, self.context_of_block = plan.list_contexts()
        self.bundles = contexts if plan.bundle_size > 1 else []
        num_taps = len(self.bundles) or len(plan.layers)
        self.connector = build_connector(config, num_taps, hidden_size * plan.bundle_size, channels)
        config.check_prompt_context(getattr(self.connector, "per_token", False))
        # Mixes start as the mean; a query that attends over layers starts at zero, and so as the same mean.
        self.candidates = [list(context) for context in contexts if len(context) > 1 and plan.mixed]
        self.alone = [context[0] for context in contexts if len(context) == 1 and plan.mixed]
        self.mix_queries: nn.Parameter | None = None
        if plan.mixed:
            self.mix_logits = nn.Parameter(torch.zeros(len(self.candidates), len(self.candidates[0])))
            if plan.mix == "attend":
                self.mix_queries = nn.Parameter(torch.zeros(len(self.candidates), hidden_size))

    def compute_mix_weights(self, taps: Tensor | None = None) -> Tensor:
        """Compute the share of each layer in what each block reads, where taps are mixed.

        Args:
            taps: (tap, batch, token, hidden) as in `forward`, needed where blocks attend over layers: their shares
                differ from token to token, and the mean over all tokens is returned.

        Returns:
            (block, layer), in the order of `plan.layers`; rows sum to 1.

        Raises:
            ValueError: where `taps` are needed and missing.
        """
        if self.mix_queries is None:
            shares = self.mix_logits.softmax(dim=-1)
        elif taps is None:
            raise ValueError("with taps=attend the weights depend on the tapped states; give taps")
        else:
            states = normalize_states(taps.to(self.queries.dtype), self.tap_norm)[self.candidates[0]]
            shares = compute_attended_weights(self.mix_queries, self.mix_logits, states).mean(dim=(2, 3))
        weights = shares.new_zeros(len(self.candidates) + len(self.alone), len(self.plan.layers))
        weights[: len(shares), self.candidates[0]] = shares
        # A block that reads one layer alone has all of its share there.
        for row, position in enumerate(self.alone, start=len(shares)):
            weights[row, position] = 1.0
        return weights[self.context_of_block]

    def forward(self, taps: Tensor) -> Tensor:
        """Turn tapped states into contexts.

        Args:
            taps: (tap, batch, query, hidden), in the order of `plan.layers`.

        Returns:
            (block, batch, query, channel).
        """
        states = normalize_states(taps.to(self.queries.dtype), self.tap_norm)
        if self.plan.mixed and getattr(self.connector, "per_tap", False):
            contexts = self._mix(self.connector(states), states)
        elif self.plan.mixed:
            contexts = self.connector(self._mix(states, states))
        elif self.bundles:
            bundles = [torch.cat([states[position] for position in bundle], dim=-1) for bundle in self.bundles]
            contexts = self.connector(torch.stack(bundles))
        else:
            contexts = self.connector(states)
        if self.context_of_block == list(range(len(contexts))):
            return contexts
        return contexts[self.context_of_block]

    def _mix(self, values: Tensor, states: Tensor) -> Tensor:
        """Mix what each layer gives, and add what blocks read alone.

        Args:
            values: (layer, batch, token, width): the states, or what was computed from each of them.
            states: (layer, batch, token, hidden), over which queries attend.

        Returns:
            (context, batch, token, width).
        """
        # m = mix, l = layer, b = batch, t = token, w = width
        candidates = self.candidates[0]
        everything = candidates == list(range(len(values)))
        mixed = values if everything else values[candidates]
        if self.mix_queries is None:
            mixes = torch.einsum("ml,lbtw->mbtw", self.mix_logits.softmax(dim=-1).to(values.dtype), mixed)
        else:
            read = states if everything else states[candidates]
            weights = compute_attended_weights(self.mix_queries, self.mix_logits, read)
            mixes = torch.einsum("mlbt,lbtw->mbtw", weights.to(values.dtype), mixed)
        return torch.cat([mixes, values[self.alone]]) if self.alone else mixes
