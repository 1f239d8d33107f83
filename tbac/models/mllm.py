"""The frozen multimodal LLM: prompt once without gradient, queries with it, taps out, answering.

Attention is causal and the queries come last, so the prompt doesn't depend on them. The prompt runs once without
gradient, and its keys and values are kept; the queries then run with gradient and attend to them. The prompt is padded
on the right, so its pass needs no mask and attention stays on the fast causal kernels. The system message, with which
all prompts begin, runs only once. Layers above the deepest tap don't run and needn't be in memory: the whole model is
read when a question has to be answered. The layers are called part by part (projections, norms, MLP), not through the
library's cache.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLModel

from tbac.models.answering import AnswerOptions
from tbac.models.decoder_layer import finish_layer, project, project_keys_values, run_query_layer
from tbac.models.vision import encode_images, run_vision_layer

KeyValue = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Prefix:
    """What the query pass reads of a prompt.

    Attributes:
        keys: per layer (batch, key-value head, token, head channel), rotated.
        values: the same, not rotated.
        mask: (batch, token), True for real tokens.
        next_position: (batch,), rotary position of the first query on all three axes.
        states: (tap, batch, token, hidden), the prompt's own states at the requested layers, without the tokens that
            all prompts begin with; or None.
        states_mask: (batch, token) of `states`, True for real tokens.
    """

    keys: list[Tensor]
    values: list[Tensor]
    mask: Tensor
    next_position: Tensor
    states: Tensor | None = None
    states_mask: Tensor | None = None


def check_mllm(config: Qwen2_5_VLConfig) -> None:
    """Raise ValueError when running prompt and queries apart would give another result than one pass of both."""
    text = config.text_config
    if text.use_sliding_window or text.attention_dropout:
        raise ValueError("the MLLM must use neither sliding-window attention nor attention dropout")


class FrozenMLLM(nn.Module):
    """A Qwen2.5-VL that reads but never learns.

    Args:
        model: the whole model with its language head, or its body, which may lack the layers above the deepest tap.
        read_full_model: reads the whole model, for answering; needed when `model` is only a body.
        num_layers: decoder layers of the whole model; None = as many as `model` has.
        prompt_embeddings: word embeddings (token, hidden) for prompts, instead of the model's own, with which it still
            answers. The released weights need this, since weight decay shrank the table in their training.

    Raises:
        ValueError: when the model uses sliding windows or attention dropout.
    """

    prompt_embeddings: Tensor | None

    def __init__(
        self,
        model: Qwen2_5_VLForConditionalGeneration | Qwen2_5_VLModel,
        read_full_model: Callable[[], Qwen2_5_VLForConditionalGeneration] | None = None,
        num_layers: int | None = None,
        prompt_embeddings: Tensor | None = None,
    ) -> None:
        super().__init__()
        check_mllm(model.config)
        self.model = model.eval().requires_grad_(False)
        self.num_layers = num_layers or model.config.text_config.num_hidden_layers
        self._read_full_model = read_full_model
        self.register_buffer("prompt_embeddings", prompt_embeddings)
        self.checkpointing = False  # of the query pass: its layers run again in the backward pass
        self._run_query_layer: Callable[..., Tensor] = run_query_layer
        self._run_projections, self._run_rest = project, finish_layer
        self._run_vision_layer = run_vision_layer
        self._constants: tuple[Any, list[KeyValue]] | None = None

    def train(self, mode: bool = True) -> "FrozenMLLM":
        """Stay in evaluation mode: in training mode the library may drop caches."""
        return super().train(False)

    @property
    def body(self) -> Qwen2_5_VLModel:
        """The model without its language head."""
        return self.model if isinstance(self.model, Qwen2_5_VLModel) else self.model.model

    @property
    def hidden_size(self) -> int:
        return self.model.config.text_config.hidden_size

    def compile_layers(self, **options: Any) -> None:
        """Compile the layers of vision tower, prompt and queries; `options` are those of `torch.compile`.

        In the prompt pass only what surrounds attention is compiled, so that attention stays on the causal kernels.
        """
        self._run_query_layer = torch.compile(run_query_layer, **options)
        self._run_projections = torch.compile(project, **options)
        self._run_rest = torch.compile(finish_layer, **options)
        self._run_vision_layer = torch.compile(run_vision_layer, **options)

    def load_full_model(self) -> Qwen2_5_VLForConditionalGeneration:
        """Return the model with all its layers and its language head, and read it first if that hasn't been done.

        Raises:
            ValueError: when this object was made from the body alone, with nothing to read the rest from.
        """
        if isinstance(self.model, Qwen2_5_VLModel):
            if self._read_full_model is None:
                raise ValueError("this model was built without the MLLM's language head, so it can't answer")
            # Tensors that are made in inference mode could never be trained with.
            with torch.inference_mode(False):
                device = self.body.get_input_embeddings().weight.device
                depth = len(self.body.language_model.layers)
                # The body stays until the whole model has been read: if it can't be, drawing goes on.
                full = self._read_full_model().eval().requires_grad_(False)
                self.model = full
                try:
                    full.to(device)
                except Exception:  # such as too little memory on a GPU, on which the body has had enough
                    body = full.model
                    body.language_model.layers = body.language_model.layers[:depth]
                    self.model = body.to(device)
                    raise
        return self.model

    def get_prompt_table(self) -> Tensor:
        """Return the word embeddings (token, hidden) that prompts are read with."""
        return self.body.get_input_embeddings().weight if self.prompt_embeddings is None else self.prompt_embeddings

    @apply_forward_hook
    def embed(self, inputs: dict[str, Tensor]) -> Tensor:
        """Embed tokens and put image features in the places of image tokens: (batch, token, hidden)."""
        embeddings = nn.functional.embedding(inputs["input_ids"], self.get_prompt_table())
        features = inputs.get("image_features")
        if features is None and inputs.get("pixel_values") is not None:
            features = self.encode_images(inputs["pixel_values"], inputs["image_grid_thw"])
        if features is not None:
            places = inputs["input_ids"] == self.model.config.image_token_id
            embeddings = embeddings.masked_scatter(places.unsqueeze(-1), features.to(embeddings))
        return embeddings

    def encode_images(self, pixel_values: Tensor, grids: Tensor) -> Tensor:
        """Compute the features of images: (merged patch, hidden), in the order of the images.

        Args:
            pixel_values: (patch, patch channel).
            grids: (image, 3), patches in time, height and width; on the CPU, so that nothing waits for the device.
        """
        return encode_images(self.body.visual, pixel_values, grids, self._run_vision_layer)

    def compute_positions(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return rotary positions (3, batch, token) for time, height and width, computed where `inputs` have none."""
        if inputs.get("position_ids") is not None:
            return inputs["position_ids"]
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        if inputs.get("image_grid_thw") is None:
            return (mask.long().cumsum(-1) - 1).clamp(min=0).expand(3, -1, -1)
        kinds = (ids == self.model.config.image_token_id).int()
        return self.body.get_rope_index(ids, kinds, inputs["image_grid_thw"], attention_mask=mask)[0]

    @apply_forward_hook
    @torch.no_grad()
    def read_prefix(self, inputs: dict[str, Tensor], depth: int, layers: Sequence[int] = ()) -> Prefix:
        """Run the prompt through the first `depth` layers without gradient.

        Args:
            inputs: `input_ids` and `attention_mask` (batch, token); with images also `pixel_values` (patch, patch
                channel) and `image_grid_thw` (image, 3), or `image_features` (merged patch, hidden) that
                `encode_images` made of them. With `position_ids` and `shared_ids`, which `PromptProcessor`
                adds to inputs padded on the right, it is faster and doesn't wait for the device.
            depth: number of layers that the queries will pass through.
            layers: ascending tap indices at which the prompt's own states are returned; at most `depth`.
        """
        inputs = pad_right(inputs)
        shared_ids = tuple(inputs["shared_ids"].tolist()) if "shared_ids" in inputs else ()
        mask = inputs["attention_mask"].bool()
        shared = self.read_shared(shared_ids, depth)
        return self.read_prompt(self.embed(inputs), self.compute_positions(inputs), mask, shared, depth, layers)

    @torch.no_grad()
    def read_prompt(
        self,
        embeddings: Tensor,
        positions: Tensor,
        mask: Tensor,
        shared: list[KeyValue],
        depth: int,
        layers: Sequence[int] = (),
    ) -> Prefix:
        """Run embedded prompts, padded on the right, through the first `depth` layers.

        Args:
            embeddings: (batch, token, hidden).
            positions: (3, batch, token).
            mask: (batch, token), True for real tokens.
            shared: what `read_shared` returned.
            depth: number of layers that the queries will pass through.
            layers: ascending tap indices at which the prompt's own states are returned; at most `depth`.
        """
        # The shared tokens have run already, so only what follows them runs here.
        num_shared = shared[0][0].shape[2] if shared else 0
        hidden = embeddings[:, num_shared:]
        rotary = self.body.language_model.rotary_emb(hidden, positions[:, :, num_shared:])
        causal: dict[str, Any] = {"is_causal": True}
        if num_shared:
            # There are more keys than queries, and the last query may look at the last key.
            causal = {"attn_mask": causal_lower_right(hidden.shape[1], mask.shape[1])}
        keys, values = [], []
        states = {0: hidden}
        decoder = self.body.language_model.layers[:depth]
        for index, layer in enumerate(decoder):
            # Without a tap at the last layer's output only its keys and values are needed: the queries read no more.
            last = index + 1 == len(decoder) and depth not in layers
            if last:
                key, value = project_keys_values(layer, hidden, rotary)
            else:
                query, key, value = self._run_projections(layer, hidden, rotary)
            if num_shared:
                shared_key, shared_value = shared[index]
                key = torch.cat([shared_key.expand(len(key), -1, -1, -1), key], dim=2)
                value = torch.cat([shared_value.expand(len(value), -1, -1, -1), value], dim=2)
            keys.append(key)
            values.append(value)
            if not last:
                attended = scaled_dot_product_attention(query, key, value, enable_gqa=True, **causal)
                hidden = self._run_rest(layer, hidden, attended)
                if index + 1 in layers:
                    states[index + 1] = hidden
        # The queries go on behind the largest position: an image's positions don't grow with its number of tokens.
        next_position = positions.masked_fill(~mask, 0).amax(dim=(0, 2)) + 1
        if not layers:
            return Prefix(keys, values, mask, next_position)
        # In Hugging Face's `hidden_states` the last one comes after the final norm.
        if self.num_layers in layers:
            states[self.num_layers] = self.body.language_model.norm(hidden)
        tapped = torch.stack([states[i] for i in layers])
        return Prefix(keys, values, mask, next_position, tapped, mask[:, num_shared:])

    def read_shared(self, ids: tuple[int, ...], depth: int) -> list[KeyValue]:
        """Return keys and values of the tokens that every prompt begins with, for each of the first `depth` layers.

        They are computed once and kept. Without such tokens the list is empty.
        """
        if not ids:
            return []
        table = self.get_prompt_table()
        # Kept values are used again only for the same tokens and depth, on the same device, in the same precision.
        device_type = table.device.type
        autocast_dtype = None
        if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
            autocast_dtype = torch.get_autocast_dtype(device_type)
        circumstances = (ids, depth, table.device, table.dtype, autocast_dtype)
        if self._constants is None or self._constants[0] != circumstances:
            # Training can't read inference tensors, so these are ordinary ones even when sampling asks for them first.
            with torch.inference_mode(False), torch.no_grad():
                tokens = torch.tensor([ids], device=table.device)
                hidden = nn.functional.embedding(tokens, table)
                positions = torch.arange(len(ids), device=table.device).expand(3, 1, -1)
                rotary = self.body.language_model.rotary_emb(hidden, positions)
                keys_values = []
                for layer in self.body.language_model.layers[:depth]:
                    query, key, value = project(layer, hidden, rotary)
                    keys_values.append((key, value))
                    attended = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
                    hidden = finish_layer(layer, hidden, attended)
            self._constants = (circumstances, keys_values)
        return self._constants[1]

    @apply_forward_hook
    def read_queries(self, queries: Tensor, prefix: Prefix, layers: Sequence[int]) -> Tensor:
        """Run the queries after a prompt, with gradient.

        Args:
            queries: (query, hidden), the same for every prompt.
            prefix: what `read_prefix()` returned for a depth of at least the deepest tap.
            layers: ascending tap indices: 0 = the queries themselves, k = after layer k, the last after the final norm.

        Returns:
            (tap, batch, query, hidden).
        """
        batch, count = prefix.mask.shape[0], queries.shape[0]
        language_model = self.body.language_model
        if not max(layers):  # nothing but the queries themselves
            return queries.to(language_model.embed_tokens.weight.dtype).expand(len(layers), batch, -1, -1)
        # Each query sees the real tokens of its prompt, and the queries up to itself.
        steps = torch.arange(count, device=queries.device)
        positions = (prefix.next_position[:, None] + steps).expand(3, -1, -1)
        causal = (steps[:, None] >= steps).expand(batch, 1, count, count)
        mask = torch.cat([prefix.mask[:, None, None, :].expand(batch, 1, count, -1), causal], dim=-1)
        # `run_query_layer` makes rows of the heads that share keys and values, and each row needs its mask.
        config = self.model.config.text_config
        mask = mask.repeat(1, 1, config.num_attention_heads // config.num_key_value_heads, 1)
        # A boolean mask would be converted to numbers in every layer, so it is converted once.
        bias = torch.zeros(mask.shape, dtype=prefix.keys[0].dtype, device=mask.device).masked_fill_(~mask, -torch.inf)

        hidden = queries.to(language_model.embed_tokens.weight.dtype).expand(batch, -1, -1)
        rotary = language_model.rotary_emb(hidden, positions)
        tapped = set(layers)
        states = {0: hidden}
        for index in range(max(layers)):
            arguments = language_model.layers[index], hidden, rotary, prefix.keys[index], prefix.values[index], bias
            if self.checkpointing and torch.is_grad_enabled():
                hidden = checkpoint(self._run_query_layer, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden = self._run_query_layer(*arguments)
            if index + 1 in tapped:
                states[index + 1] = hidden
        # In Hugging Face's `hidden_states` the last one comes after the final norm.
        if self.num_layers in tapped:
            states[self.num_layers] = language_model.norm(hidden)
        return torch.stack([states[tap] for tap in layers])

    @apply_forward_hook
    @torch.no_grad()
    def generate(self, inputs: dict[str, Tensor], options: AnswerOptions, streamer: Any = None) -> Tensor:
        """Generate token ids (batch, new token) with the untouched model.

        Args:
            inputs: of prompts, padded on the left.
            options: how tokens are chosen.
            streamer: a streamer of transformers, which gets the tokens one by one; for a batch of one.
        """
        model = self.load_full_model()
        # The library keeps the rotary offset of its last prompt here, and would use it for the next one.
        model.model.rope_deltas = None
        kinds = (inputs["input_ids"] == model.config.image_token_id).int()
        inputs = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        chosen = options.list_generation_options()
        with options.seeded(model.device):
            output = model.generate(**inputs, mm_token_type_ids=kinds, use_cache=True, streamer=streamer, **chosen)
        model.model.rope_deltas = None
        return output[:, inputs["input_ids"].shape[1] :]


def pad_right(inputs: Any) -> Any:
    """Move the padding of inputs to the right."""
    if inputs.get("position_ids") is not None:  # made by `PromptProcessor` only for inputs padded on the right
        return inputs
    mask = inputs["attention_mask"].long()
    leading = (mask.cumsum(1) == 0).sum(1, keepdim=True)
    order = (torch.arange(mask.shape[1], device=mask.device) + leading) % mask.shape[1]
    moved = {name: inputs[name].gather(1, order) for name in ("input_ids", "attention_mask")}
    return {**inputs, **moved}
