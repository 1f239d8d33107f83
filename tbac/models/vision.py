"""The vision tower of Qwen2.5-VL, with the attention of all windows of a layer in one batch.

The library runs the attention of each window by itself, which on a GPU is a thousand kernel launches for one image. So
the layers are called part by part here, and attention runs on all windows of a layer, or on all whole images, as one
batch (`Segments`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index


@dataclass(frozen=True)
class Segments:
    """How to turn segments of a row of tokens into a rectangle (segment, longest) for batched attention, and back.

    The last three attributes are None when all segments are equally long: then a reshape is enough.

    Attributes:
        count: number of segments.
        longest: tokens of the longest segment.
        places: (segment * longest,), index of the token at each place of the rectangle; a shorter segment is filled up
            with its first token.
        back: (token,), each token's place in the rectangle.
        mask: (segment, 1, 1, longest), True for real tokens, False for the filling.
    """

    count: int
    longest: int
    places: Tensor | None = None
    back: Tensor | None = None
    mask: Tensor | None = None

    @classmethod
    def of(cls, lengths: Tensor, device: torch.device | str = "cpu") -> "Segments":
        """Build it from the segments' `lengths` (segment,), which are on the CPU; its tensors are put on `device`."""
        longest = int(lengths.max())
        if bool((lengths == longest).all()):
            return cls(len(lengths), longest)
        starts = lengths.cumsum(0) - lengths
        steps = torch.arange(longest)
        real = steps < lengths[:, None]
        places = starts[:, None] + torch.where(real, steps, 0)
        back = torch.arange(real.numel())[real.flatten()]
        tensors = (places.flatten(), back, real[:, None, None])
        return cls(len(lengths), longest, *(send(tensor, device) for tensor in tensors))

    def list_lengths(self) -> list[int]:
        """List the tokens of each segment."""
        if self.mask is None:
            return [self.longest] * self.count
        return [int(length) for length in self.mask.flatten(1).sum(1)]

    def fold(self, row: Tensor) -> Tensor:
        """(token, …) -> (segment, longest, …)."""
        filled = row if self.places is None else row[self.places]
        return filled.unflatten(0, (self.count, self.longest))

    def unfold(self, rectangle: Tensor) -> Tensor:
        """(segment, longest, …) -> (token, …)."""
        row = rectangle.flatten(0, 1)
        return row if self.back is None else row[self.back]


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy a tensor to `device` without waiting: a copy from memory that isn't pinned would wait for the GPU."""
    if torch.device(device).type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def encode_images(visual: Any, pixel_values: Tensor, grids: Tensor, run_layer: Callable[..., Tensor]) -> Tensor:
    """Compute the features of images: (merged patch, hidden), in the order of the images.

    Args:
        visual: the library's vision tower.
        pixel_values: (patch, patch channel).
        grids: (image, 3), patches in time, height and width; on the CPU, so that nothing waits for the device.
        run_layer: `run_vision_layer`, or what `torch.compile` makes of it.
    """
    if pixel_values.is_cuda:
        pad_vision_mlps(visual)
    device = pixel_values.device
    # Windows and lengths follow from the grids alone, so they are computed on the grids' device.
    order, window_ends = get_vision_window_index(
        grids, visual.spatial_merge_size, visual.window_size, visual.patch_size
    )
    frames = torch.repeat_interleave(grids[:, 1] * grids[:, 2], grids[:, 0])
    windows = Segments.of(window_ends.diff().cpu(), device)
    images = Segments.of(frames.cpu(), device)
    order = send(order, device)
    places = send(get_vision_position_ids(grids, visual.spatial_merge_size), device)

    # Patches are sorted by windows for the layers and put back in order at the end.
    hidden = visual.patch_embed(pixel_values.to(visual.dtype))
    count = len(hidden)
    hidden = visual.permute_input_for_window_attn(hidden, order, seq_len=count)
    rotary = visual.rotary_pos_emb(hidden, places)
    cos, sin = (visual.permute_input_for_window_attn(table, order, seq_len=count) for table in rotary)
    for index, block in enumerate(visual.blocks):
        segments = images if index in visual.fullatt_block_indexes else windows
        hidden = run_layer(block, hidden, (cos, sin), segments)
    return visual.merger(hidden)[order.argsort()]


def run_vision_layer(block: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor], segments: Segments) -> Tensor:
    """Run one layer of the vision tower on (token, hidden); attention stays within each segment."""
    attention = block.attn
    projected = attention.qkv(block.norm1(hidden)).unflatten(-1, (3, attention.num_heads, -1))
    query, key, value = projected.unbind(1)
    query, key = apply_rotary_pos_emb_vision(query, key, *rotary)
    parts = (query.to(value.dtype), key.to(value.dtype), value)  # under autocast the rotary tables are float32
    query, key, value = (segments.fold(part).transpose(1, 2) for part in parts)
    attended = scaled_dot_product_attention(query, key, value, attn_mask=segments.mask, scale=attention.scaling)
    hidden = hidden + attention.proj(segments.unfold(attended.transpose(1, 2).flatten(2)))
    return hidden + block.mlp(block.norm2(hidden))


def pad_vision_mlps(visual: Any, multiple: int = 8) -> None:
    """Widen the MLPs of a vision tower with zero channels, up to a multiple that a GPU's fast matrix products need.

    Qwen2.5-VL's MLPs are 3,420 wide, which isn't aligned for bfloat16. The new channels are silu(0) * 0 = 0, so the
    result is the same.
    """
    missing = -visual.blocks[0].mlp.gate_proj.out_features % multiple
    if not missing:  # as they are after the first time
        return
    for block in visual.blocks:
        mlp = block.mlp
        for layer in (mlp.gate_proj, mlp.up_proj):
            layer.weight = _frozen(pad(layer.weight, (0, 0, 0, missing)))
            if layer.bias is not None:
                layer.bias = _frozen(pad(layer.bias, (0, missing)))
            layer.out_features += missing
        mlp.down_proj.weight = _frozen(pad(mlp.down_proj.weight, (0, missing)))
        mlp.down_proj.in_features += missing


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
