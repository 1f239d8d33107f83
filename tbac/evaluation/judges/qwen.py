"""A judge that runs on this machine: a Qwen2.5-VL."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from PIL import Image

from tbac.evaluation.judges.base import JudgeError
from tbac.models.prompt import ANSWER_SYSTEM


@dataclass(eq=False)
class QwenJudge:
    """A Qwen2.5-VL on this machine, which decodes greedily.

    Attributes:
        mllm: folder or hub id, with tokenizer and image processor.
        device: where it runs; `auto` is CUDA where there is one.
        dtype: of the weights.
        quantization: of the decoder layers: `nf4`, `int8`, or None.
        image_pixels: area that each picture is resized to.
        max_text_tokens: length of the longest question.
        max_new_tokens: length of the longest reply.

    Raises:
        ValueError: when there are no such weights.
    """

    slow: ClassVar[bool] = True

    mllm: str
    device: str = "auto"
    dtype: str = "bfloat16"
    quantization: str | None = None
    image_pixels: int = 802816
    max_text_tokens: int = 2048
    max_new_tokens: int = 512

    def __post_init__(self) -> None:
        from tbac.models.prompt import PromptProcessor
        from tbac.models.qwen import open_mllm

        folder, self.model = open_mllm("judge.mllm", self.mllm, self.dtype, self.quantization)
        self.prompt = PromptProcessor.from_pretrained(
            folder, image_pixels=self.image_pixels, max_text_tokens=self.max_text_tokens
        )
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model.to(self.device)
        # Replies that were kept are used again only if everything that they depend on is the same.
        names = ("dtype", "quantization", "image_pixels", "max_new_tokens")
        self.identity = f"{self.mllm} ({ {name: getattr(self, name) for name in names} })"

    def ask(self, question: str, images: Sequence[Image.Image]) -> str:
        """Generate a reply.

        Raises:
            JudgeError: when it is empty.
        """
        inputs = self.prompt([question], [list(images)], system=ANSWER_SYSTEM, ending="", padding_side="left")
        tokens = self.model.generate(dict(inputs.to(self.device)), self.max_new_tokens)
        reply = self.prompt.tokenizer.batch_decode(tokens, skip_special_tokens=True)[0].strip()
        if not reply:
            raise JudgeError("the reply is empty")
        return reply
