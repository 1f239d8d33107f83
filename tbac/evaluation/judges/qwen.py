"""A judge that runs on this machine: a Qwen2.5-VL."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from PIL import Image

from tbac.evaluation.judges.base import EmptyReplyError, JudgeFacts, Manner
from tbac.evaluation.protocol import compute_weights_digest
from tbac.models.answering import AnswerOptions
from tbac.models.prompt import ANSWER_SYSTEM, PromptInputs

MAX_NEW_TOKENS = 512  # of a reply, unless a benchmark or the user says otherwise


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
        max_new_tokens: length of the longest reply, also where a benchmark wants another one; None leaves it to the
            benchmark, and is 512 where it says nothing.

    Raises:
        ValueError: when there are no such weights.
    """

    slow: ClassVar[bool] = True
    steady: ClassVar[bool] = True  # it says the same when it is asked again

    mllm: str
    device: str = "auto"
    dtype: str = "bfloat16"
    quantization: str | None = None
    image_pixels: int = 802816
    max_text_tokens: int = 2048
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        from tbac.models.prompt import PromptProcessor
        from tbac.models.qwen import open_mllm

        self.folder, self.model = open_mllm("judge.mllm", self.mllm, self.dtype, self.quantization)
        self.prompt = PromptProcessor.from_pretrained(
            self.folder, image_pixels=self.image_pixels, max_text_tokens=self.max_text_tokens
        )
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model.to(self.device)
        self.system, self.usual = ANSWER_SYSTEM, self.max_new_tokens or MAX_NEW_TOKENS
        self.longest = self.usual
        self._set_identity()

    def _set_identity(self) -> None:
        # Replies that were kept are used again only if everything that they depend on is the same.
        settings = {name: getattr(self, name) for name in ("dtype", "quantization", "image_pixels")}
        self.identity = f"{self.mllm} ({settings | {'max_new_tokens': self.usual}})"
        if (self.system, self.longest) != (ANSWER_SYSTEM, self.usual):
            self.identity += f", {self.describe_facts().settings}"

    def in_manner(self, manner: Manner) -> "QwenJudge":
        """Return a judge with the manner's system message, and its length unless the user has set one.

        It goes on to take the most likely token.
        """
        judge = copy.copy(self)
        judge.system = ANSWER_SYSTEM if manner.system is None else manner.system
        judge.longest = self.max_new_tokens or manner.max_tokens or MAX_NEW_TOKENS
        judge._set_identity()
        return judge

    @cached_property
    def weights_digest(self) -> str:
        """Digest of the weights, computed when it is first needed."""
        return compute_weights_digest(self.folder)

    def describe_facts(self) -> JudgeFacts:
        """Describe the model by the last part of its folder or id, and by its weights."""
        system = None if self.system == ANSWER_SYSTEM else self.system
        settings = Manner(system, 0, self.longest).describe()
        if self.quantization:
            settings += f", {self.quantization}"
        return JudgeFacts(self.mllm.rstrip("/").split("/")[-1], self.weights_digest, settings)

    def _read(self, question: str, images: Sequence[Image.Image]) -> PromptInputs:
        inputs = self.prompt([question], [list(images)], system=self.system, ending="", padding_side="left")
        moved: PromptInputs = inputs.to(self.device)
        return moved

    def ask(self, question: str, images: Sequence[Image.Image]) -> str:
        """Generate a reply.

        Raises:
            EmptyReplyError: when it is empty.
        """
        tokens = self.model.generate(dict(self._read(question, images)), AnswerOptions(self.longest))
        reply = self.prompt.tokenizer.batch_decode(tokens, skip_special_tokens=True)[0].strip()
        if not reply:
            raise EmptyReplyError("the reply is empty")
        return reply

    @torch.no_grad()
    def compute_probability(self, question: str, images: Sequence[Image.Image], answers: Sequence[str]) -> float:
        """Compute the probability that the reply's first token is the first token of one of the answers.

        Each answer counts, also where two begin with the same token, as in GenEval 2's script.
        """
        full = self.model.load_full_model()
        inputs = dict(self._read(question, images))
        # The library keeps the rotary offset of its last prompt here, and would use it for this one.
        full.model.rope_deltas = None
        kinds = (inputs["input_ids"] == full.config.image_token_id).int()
        logits = full(**inputs, mm_token_type_ids=kinds, use_cache=False).logits[0, -1].float()
        full.model.rope_deltas = None
        encoded = [self.prompt.tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in answers]
        first = torch.tensor([ids[0] for ids in encoded if ids], device=logits.device)
        return min(float(logits.softmax(-1)[first].sum()), 1.0)
