"""Conversations that the shapes world's MLLM learns from: about pictures, and about captions alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random

from transformers import Qwen2Tokenizer

from data_prep.shapes.language import (
    OPENINGS,
    QUESTION_KINDS,
    caption,
    long_caption,
    sample_edit,
    sample_question,
)
from data_prep.shapes.scene import (
    BACKGROUNDS,
    CELLS,
    COLORS,
    COLUMN_NAMES,
    GLYPHS,
    ROW_NAMES,
    USUAL,
    Mixture,
    Scene,
    in_reading_order,
    sample_scene,
)
from tbac.models.prompt import ANSWER_SYSTEM, SYSTEM_PROMPT, VISION_END, VISION_START

TOLD_KINDS = ("where", "count", "exists")  # questions that every caption answers
COLOR_KINDS = ("color", "shape")  # and those that need one with colours
REPLY = "<|im_end|>\n<|im_start|>assistant\n"


@dataclass(frozen=True)
class Conversation:
    """Tokens, labels (-100 = none), branch of each token (0 = prefix), rotary positions (3, token), visible cells.

    Where a picture is imagined, the last tokens stand for its cells: each is the sum of the words for its row and its
    column, `rows` has the former, and `imagined` the two words that it should say of what stands there.
    """

    tokens: list[int]
    labels: list[int]
    branches: list[int]
    positions: list[list[int]]
    picture: int
    cells: list[int]
    rows: Sequence[int] = ()
    imagined: Sequence[tuple[int, int]] = ()


def last_ids(tokenizer: Qwen2Tokenizer, words: Sequence[str]) -> list[int]:
    """Token id of the last word of each name, as it reads within a sentence."""
    return [tokenizer(" " + w.split()[-1], add_special_tokens=False)["input_ids"][-1] for w in words]


def visible_part(rng: Random, scene: Scene, side: int) -> tuple[Scene, list[int], int]:
    """A window of `side` x `side` cells that shows an object: what is in it, its cells, its side."""
    if side >= CELLS:
        return scene, list(range(CELLS * CELLS)), CELLS
    item = rng.choice(scene.items)
    top = rng.randint(max(0, item.row - side + 1), min(item.row, CELLS - side))
    left = rng.randint(max(0, item.column - side + 1), min(item.column, CELLS - side))
    inside = [i for i in scene.items if top <= i.row < top + side and left <= i.column < left + side]
    cells = [r * CELLS + c for r in range(top, top + side) for c in range(left, left + side)]
    return in_reading_order(scene.background, inside), cells, side


class Conversations:
    """Draws conversations about pictures, and about captions alone."""

    def __init__(
        self, tokenizer: Qwen2Tokenizer, scenes: Sequence[Scene], rng: Random, mixture: Mixture = USUAL
    ) -> None:
        self.scenes, self.rng, self.mixture = scenes, rng, mixture
        self.encode = lru_cache(maxsize=200_000)(lambda text: tuple(tokenizer(text)["input_ids"]))
        self.image_token = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        words = [*GLYPHS, *COLORS, *BACKGROUNDS, "nothing"]
        self.word = dict(zip(words, last_ids(tokenizer, words), strict=True))
        self.places = [(r, c) for r in last_ids(tokenizer, ROW_NAMES) for c in last_ids(tokenizer, COLUMN_NAMES)]

    def draw(self, kind: str, side: int, seen: bool = True) -> Conversation:
        """One conversation about a window of `side` cells.

        Args:
            kind: `name` and `answer` ask questions; `imagine` lays out the picture that a caption tells, or that an
                edit of a seen one makes; `describe` says it in words; `text` repeats captions.
            side: of the visible window.
            seen: False = what is asked or imagined is told by a caption.
        """
        rng = self.rng
        picture = rng.randrange(len(self.scenes))
        scene, cells, side = visible_part(rng, self.scenes[picture], CELLS if kind == "imagine" else side)
        text, colored = "", True
        kinds: tuple[str, ...] = QUESTION_KINDS
        if kind in ("name", "answer", "imagine") and not seen:
            cells, scene = [], sample_scene(rng, self.mixture)
            text = caption(rng, scene)
            colored = any(color in text for color in COLORS)
            kinds = TOLD_KINDS + (COLOR_KINDS if colored else ())
        turns: list[tuple[str, str]] = []
        imagined: tuple[tuple[int, int], ...] = ()
        if kind in ("name", "answer"):
            text += "\n" if text else ""
            turns = [sample_question(rng, scene, kinds) for _ in range(8 if kind == "name" else 6)]
        elif kind == "imagine":
            if seen:
                edit = sample_edit(rng, scene)
                text, scene = edit.instruction, edit.target
            imagined = self._layout(scene, colored, "background" in text or seen)
        elif kind == "describe":
            turns = [("", long_caption(scene))]
            if side == CELLS:
                edits = (sample_edit(rng, scene) for _ in range(2))
                turns += [(e.instruction, long_caption(e.target)) for e in edits]
        else:
            cells = []
            for _ in range(4):
                said = caption(rng, sample_scene(rng, self.mixture))
                opening = max((o for o in OPENINGS if said.startswith(o)), key=len)
                turns.append((said, said.removeprefix(opening)))
        return self._assemble(kind, text, turns, imagined, picture, cells, side)

    def _layout(self, scene: Scene, colored: bool, lit: bool) -> tuple[tuple[int, int], ...]:
        """Two words for each cell: colour and shape, or twice the shape, the background or "nothing"."""
        nothing = self.word[scene.background if lit else "nothing"]
        said = {}
        for item in scene.items:
            shape = self.word[item.shape]
            said[item.row * CELLS + item.column] = (self.word[item.color] if colored else shape, shape)
        return tuple(said.get(cell, (nothing, nothing)) for cell in range(CELLS * CELLS))

    def _assemble(
        self,
        kind: str,
        text: str,
        turns: list[tuple[str, str]],
        imagined: tuple[tuple[int, int], ...],
        picture: int,
        cells: list[int],
        side: int,
    ) -> Conversation:
        system = ANSWER_SYSTEM if kind in ("answer", "name") else SYSTEM_PROMPT
        before = self.encode(f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n")
        tokens = list(before)
        positions = [list(range(len(before))) for _ in range(3)]
        start = len(before)
        if cells:
            opening, closing = self.encode(VISION_START), self.encode(VISION_END)
            first = start + 1
            tokens += [*opening, *[self.image_token] * len(cells), *closing]
            offsets = ([0] * len(cells), [c // side for c in range(len(cells))], [c % side for c in range(len(cells))])
            for axis, offset in zip(positions, offsets, strict=True):
                axis += [start, *[first + o for o in offset], first + side]
            start = first + side + 1
        told = [*self.encode(text), *(self.encode(REPLY + VISION_START) if imagined else ())]
        told += [column for _, column in self.places] if imagined else []
        tokens += told
        for axis in positions:
            axis += range(start, start + len(told))
        start += len(told)
        labels, branches = [-100] * len(tokens), [0] * len(tokens)
        for number, (asked, said) in enumerate(turns, start=1):
            if kind == "name":
                question, answer = self.encode(asked.removesuffix("?")), self.encode(" " + said)
            else:
                question, answer = self.encode(asked + REPLY), self.encode(said + "<|im_end|>")
            length = len(question) + len(answer)
            tokens += [*question, *answer]
            labels += [*[-100] * len(question), *answer]
            branches += [number] * length
            for axis in positions:
                axis += range(start, start + length)
        rows = [row for row, _ in self.places] if imagined else []
        return Conversation(tokens, labels, branches, positions, picture, cells, rows, imagined)
