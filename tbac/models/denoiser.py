"""SANA's diffusion transformer with one context per block."""

from diffusers import SanaTransformer2DModel
from torch import Tensor, nn

from tbac.types import Condition


class LadderDenoiser(nn.Module):
    """Runs a stock `SanaTransformer2DModel`, giving block i the i-th context.

    With all contexts equal the result is the stock forward's, bit for bit.

    Args:
        transformer: the pre-trained or freshly made transformer; its parameters are used as they are.
    """

    def __init__(self, transformer: SanaTransformer2DModel) -> None:
        super().__init__()
        if transformer.config.guidance_embeds:
            raise ValueError("the denoiser has guidance embeddings (SANA-Sprint); ladder tuning needs plain SANA")
        self.transformer = transformer

    @property
    def num_blocks(self) -> int:
        return len(self.transformer.transformer_blocks)

    def forward(self, noisy_latents: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """Predict the velocity.

        Args:
            noisy_latents: (batch, channel, height, width).
            timestep: (batch,), 1000 * sigma.
            condition: one context per block.

        Returns:
            (batch, channel, height, width).

        Raises:
            ValueError: when the number of contexts isn't the number of blocks.
        """
        model = self.transformer
        if condition.states.shape[0] != self.num_blocks:
            raise ValueError(f"{condition.states.shape[0]} contexts for {self.num_blocks} denoiser blocks")
        batch, _, height, width = noisy_latents.shape
        patch = model.config.patch_size
        rows, columns = height // patch, width // patch

        hidden = model.patch_embed(noisy_latents)
        modulation, embedded = model.time_embed(timestep, batch_size=batch, hidden_dtype=hidden.dtype)
        mask = None
        if condition.mask is not None:
            mask = ((1 - condition.mask.to(hidden.dtype)) * -10000.0).unsqueeze(1)

        for block, state in zip(model.transformer_blocks, condition.states, strict=True):
            context = model.caption_norm(model.caption_projection(state).view(batch, -1, hidden.shape[-1]))
            hidden = block(hidden, None, context, mask, modulation, rows, columns)

        hidden = model.norm_out(hidden, embedded, model.scale_shift_table)
        hidden = model.proj_out(hidden)
        hidden = hidden.reshape(batch, rows, columns, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
        return hidden.reshape(batch, -1, rows * patch, columns * patch)
