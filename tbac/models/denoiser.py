"""SANA's diffusion transformer with one context per block."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import SanaTransformer2DModel
from diffusers.models.attention_processor import Attention
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from tbac.types import Condition

KeyValue = tuple[Tensor, Tensor]
MAX_SIZES = 128  # of pictures and batches that blocks are compiled for; those beyond run as they are


@dataclass(frozen=True)
class ProjectedCondition:
    """Keys and values of all blocks' cross-attention, which sampling computes once instead of at every step.

    Attributes:
        keys_values: per block keys and values, each (batch, head, query, head channel).
        mask: (batch, query), 1 where a query takes part, or None when all do.
        reference: scaled latents (batch, channel, height, width) of the input images, or None.
    """

    keys_values: tuple[KeyValue, ...]
    mask: Tensor | None = None
    reference: Tensor | None = None

    def __len__(self) -> int:
        return len(self.keys_values)

    def __getitem__(self, rows: Any) -> "ProjectedCondition":
        """Return the condition of some rows of the batch."""
        pairs = tuple((key[rows], value[rows]) for key, value in self.keys_values)
        mask = None if self.mask is None else self.mask[rows]
        reference = None if self.reference is None else self.reference[rows]
        return ProjectedCondition(pairs, mask, reference)


class LadderCrossAttention:
    """SANA's cross-attention, which accepts a context, or keys and values that were computed from one before."""

    @staticmethod
    def project(attention: Attention, context: Tensor) -> KeyValue:
        """Compute keys and values (batch, head, query, head channel) of a context (batch, query, channel)."""
        key, value = attention.to_k(context), attention.to_v(context)
        if attention.norm_k is not None:
            key = attention.norm_k(key)
        heads = (attention.heads, -1)
        return key.unflatten(-1, heads).transpose(1, 2), value.unflatten(-1, heads).transpose(1, 2)

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | KeyValue,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        if isinstance(encoder_hidden_states, Tensor):
            encoder_hidden_states = self.project(attn, encoder_hidden_states)
        key, value = encoder_hidden_states
        query = attn.to_q(hidden_states)
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        query = query.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        mask = None if attention_mask is None else attention_mask.unsqueeze(1)  # (batch, head, token, query)
        attended = scaled_dot_product_attention(query, key, value, attn_mask=mask)
        attended = attended.transpose(1, 2).flatten(2).to(query.dtype)
        return attn.to_out[1](attn.to_out[0](attended)) / attn.rescale_output_factor


class SharedSelfAttention:
    """Runs the first block's self-attention once for all guidance branches.

    Branches differ only in their contexts, and the first block reads these after its self-attention: until then all
    branches are equal.

    Args:
        processor: the attention processor that this one calls.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.branches = 1

    def __call__(self, attn: Attention, hidden_states: Tensor, *arguments: Any, **options: Any) -> Tensor:
        if self.branches == 1:
            return self.processor(attn, hidden_states, *arguments, **options)
        one_branch = hidden_states[: len(hidden_states) // self.branches]
        return self.processor(attn, one_branch, *arguments, **options).repeat(self.branches, 1, 1)


class LadderDenoiser(nn.Module):
    """Runs a stock `SanaTransformer2DModel`, giving block i the i-th context.

    With all contexts equal the result is the stock forward's, bit for bit.

    Args:
        transformer: the pre-trained or freshly made transformer; its parameters are used, not copied.
        references: also read latents of input images, through a second patch embedding whose output is added to that of
            the noisy latents. It starts at zero, so that at first the denoiser predicts what it did without (like the
            added input channels of InstructPix2Pix, Brooks et al. 2023, arXiv 2211.09800).
    """

    def __init__(self, transformer: SanaTransformer2DModel, references: bool = False) -> None:
        super().__init__()
        if transformer.config.guidance_embeds:
            raise ValueError("the denoiser has guidance embeddings (SANA-Sprint); ladder tuning needs plain SANA")
        self.transformer = transformer
        for block in transformer.transformer_blocks:
            block.attn2.set_processor(LadderCrossAttention())
        first = transformer.transformer_blocks[0].attn1
        self._first_attention = SharedSelfAttention(first.processor)
        first.set_processor(self._first_attention)
        self.reference_embed: nn.Conv2d | None = None
        if references:
            config = transformer.config
            patch = config.patch_size
            width = config.num_attention_heads * config.attention_head_dim
            self.reference_embed = nn.Conv2d(config.in_channels, width, patch, patch)
            for parameter in self.reference_embed.parameters():
                nn.init.zeros_(parameter)
        self.checkpointing = False  # blocks run again in the backward pass
        self._run_block: Callable[..., Tensor] = _run_block

    @property
    def num_blocks(self) -> int:
        return len(self.transformer.transformer_blocks)

    def compile_blocks(self, **options: Any) -> None:
        """Compile the blocks, anew for each size of picture; `options` are those of `torch.compile`.

        Code for any size is no way out: torch 2.13 stops at the strides of such pictures in a convolution.
        """
        usual: dict[str, Any] = {"dynamic": False}
        if "recompile_limit" in inspect.signature(torch.compile).parameters:  # since torch 2.12
            usual["recompile_limit"] = MAX_SIZES
        self._run_block = torch.compile(_run_block, **{**usual, **options})

    @apply_forward_hook
    def project(self, condition: Condition) -> ProjectedCondition:
        """Compute keys and values of every block's cross-attention.

        Raises:
            ValueError: when the number of contexts isn't the number of blocks.
        """
        pairs = tuple(
            LadderCrossAttention.project(block.attn2, context)
            for block, context in zip(self.transformer.transformer_blocks, self._embed_contexts(condition), strict=True)
        )
        return ProjectedCondition(pairs, condition.mask, condition.reference)

    def _embed_contexts(self, condition: Condition) -> Tensor:
        """Project `condition.states` to the transformer's width: (block, batch, query, width)."""
        if condition.states.shape[0] != self.num_blocks:
            raise ValueError(f"{condition.states.shape[0]} contexts for {self.num_blocks} denoiser blocks")
        states = condition.states.to(self.transformer.dtype)
        return self.transformer.caption_norm(self.transformer.caption_projection(states))

    def forward(
        self,
        noisy_latents: Tensor,
        timestep: Tensor,
        condition: Condition | ProjectedCondition,
        branches: int = 1,
    ) -> Tensor:
        """Predict the velocity.

        Args:
            noisy_latents: (batch, channel, height, width).
            timestep: (batch,), 1000 * sigma; or (1,) for all.
            condition: one context per block, or what `project` made of it; rows (branch * batch).
            branches: number of guidance branches that share the latents; with more than one, the timestep is (1,).

        Returns:
            (branch * batch, channel, height, width).

        Raises:
            ValueError: when the number of contexts isn't the number of blocks.
        """
        model = self.transformer
        contexts = self._embed_contexts(condition) if isinstance(condition, Condition) else condition.keys_values
        height, width = noisy_latents.shape[-2:]
        patch = model.config.patch_size
        rows, columns = height // patch, width // patch

        # Patches are embedded once for all branches, which read the same latents.
        hidden = model.patch_embed(noisy_latents.to(model.dtype)).repeat(branches, 1, 1)
        reference = None if self.reference_embed is None else condition.reference
        if reference is not None:
            hidden = hidden + self._embed_reference(reference, noisy_latents)
        # The timestep modulates every block, and the output layer.
        batch = len(hidden)
        modulation, embedded = model.time_embed(timestep, batch_size=len(timestep), hidden_dtype=hidden.dtype)
        modulation, embedded = modulation.expand(batch, -1), embedded.expand(batch, -1)
        mask = None
        if condition.mask is not None:
            mask = ((1 - condition.mask.to(hidden.dtype)) * -10000.0).unsqueeze(1)

        # References may differ between branches, and then the first block's self-attention differs too.
        self._first_attention.branches = branches if reference is None else 1
        # Without gradient the activation may overwrite its input, which saves memory.
        for block in model.transformer_blocks:
            block.ff.nonlinearity.inplace = not torch.is_grad_enabled()
        for block, context in zip(model.transformer_blocks, contexts, strict=True):
            arguments = block, hidden, context, mask, modulation, rows, columns
            if self.checkpointing and torch.is_grad_enabled():
                hidden = checkpoint(self._run_block, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden = self._run_block(*arguments)

        # Project tokens to patches, and put the patches together to latents.
        hidden = model.norm_out(hidden, embedded, model.scale_shift_table)
        hidden = model.proj_out(hidden)
        hidden = hidden.reshape(batch, rows, columns, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
        return hidden.reshape(batch, -1, rows * patch, columns * patch)

    def _embed_reference(self, reference: Tensor, noisy_latents: Tensor) -> Tensor:
        """Embed reference latents as (branch * batch, token, width), to be added to the embedded patches.

        Raises:
            ValueError: for a reference of another height or width than the noisy latents.
        """
        assert self.reference_embed is not None
        if reference.shape[-2:] != noisy_latents.shape[-2:]:
            raise ValueError(
                f"reference latents of {tuple(reference.shape[-2:])} for noisy latents of "
                f"{tuple(noisy_latents.shape[-2:])}"
            )
        embedded = self.reference_embed(reference.to(self.reference_embed.weight.dtype))
        return embedded.flatten(2).transpose(1, 2)


def _run_block(
    block: Any,
    hidden: Tensor,
    context: Tensor | KeyValue,
    mask: Tensor | None,
    modulation: Tensor,
    rows: int,
    columns: int,
) -> Tensor:
    """Run one block with its own context."""
    return block(hidden, None, context, mask, modulation, rows, columns)


def load_transformer(folder: Path) -> SanaTransformer2DModel:
    """Load SANA's transformer in float32 from a denoiser folder.

    Raises:
        ValueError: when tensors are missing, unexpected or have another shape, by name.
    """
    model, loaded = SanaTransformer2DModel.from_pretrained(
        folder, subfolder="transformer", torch_dtype=torch.float32, output_loading_info=True, use_safetensors=True
    )
    wrong = [*loaded["missing_keys"], *loaded["unexpected_keys"], *(k[0] for k in loaded["mismatched_keys"])]
    if wrong:
        raise ValueError(f"{folder}: the denoiser's weights don't fit its config, such as {wrong[0]}")
    return model
