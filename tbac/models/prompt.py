"""From texts and images to model inputs: chat template, truncation, image preprocessing, padding, rotary positions.

Token ids, masks, pixels and grids equal those of the released processor, except that a user's text can't contain
control tokens: text that looks like a special token is read as plain text.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import AutoTokenizer, BatchFeature, Qwen2_5_VLConfig, Qwen2VLImageProcessorPil
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from tbac.files import ForeignFileError, read_json, reading, shorten
from tbac.models.chat_template import check_chat_template, make_conversation
from tbac.models.config import SYSTEM_PROMPT
from tbac.models.locks import CallLock, one_at_a_time
from tbac.pictures import MAX_ASPECT_RATIO, to_upright_rgb

ANSWER_SYSTEM = "You are a helpful assistant."
IMAGE_PAD = "<|image_pad|>"
VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"
ON_CPU = ("image_grid_thw", "shared_ids")


class PromptInputs(BatchFeature):
    """`input_ids`, `attention_mask` (batch, token); with images `pixel_values` and `image_grid_thw` (image, 3).

    Inputs that are padded on the right also have `position_ids` (3, batch, token), the rotary positions, and
    `shared_ids`, the tokens of the system message that all prompts begin with. Both are computed here, on the CPU, so
    that a training step needn't wait for the device.

    If the model reads references and there is any image, they also have `reference_pixels` (batch, 3, height, width) in
    [-1, 1], the first input image of each prompt or zeros, and `has_reference` (batch,).
    """

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PromptInputs":
        """Return the inputs on `device`, except for those that are read on the CPU."""
        moved = {}
        for name, value in self.items():
            stays = name in ON_CPU or not isinstance(value, Tensor)
            moved[name] = value if stays else value.to(device, non_blocking=non_blocking)
        return type(self)(moved)


class PromptProcessor:
    """Turns texts and images into model inputs.

    Args:
        tokenizer: Qwen's, with its special tokens and chat template.
        image_processor: Qwen2-VL's, without torchvision.
        image_pixels: area in pixels that each input image is resized to, with sides rounded as Qwen does.
        max_text_tokens: longer texts are cut to this many tokens.
        system_prompt: system message of generation prompts.
        spell_words: add the letters of words in double quotes one by one, so that the model sees the letters that it
            shall draw, however the tokenizer cuts the words.
        reference_size: (height, width) in pixels of references; None if the model reads none.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: Qwen2VLImageProcessorPil,
        image_pixels: int,
        max_text_tokens: int = 256,
        system_prompt: str = SYSTEM_PROMPT,
        spell_words: bool = False,
        reference_size: tuple[int, int] | None = None,
    ) -> None:
        if image_pixels < 1:
            raise ValueError(f"model.image_pixels must be positive, got {image_pixels}")
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.image_pixels = image_pixels
        self.max_text_tokens = max_text_tokens
        self.system_prompt = system_prompt
        self.spell_words, self.reference_size = spell_words, reference_size
        self.lock = CallLock()  # each call changes settings of the tokenizer
        self._shared: dict[str, tuple[int, ...]] = {}
        self._frames: dict[tuple[Any, ...], tuple[list[int], str, str, list[int]]] = {}
        self._image_token = tokenizer.convert_tokens_to_ids(IMAGE_PAD)
        self._special = re.compile("|".join(map(re.escape, tokenizer.all_special_tokens)))

    def describe(self) -> dict[str, Any]:
        """Describe the options that decide what a text becomes, as plain values."""
        return {
            "system_prompt": self.system_prompt,
            "max_text_tokens": self.max_text_tokens,
            "spell_words": self.spell_words,
        }

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> "PromptProcessor":
        """Read tokenizer and image processor from a folder, and try both.

        Raises:
            ForeignFileError: when they can't be read, or aren't those of a Qwen2.5-VL.
        """
        folder = Path(folder)
        for file in sorted(folder.glob("*.json")):  # the libraries read these without limits
            read_json(file, finite=False)
        with reading(str(folder)):
            # With a config the library needn't read that of the folder, which may name any type.
            tokenizer = AutoTokenizer.from_pretrained(folder, config=Qwen2_5_VLConfig(), trust_remote_code=False)
            template = tokenizer.chat_template
            if not isinstance(template, str):
                raise ForeignFileError(f"{folder}: its tokenizer must have one chat template, got {shorten(template)}")
            check_chat_template(template, options.get("system_prompt", SYSTEM_PROMPT), str(folder))
            processor = cls(tokenizer, Qwen2VLImageProcessorPil.from_pretrained(folder), **options)
            processor._try_out(str(folder))
        return processor

    def _try_out(self, place: str) -> None:
        """Raise ForeignFileError unless a text and an image become what the MLLM reads."""
        lacking = [token for token in (IMAGE_PAD, VISION_START, VISION_END) if len(self._tokenize_markup(token)) != 1]
        if lacking or self.tokenizer.pad_token_id is None:
            raise ForeignFileError(f"{place}: its tokenizer lacks the token {lacking[0] if lacking else 'for padding'}")
        inputs = self(["a text", "another"], [[Image.new("RGB", (64, 48))], None])
        pixels, grids = inputs["pixel_values"], inputs["image_grid_thw"]
        if len(pixels) != grids.prod() or not pixels.isfinite().all():
            raise ForeignFileError(f"{place}: preprocessor_config.json turns an image into numbers that no MLLM reads")

    def process_images(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Compute `pixel_values` and `image_grid_thw` of images of any size and mode.

        Raises:
            ValueError: for an image more than 200 times as long as it is wide, which Qwen's resizing doesn't accept.
        """
        if not images:
            return {}
        images = [to_upright_rgb(image) for image in images]
        for image in images:
            if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
                raise ValueError(
                    f"an input image has {image.width} x {image.height} pixels; one side may be at most "
                    f"{MAX_ASPECT_RATIO} times the other"
                )
        size = {"shortest_edge": self.image_pixels, "longest_edge": self.image_pixels}
        return dict(self.image_processor(images=images, size=size, return_tensors="pt"))

    @one_at_a_time
    def tokenize_text(self, text: str, before: str = "", after: str = "") -> list[int]:
        """Turn text into token ids, cut to `max_text_tokens`; what looks like a special token is read as plain text.

        As in the release, a long text is cut after so many tokens, decoded, and tokenized again together with the
        markup around it.

        Args:
            text: the user's text.
            before: markup that is tokenized together with the start of the text.
            after: markup that is tokenized together with the end of the text.
        """
        # A token is at least one byte, so a short ASCII text can't have too many tokens and needn't be counted.
        if not (text.isascii() and len(text) <= self.max_text_tokens):
            ids = self._tokenize_plain(text)
            if len(ids) > self.max_text_tokens:
                text = self.tokenizer.decode(ids[: self.max_text_tokens], clean_up_tokenization_spaces=False)
        return self._tokenize_plain(before + text + after)

    def _tokenize_plain(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def _tokenize_markup(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _build_sequence(self, text: str, image_tokens: Sequence[int], system: str, ending: str) -> list[int]:
        """Build the token ids of one conversation: the chat template with the text in it as plain tokens."""
        key = (tuple(image_tokens), system, ending)
        if key not in self._frames:
            if len(self._frames) > 4096:  # edits have as many as there are sizes of input images
                self._frames.clear()
            self._frames[key] = self._build_frame(*key)
        head, near, far, tail = self._frames[key]
        return head + self.tokenize_text(text, near, far) + tail

    def _build_frame(
        self, image_tokens: Sequence[int], system: str, ending: str
    ) -> tuple[list[int], str, str, list[int]]:
        """Build what surrounds the text: ids, markup just before the text, markup just after it, ids."""
        marker = "\x00"
        messages = make_conversation(len(image_tokens), system, marker)
        rendered = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        pieces = rendered.split(IMAGE_PAD)
        assert len(pieces) == len(image_tokens) + 1, "the chat template must write one image pad per image"
        rendered = pieces[0]
        for count, piece in zip(image_tokens, pieces[1:], strict=True):
            rendered += IMAGE_PAD * count + piece
        before, after = (rendered + ending).split(marker)
        # Markup next to the text ("user\n") is tokenized together with it, since one token may cover both.
        head, near = self._split(before, last=True)
        far, tail = self._split(after, last=False)
        return self._tokenize_markup(head), near, far, self._tokenize_markup(tail)

    def _split(self, markup: str, last: bool) -> tuple[str, str]:
        """Split markup behind its last special token, or before its first one."""
        matches = list(self._special.finditer(markup))
        place = 0
        if matches:
            place = matches[-1].end() if last else matches[0].start()
        return markup[:place], markup[place:]

    @one_at_a_time
    def __call__(
        self,
        texts: Sequence[str],
        images: Sequence[Sequence[Image.Image] | None] | None = None,
        system: str | None = None,
        ending: str = VISION_START,
        padding_side: str = "right",
        reference_size: tuple[int, int] | None = None,
        image_grid_thw: Tensor | None = None,
    ) -> PromptInputs:
        """Build the inputs of a batch.

        Args:
            texts: one per sample.
            images: per sample a list of input images, or None; None = no images at all.
            system: system message; None = that of generation prompts.
            ending: markup after the assistant's header; the queries follow it.
            padding_side: `right` for conditioning, `left` for answering.
            reference_size: (height, width) of references; None = the size given to the constructor.
            image_grid_thw: (image, 3), of images whose features are known already: their pixels are left out then.

        Raises:
            ValueError: without texts, when the numbers of texts and of image lists differ, or a text isn't a string.
        """
        if isinstance(texts, str) or not texts:
            raise ValueError(f"prompts must be a list of at least one text, got {texts!r}")
        images = [None] * len(texts) if images is None else images
        if len(images) != len(texts):
            raise ValueError(f"{len(texts)} texts but {len(images)} lists of images; give one list (or None) per text")
        for text in texts:
            if not isinstance(text, str):
                raise ValueError(f"prompts must be strings, got {type(text).__name__}")
        if system is None:
            system = self.system_prompt
        conditioning = padding_side == "right"
        if self.spell_words and conditioning:
            texts = [spell_quoted_words(text) for text in texts]
        # All images of the batch are processed in one call; each becomes some number of image tokens in its prompt.
        if image_grid_thw is None:
            vision = self.process_images([image for group in images for image in group or ()])
        else:
            vision = {"image_grid_thw": image_grid_thw} if len(image_grid_thw) else {}
        grids = vision.get("image_grid_thw", torch.empty(0, 3, dtype=torch.long))
        counts = (grids.prod(-1) // self.image_processor.merge_size**2).tolist()
        # Each prompt takes the counts of its own images from the list of all.
        sequences, start = [], 0
        for text, group in zip(texts, images, strict=True):
            end = start + len(group or ())
            sequences.append(self._build_sequence(text, counts[start:end], system, ending))
            start = end
        ids, mask = self._pad(sequences, padding_side)
        data: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, **vision}
        # What training would otherwise wait for the device to compute, and the images that the denoiser reads itself.
        if conditioning:
            data["position_ids"] = self._compute_positions(sequences, ids.shape[1], grids.tolist())
            data["shared_ids"] = torch.tensor(self.find_shared_ids(system), dtype=torch.long)
            data |= self.make_references(images, reference_size)
        return PromptInputs(data)

    def make_references(
        self, images: Sequence[Sequence[Image.Image] | None], size: tuple[int, int] | None = None
    ) -> dict[str, Tensor]:
        """Make `reference_pixels` and `has_reference`, if the model reads references and there is any image.

        Args:
            images: per prompt a list of input images, or None.
            size: (height, width) of references; None = the size given to the constructor.
        """
        if not self.reference_size or not any(images):
            return {}
        first_images = [group[0] if group else None for group in images]
        return make_references(first_images, size or self.reference_size)

    def find_shared_ids(self, system: str) -> tuple[int, ...]:
        """Find the tokens that every prompt begins with: the system message, and how the user's message is opened."""
        if system in self._shared:
            return self._shared[system]
        # Prompts with and without an image agree up to the first place where they differ.
        without_image = self._build_sequence("", (), system, "")
        with_image = self._build_sequence("", (1,), system, "")
        pairs = enumerate(zip(without_image, with_image, strict=False))
        agreeing = without_image[: next(i for i, (a, b) in pairs if a != b)]
        # What follows the last special token may be tokenized together with a text, so it isn't shared.
        special = set(self.tokenizer.all_special_ids)
        last_special = max(i for i, token in enumerate(agreeing) if token in special)
        self._shared[system] = tuple(agreeing[: last_special + 1])
        return self._shared[system]

    def _compute_positions(self, sequences: list[list[int]], width: int, grids: list[list[int]]) -> Tensor:
        """Compute rotary positions (3, batch, token) for time, height and width (Qwen2.5-VL's M-RoPE); 0 on padding.

        Text counts up on all three axes at once. An image's merged patches have the row as height and the column as
        width. What follows an image begins after the largest position in it.
        """
        merge = self.image_processor.merge_size
        remaining_grids = iter(grids)
        positions = torch.zeros(3, len(sequences), width, dtype=torch.long)
        for row, sequence in enumerate(sequences):
            place = start = 0
            while place < len(sequence):
                if sequence[place] == self._image_token:
                    # An image: its tokens go row by row. Frames of a single image all have time 0.
                    time, height, width_ = next(remaining_grids)
                    frames = torch.zeros(time, dtype=torch.long)
                    rows, columns = torch.arange(height // merge), torch.arange(width_ // merge)
                    axes = torch.meshgrid(frames, rows, columns, indexing="ij")
                    block = start + torch.stack([axis.flatten() for axis in axes])
                    start += max(height, width_) // merge
                else:
                    # Text: up to the next image, or to the end.
                    end = place
                    while end < len(sequence) and sequence[end] != self._image_token:
                        end += 1
                    block = torch.arange(start, start + end - place).expand(3, -1)
                    start += end - place
                positions[:, row, place : place + block.shape[1]] = block
                place += block.shape[1]
        return positions

    def _pad(self, sequences: list[list[int]], side: str) -> tuple[Tensor, Tensor]:
        width = max(map(len, sequences))
        ids = torch.full((len(sequences), width), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            place = slice(0, len(sequence)) if side == "right" else slice(width - len(sequence), width)
            ids[row, place] = torch.tensor(sequence)
            mask[row, place] = 1
        return ids, mask


def spell_quoted_words(text: str) -> str:
    """Add the letters of each word in double quotes after it: `"LT"` becomes `"LT" (L T)`."""

    def add_letters(quoted: re.Match) -> str:
        letters = " ".join(character for character in quoted[1] if not character.isspace())
        return f"{quoted[0]} ({letters})" if letters else quoted[0]

    return re.sub(r'"([^"]*)"', add_letters, text)


def make_references(images: Sequence[Image.Image | None], size: tuple[int, int]) -> dict[str, Tensor]:
    """Make `reference_pixels` and `has_reference` of the inputs.

    Args:
        images: one per prompt, or None, which becomes zeros.
        size: (height, width) in pixels; the largest central part of that shape is cut out of an image and resized.
    """
    height, width = size
    pixels = torch.zeros(len(images), 3, height, width)
    for row, image in enumerate(images):
        if image is not None:
            fitted = to_upright_rgb(image)
            if fitted.size != (width, height):
                fitted = ImageOps.fit(fitted, (width, height), Image.Resampling.LANCZOS)
            pixels[row] = torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 127.5 - 1
    return {"reference_pixels": pixels, "has_reference": torch.tensor([float(i is not None) for i in images])}
