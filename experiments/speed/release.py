"""The release's way, as a baseline: the same model computed plainly.

The whole sequence passes the MLLM with gradient, queries and two closing tokens included; the queries are rows of a
trainable vocabulary table whose other rows a hook keeps from getting gradients; the hidden states of all layers and
tokens are stacked before the taps are cut out; MLLM and denoiser are checkpointed; sampling computes everything of a
step at every step. What it computes equals ours, values and gradients, which the benchmark checks before it measures.

Its vision tower has no gradient, as in the release. By default the tower is the one of the library that is installed;
the release as it ships is pinned to transformers 4.51.3, whose tower takes several times as long
(`run_layer_with_dense_mask`).
"""

import copy
from typing import Any

import torch
from diffusers import SanaTransformer2DModel
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

from tbac.flow import compute_timestep
from tbac.models import UniImage
from tbac.models.vision import Segments, encode_images
from tbac.sampling.guidance import Guidance
from tbac.sampling.solver import make_scheduler

CLOSING = 2  # tokens after the queries: <|vision_end|>, <|im_end|>


class ReleaseWay(nn.Module):
    """The release's computation with the weights of a `UniImage`, which stays as it is.

    Args:
        model: with an MLLM that has all its layers, shared connector and the last taps before the final one.
        as_shipped: whether the vision tower attends as in the version of the library that the release is pinned to.
    """

    def __init__(self, model: UniImage, as_shipped: bool = False) -> None:
        super().__init__()
        self.as_shipped = as_shipped
        self.mllm: Qwen2_5_VLForConditionalGeneration = copy.deepcopy(model.mllm.load_full_model())
        self.connector = copy.deepcopy(model.ladder.connector)
        with torch.device(model.device):
            self.transformer = SanaTransformer2DModel(**_arguments(model.denoiser.transformer))
        if model.denoiser.transformer.dtype != torch.float32:
            self.transformer.to(model.denoiser.transformer.dtype)
        self.transformer.load_state_dict(model.denoiser.transformer.state_dict())
        self.scheduler = model.scheduler_config
        queries = model.ladder.queries.detach()
        self.vocabulary = self.mllm.get_input_embeddings().weight.shape[0]
        self.num_queries = len(queries)
        self.mllm.lm_head = nn.Identity()
        table = torch.cat([self.mllm.get_input_embeddings().weight.detach(), queries.to(self.mllm.dtype)])
        self.mllm.get_input_embeddings().weight = nn.Parameter(table)
        self.mllm.requires_grad_(False)
        self.mllm.get_input_embeddings().weight.requires_grad_(True)
        self.mllm.get_input_embeddings().weight.register_hook(self._freeze)
        self.mllm.train()
        self.mllm.gradient_checkpointing_enable({"use_reentrant": False})
        self.transformer.enable_gradient_checkpointing()
        self.transformer.train()

    def _freeze(self, gradient: Tensor) -> Tensor:
        gradient[: self.vocabulary].zero_()
        return gradient

    def sequence(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Prompts, queries and closing tokens as one sequence; prompts of one length."""
        ids = inputs["input_ids"]
        rows = torch.arange(self.vocabulary, self.vocabulary + self.num_queries, device=ids.device)
        closing = torch.full((CLOSING,), self.mllm.config.vision_end_token_id, device=ids.device)
        ids = torch.cat([ids, torch.cat([rows, closing]).expand(len(ids), -1)], dim=1)
        images: dict[str, Tensor] = {k: inputs[k] for k in ("pixel_values", "image_grid_thw") if k in inputs}
        return {"input_ids": ids, **images}

    def encode_condition(self, inputs: dict[str, Tensor]) -> Tensor:
        """(block, batch, query, channel)."""
        sequence, body = self.sequence(inputs), self.mllm.model
        ids = sequence["input_ids"]
        embeddings = self.mllm.get_input_embeddings()(ids)
        grids = sequence.get("image_grid_thw")
        if grids is not None:
            grids = grids.to(ids.device)
            # The release trains back through no vision tower: the patches carry no gradient.
            with torch.no_grad():
                features = self.encode_images(sequence["pixel_values"], grids)
            places = ids == self.mllm.config.image_token_id
            embeddings = embeddings.masked_scatter(places.unsqueeze(-1), features.to(embeddings))
            positions = body.get_rope_index(ids, places.int(), grids, torch.ones_like(ids))[0]
        else:
            positions = torch.arange(ids.shape[1], device=ids.device).expand(3, len(ids), -1)
        states = self.mllm(
            inputs_embeds=embeddings,
            attention_mask=torch.ones_like(ids),
            position_ids=positions,
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states
        stacked = torch.stack(states, dim=0)
        queries = stacked[:, :, -self.num_queries - CLOSING : -CLOSING]
        return self.connector(queries[-len(self.transformer.transformer_blocks) - 1 : -1])

    def encode_images(self, pixel_values: Tensor, grids: Tensor) -> Tensor:
        """Features of images (merged patch, hidden)."""
        visual = self.mllm.model.visual
        if self.as_shipped:
            return encode_images(visual, pixel_values, grids.cpu(), run_layer_with_dense_mask)
        return visual(pixel_values, grid_thw=grids).pooler_output

    def predict_velocity(self, noisy: Tensor, timestep: Tensor, contexts: Tensor) -> Tensor:
        """Velocity; the contexts' mask is all ones, as released."""
        model, mask = self.transformer, torch.ones(contexts.shape[1:3], device=contexts.device)
        bias = ((1 - mask.to(noisy.dtype)) * -10000.0).unsqueeze(1)
        patch = model.config.patch_size
        rows, columns = (size // patch for size in noisy.shape[-2:])
        hidden = model.patch_embed(noisy)
        modulation, embedded = model.time_embed(timestep, batch_size=len(noisy), hidden_dtype=hidden.dtype)
        contexts = model.caption_norm(model.caption_projection(contexts))
        for block, context in zip(model.transformer_blocks, contexts, strict=True):
            arguments = (hidden, None, context, bias, modulation, rows, columns)
            if torch.is_grad_enabled() and model.gradient_checkpointing:
                hidden = checkpoint(block, *arguments, use_reentrant=False)
            else:
                hidden = block(*arguments)
        hidden = model.proj_out(model.norm_out(hidden, embedded, model.scale_shift_table))
        hidden = hidden.reshape(len(noisy), rows, columns, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
        return hidden.reshape(len(noisy), -1, rows * patch, columns * patch)

    def loss(self, inputs: dict[str, Tensor], latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """Flow-matching loss."""
        level = sigma.view(-1, 1, 1, 1)
        noisy = (1 - level) * latents + level * noise
        predicted = self.predict_velocity(noisy, compute_timestep(sigma), self.encode_condition(inputs))
        return (predicted.float() - (noise - latents).float()).square().mean()

    @torch.no_grad()
    def sample(self, inputs: dict[str, Tensor], latents: Tensor, steps: int, guidance: Guidance) -> Tensor:
        """Latents; `inputs` hold the prompts of each guidance branch, one branch after the other."""
        contexts = self.encode_condition(inputs)
        scheduler = make_scheduler(self.scheduler)
        scheduler.set_timesteps(steps, device=latents.device)
        for timestep in scheduler.timesteps:
            noisy = torch.cat([latents] * len(guidance.branches)).to(contexts.dtype)
            predicted = self.predict_velocity(noisy, timestep.expand(len(noisy)), contexts)
            latents = scheduler.step(guidance.combine(predicted.float()), timestep, latents, return_dict=False)[0]
        return latents


def _arguments(transformer: SanaTransformer2DModel) -> dict:
    return {k: v for k, v in transformer.config.items() if not k.startswith("_")}


def run_layer_with_dense_mask(block: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor], segments: Segments) -> Tensor:
    """A layer of the vision tower as transformers 4.51.3 computes it (`Qwen2_5_VLVisionSdpaAttention`).

    Every patch of the batch is compared with every other, and a mask (patch, patch), filled window by window in every
    layer, leaves those of its own window or image.
    """
    attention, count = block.attn, len(hidden)
    query, key, value = attention.qkv(block.norm1(hidden)).unflatten(-1, (3, -1, attention.head_dim)).unbind(1)
    query, key = apply_rotary_pos_emb_vision(query, key, *rotary)
    mask = torch.zeros(1, count, count, dtype=torch.bool, device=hidden.device)
    start = 0
    for length in segments.list_lengths():
        mask[..., start : start + length, start : start + length] = True
        start += length
    parts = (query.to(value.dtype), key.to(value.dtype), value)  # under autocast the rotary tables are float32
    query, key, value = (part.transpose(0, 1).unsqueeze(0) for part in parts)
    attended = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=attention.scaling)
    hidden = hidden + attention.proj(attended.squeeze(0).transpose(0, 1).reshape(count, -1))
    return hidden + block.mlp(block.norm2(hidden))
