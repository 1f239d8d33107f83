"""The frozen multimodal LLM: prompt once without gradient, queries with it, taps out, answering.

Attention is causal and the queries come last, so nothing of the prompt depends on them. The prompt runs once without
gradient and leaves its keys and values; the query rows then run with gradient against these, which are only read. The
prompt is padded on the right, so its pass needs no mask and stays on the causal fast path; what all prompts of a batch
begin with runs once. Nothing above the deepest tap
runs. The layers are called part by part (projections, norms, MLP), never through the library's cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb


@dataclass(frozen=True)
class Prefix:
    """What the query pass needs of a prompt.

    Attributes:
        keys: per layer (batch, key-value head, token, head channel), rotated.
        values: the same, not rotated.
        mask: (batch, token), True for real tokens.
        next_position: (batch,), rotary position of the first query on all three axes.
    """

    keys: list[Tensor]
    values: list[Tensor]
    mask: Tensor
    next_position: Tensor


def check_mllm(config: Qwen2_5_VLConfig) -> None:
    """Raise ValueError when the split pass isn't exact for this config."""
    text = config.text_config
    if text.use_sliding_window or text.attention_dropout:
        raise ValueError("the MLLM must use neither sliding-window attention nor attention dropout")


class FrozenMLLM(nn.Module):
    """A Qwen2.5-VL that reads but never learns.

    Args:
        model: the whole model, with its language head.

    Raises:
        ValueError: when it uses sliding windows or attention dropout, with which the split pass isn't exact.
    """

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration) -> None:
        super().__init__()
        check_mllm(model.config)
        self.model = model.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "FrozenMLLM":
        """Stay in evaluation mode: in training mode the library may drop caches."""
        return super().train(False)

    @property
    def num_layers(self) -> int:
        return self.model.config.text_config.num_hidden_layers

    @property
    def hidden_size(self) -> int:
        return self.model.config.text_config.hidden_size

    def embed(self, inputs: dict[str, Tensor]) -> Tensor:
        """Token embeddings with image features put in their places: (batch, token, hidden)."""
        embeddings = self.model.get_input_embeddings()(inputs["input_ids"])
        if inputs.get("pixel_values") is not None:
            features = self.model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
            places = inputs["input_ids"] == self.model.config.image_token_id
            features = torch.cat(list(features.pooler_output)).to(embeddings)
            embeddings = embeddings.masked_scatter(places.unsqueeze(-1), features)
        return embeddings

    def positions(self, inputs: dict[str, Tensor]) -> Tensor:
        """Rotary positions (3, batch, token) for time, height and width, from the grids of the images."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        if inputs.get("image_grid_thw") is None:
            return (mask.long().cumsum(-1) - 1).clamp(min=0).expand(3, -1, -1)
        kinds = (ids == self.model.config.image_token_id).int()
        return self.model.model.get_rope_index(ids, kinds, inputs["image_grid_thw"], attention_mask=mask)[0]

    @torch.no_grad()
    def prefix(self, inputs: dict[str, Tensor], depth: int) -> Prefix:
        """Run the prompt through the first `depth` layers without gradient.

        Args:
            inputs: `input_ids` and `attention_mask` (batch, token), padded on the right; with images also
                `pixel_values` (patch, patch channel) and `image_grid_thw` (image, 3).
            depth: how many layers the queries will pass.
        """
        mask = inputs["attention_mask"].bool()
        positions = self.positions(inputs)
        embeddings = self.embed(inputs)
        rotary_of = self.model.model.language_model.rotary_emb
        shared = self._shared_length(inputs)
        # What all prompts begin with (the system message) runs once, as one row; each then runs the rest of its own.
        common, own = embeddings[:1, :shared], embeddings[:, shared:]
        common_rotary = rotary_of(common, positions[:, :1, :shared])
        own_rotary = rotary_of(own, positions[:, :, shared:])
        causal = causal_lower_right(own.shape[1], mask.shape[1])
        keys, values = [], []
        layers = self.model.model.language_model.layers[:depth]
        for index, layer in enumerate(layers):
            last = index + 1 == len(layers)
            query, key, value = _project(layer, own, own_rotary)
            if shared:
                first = _project(layer, common, common_rotary)
                if not last:
                    attended = scaled_dot_product_attention(*first, is_causal=True, enable_gqa=True)
                    common = _finish_layer(layer, common, attended)
                key = torch.cat([first[1].expand(len(key), -1, -1, -1), key], dim=2)
                value = torch.cat([first[2].expand(len(value), -1, -1, -1), value], dim=2)
            keys.append(key)
            values.append(value)
            if not last:
                kind: dict[str, Any] = {"attn_mask": causal} if shared else {"is_causal": True}
                own = _finish_layer(
                    layer, own, scaled_dot_product_attention(query, key, value, enable_gqa=True, **kind)
                )
        next_position = positions.masked_fill(~mask, 0).amax(dim=(0, 2)) + 1
        return Prefix(keys, values, mask, next_position)

    def _shared_length(self, inputs: dict[str, Tensor]) -> int:
        """How many tokens all prompts begin with; images don't count, and each prompt keeps a token of its own."""
        ids = inputs["input_ids"]
        if len(ids) == 1:
            return 0
        same = (ids == ids[:1]).all(0) & (ids[0] != self.model.config.image_token_id)
        same &= inputs["attention_mask"].bool().all(0)
        return min(int(same.long().cumprod(0).sum()), ids.shape[1] - 1)

    def read_queries(self, queries: Tensor, prefix: Prefix, layers: Sequence[int]) -> Tensor:
        """Run the queries after a prompt, with gradient.

        Args:
            queries: (query, hidden), the same for every prompt.
            prefix: of `prefix()` with a depth of at least the deepest tap.
            layers: ascending tap indices: 0 = the queries themselves, k = after layer k, the last after the final norm.

        Returns:
            (tap, batch, query, hidden).
        """
        batch, count = prefix.mask.shape[0], queries.shape[0]
        language_model = self.model.model.language_model
        steps = torch.arange(count, device=queries.device)
        positions = (prefix.next_position[:, None] + steps).expand(3, -1, -1)
        causal = (steps[:, None] >= steps).expand(batch, 1, count, count)
        mask = torch.cat([prefix.mask[:, None, None, :].expand(batch, 1, count, -1), causal], dim=-1)

        hidden = queries.to(language_model.embed_tokens.weight.dtype).expand(batch, -1, -1)
        rotary = language_model.rotary_emb(hidden, positions)
        wanted = set(layers)
        states = {0: hidden}
        for index in range(max(layers)):
            layer = language_model.layers[index]
            query, key, value = _project(layer, hidden, rotary)
            key = torch.cat([prefix.keys[index], key], dim=2)
            value = torch.cat([prefix.values[index], value], dim=2)
            attended = scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
            hidden = _finish_layer(layer, hidden, attended)
            if index + 1 in wanted:
                states[index + 1] = hidden
        if self.num_layers in wanted:
            states[self.num_layers] = language_model.norm(hidden)
        return torch.stack([states[tap] for tap in layers])

    @torch.no_grad()
    def generate(self, inputs: dict[str, Tensor], max_new_tokens: int) -> Tensor:
        """Greedy token ids (batch, new token) of the untouched model; `inputs` are padded on the left."""
        self.model.model.rope_deltas = None
        kinds = (inputs["input_ids"] == self.model.config.image_token_id).int()
        output = self.model.generate(
            **inputs, mm_token_type_ids=kinds, max_new_tokens=max_new_tokens, do_sample=False, use_cache=True
        )
        self.model.model.rope_deltas = None
        return output[:, inputs["input_ids"].shape[1] :]


def _project(layer: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised, projected and rotated (query, key, value), each (batch, head, token, head channel)."""
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)
    query, key, value = (
        projection(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, *rotary)
    return query.to(value.dtype), key.to(value.dtype), value  # under autocast the rotary tables are float32


def _finish_layer(layer: Any, hidden: Tensor, attended: Tensor) -> Tensor:
    """Output projection, residual, MLP, residual."""
    hidden = hidden + layer.self_attn.o_proj(attended.transpose(1, 2).flatten(2))
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))
