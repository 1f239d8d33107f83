"""One decoder layer of Qwen2.5-VL, part by part, so that a prompt's keys and values can be kept and read again."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb


def project(layer: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise, project and rotate: query, key and value, each (batch, head, token, head channel)."""
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)
    query = _split_heads(attention, attention.q_proj(normed))
    key = _split_heads(attention, attention.k_proj(normed))
    value = _split_heads(attention, attention.v_proj(normed))
    query, key = apply_rotary_pos_emb(query, key, *rotary)
    return query.to(value.dtype), key.to(value.dtype), value  # under autocast the rotary tables are float32


def project_keys_values(layer: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Compute key and value as `project` does, without a query.

    The last layer of a prompt needs only keys and values, because its output isn't used.
    """
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)
    key = _split_heads(attention, attention.k_proj(normed))
    value = _split_heads(attention, attention.v_proj(normed))
    _, key = apply_rotary_pos_emb(key, key, *rotary)
    return key.to(value.dtype), value


def _split_heads(attention: Any, projected: Tensor) -> Tensor:
    return projected.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)


def run_query_layer(
    layer: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor], keys: Tensor, values: Tensor, bias: Tensor
) -> Tensor:
    """Run one layer of the query pass: the queries attend to the prompt's keys and values and to each other.

    Query heads that share keys and values become rows of one head, so that keys and values are read once. `bias` has
    a row for each of these rows: 0 where it may look, and minus infinity elsewhere.
    """
    query, key, value = project(layer, hidden, rotary)
    heads, tokens = query.shape[1:3]
    key, value = torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)
    grouped = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    attended = scaled_dot_product_attention(grouped, key, value, attn_mask=bias)
    return finish_layer(layer, hidden, attended.unflatten(2, (-1, tokens)).reshape(-1, heads, tokens, key.shape[-1]))


def finish_layer(layer: Any, hidden: Tensor, attended: Tensor) -> Tensor:
    """Finish a decoder layer after attention: output projection, residual, MLP, residual."""
    hidden = hidden + layer.self_attn.o_proj(attended.transpose(1, 2).flatten(2))
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))
