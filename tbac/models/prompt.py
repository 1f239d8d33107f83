"""Prompts as the model reads them: chat template, truncation, image preprocessing, padding.

The text is never allowed to carry control tokens: look-alikes of special tokens in it are spelled out as plain text.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, BatchFeature, Qwen2VLImageProcessorPil
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

SYSTEM_PROMPT = (
    "You will be given an image or its caption. Please describe the content of the image in detail in your own words."
)
IMAGE_PAD = "<|image_pad|>"
VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"


class PromptInputs(BatchFeature):
    """`input_ids`, `attention_mask` (batch, token); with images `pixel_values` and `image_grid_thw` (image, 3)."""


class PromptProcessor:
    """Turns texts and images into model inputs.

    Args:
        tokenizer: Qwen's, with its special tokens and chat template.
        image_processor: Qwen2-VL's, without torchvision.
        image_pixels: area in pixels that each input image is resized to before Qwen's own rounding.
        max_text_tokens: longer texts are cut to this many tokens.
        system_prompt: system message of generation prompts.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: Qwen2VLImageProcessorPil,
        image_pixels: int,
        max_text_tokens: int = 256,
        system_prompt: str = SYSTEM_PROMPT,
    ) -> None:
        if image_pixels < 1:
            raise ValueError(f"model.image_pixels must be positive, got {image_pixels}")
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.image_pixels = image_pixels
        self.max_text_tokens = max_text_tokens
        self.system_prompt = system_prompt

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> "PromptProcessor":
        """Read tokenizer and image processor from a folder or hub id."""
        return cls(AutoTokenizer.from_pretrained(folder), Qwen2VLImageProcessorPil.from_pretrained(folder), **options)

    def resize(self, image: Image.Image) -> Image.Image:
        """RGB of about `image_pixels` pixels in area, aspect ratio kept."""
        image = image.convert("RGB")
        scale = math.sqrt(self.image_pixels / (image.width * image.height))
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)

    def text_ids(self, text: str) -> list[int]:
        """Token ids of plain text, cut to `max_text_tokens`; special-token look-alikes stay text."""
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return ids[: self.max_text_tokens]

    def _markup_ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _sequence(self, text: str, image_tokens: Sequence[int], system: str, ending: str) -> list[int]:
        """One conversation by the tokenizer's own chat template, with the text spliced in as plain tokens."""
        marker = "\x00"
        content: list[dict[str, str]] = [{"type": "image"} for _ in image_tokens]
        content.append({"type": "text", "text": marker})
        messages = [{"role": "system", "content": system}, {"role": "user", "content": content}]
        rendered = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        pieces = rendered.split(IMAGE_PAD)
        assert len(pieces) == len(image_tokens) + 1, "the chat template must write one image pad per image"
        rendered = pieces[0]
        for count, piece in zip(image_tokens, pieces[1:], strict=True):
            rendered += IMAGE_PAD * count + piece
        before, after = rendered.split(marker)
        return self._markup_ids(before) + self.text_ids(text) + self._markup_ids(after + ending)

    def __call__(
        self,
        texts: Sequence[str],
        images: Sequence[Sequence[Image.Image] | None] | None = None,
        system: str | None = None,
        ending: str = VISION_START,
        padding_side: str = "right",
    ) -> PromptInputs:
        """Build the inputs of a batch.

        Args:
            texts: one per sample.
            images: per sample a list of input images, or None; None = no images at all.
            system: system message; None = the generation prompt's.
            ending: markup after the generation prompt; the queries follow it.
            padding_side: `right` for conditioning, `left` for answering.

        Raises:
            ValueError: when the numbers of texts and of image lists differ, or a text isn't a string.
        """
        images = [None] * len(texts) if images is None else images
        if len(images) != len(texts):
            raise ValueError(f"{len(texts)} texts but {len(images)} lists of images; give one list (or None) per text")
        if bad := [t for t in texts if not isinstance(t, str)]:
            raise ValueError(f"prompts must be strings, got {type(bad[0]).__name__}")
        flat = [self.resize(image) for group in images for image in group or ()]
        vision = self.image_processor(images=flat, return_tensors="pt") if flat else {}
        grids = vision["image_grid_thw"] if flat else torch.empty(0, 3, dtype=torch.long)
        counts = (grids.prod(-1) // self.image_processor.merge_size**2).tolist()
        sequences, start = [], 0
        for text, group in zip(texts, images, strict=True):
            end = start + len(group or ())
            sequences.append(
                self._sequence(text, counts[start:end], self.system_prompt if system is None else system, ending)
            )
            start = end
        data: dict[str, Tensor] = dict(
            zip(("input_ids", "attention_mask"), self._pad(sequences, padding_side), strict=True)
        )
        return PromptInputs({**data, **{k: vision[k] for k in ("pixel_values", "image_grid_thw") if flat}})

    def _pad(self, sequences: list[list[int]], side: str) -> tuple[Tensor, Tensor]:
        width = max(map(len, sequences))
        ids = torch.full((len(sequences), width), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            place = slice(0, len(sequence)) if side == "right" else slice(width - len(sequence), width)
            ids[row, place] = torch.tensor(sequence)
            mask[row, place] = 1
        return ids, mask
