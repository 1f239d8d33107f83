"""A judge that runs on this machine: a Qwen2.5-VL."""

from collections.abc import Sequence

import torch
from PIL import Image

from tbac.evaluation.judges.base import JudgeError
from tbac.models.prompt import ANSWER_SYSTEM


class QwenJudge:
    """A Qwen2.5-VL of one's own, greedily.

    Args:
        mllm: folder or hub id, with tokenizer and image processor.
        device: where it runs; `auto` is CUDA where there is one.
        dtype: of the weights.
        quantization: of the decoder layers: `nf4`, `int8`, or None.
        image_pixels: area that each picture is resized to.
        max_text_tokens: longest question.
        max_new_tokens: longest reply.

    Raises:
        ValueError: when there are no such weights.
    """

    slow = True

    def __init__(
        self,
        mllm: str,
        device: str = "auto",
        dtype: str = "bfloat16",
        quantization: str | None = None,
        image_pixels: int = 802816,
        max_text_tokens: int = 2048,
        max_new_tokens: int = 512,
    ) -> None:
        from tbac.models.prompt import PromptProcessor
        from tbac.models.qwen import open_mllm

        folder, self.model = open_mllm("judge.mllm", mllm, dtype, quantization)
        self.prompt = PromptProcessor.from_pretrained(
            folder, image_pixels=image_pixels, max_text_tokens=max_text_tokens
        )
        kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self.model.to(kind)
        self.device, self.max_new_tokens = kind, max_new_tokens
        settings = {"dtype": dtype, "quantization": quantization, "image_pixels": image_pixels}
        self.identity = f"{mllm} ({settings | {'max_new_tokens': max_new_tokens}})"

    def ask(self, question: str, images: Sequence[Image.Image]) -> str:
        """The model's reply."""
        inputs = self.prompt([question], [list(images)], system=ANSWER_SYSTEM, ending="", padding_side="left")
        tokens = self.model.generate(dict(inputs.to(self.device)), self.max_new_tokens)
        reply = self.prompt.tokenizer.batch_decode(tokens, skip_special_tokens=True)[0].strip()
        if not reply:
            raise JudgeError("the reply is empty")
        return reply
