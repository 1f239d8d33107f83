"""Draws the conversations that the shapes world's MLLM learns from, about pictures and about captions alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random

from transformers import Qwen2Tokenizer

from data_prep.shapes.language import (
    OPENINGS,
    QUESTION_KINDS,
    sample_caption,
    sample_edit,
    sample_question,
    write_long_caption,
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
    arrange_scene,
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


def find_last_ids(tokenizer: Qwen2Tokenizer, words: Sequence[str]) -> list[int]:
    """Find the token id of the last word of each name, as it stands within a sentence."""
    return [tokenizer(" " + w.split()[-1], add_special_tokens=False)["input_ids"][-1] for w in words]


def choose_window(rng: Random, scene: Scene, side: int) -> tuple[Scene, list[int], int]:
    """Choose a window of `side` x `side` cells that shows an object; returns what is in it, its cells and its side."""
    if side >= CELLS:
        return scene, list(range(CELLS * CELLS)), CELLS
    item = rng.choice(scene.items)
    top = rng.randint(max(0, item.row - side + 1), min(item.row, CELLS - side))
    left = rng.randint(max(0, item.column - side + 1), min(item.column, CELLS - side))
    inside = [i for i in scene.items if top <= i.row < top + side and left <= i.column < left + side]
    cells = [r * CELLS + c for r in range(top, top + side) for c in range(left, left + side)]
    return arrange_scene(scene.background, inside), cells, side


class _Prefix:
    """Tokens and rotary positions of what comes before the branches.

    Args:
        cells: visible cells.

    Attributes:
        tokens: so far.
        positions: of each token, (time, row, column) as three lists.
        next: position of the token to come.
    """

    def __init__(self, cells: list[int]) -> None:
        self.cells = cells
        self.tokens: list[int] = []
        self.positions: list[list[int]] = [[], [], []]
        self.next = 0

    def add_text(self, tokens: Sequence[int]) -> None:
        """Add tokens of a text, at the same place on all three axes."""
        self.tokens += tokens
        for axis in self.positions:
            axis += range(self.next, self.next + len(tokens))
        self.next += len(tokens)

    def add_picture(self, image_token: int, count: int, side: int) -> None:
        """Add the tokens of a picture of `side` cells a side, which stand at one time, by row and column."""
        self.tokens += [image_token] * count
        time, rows, columns = self.positions
        time += [self.next] * count
        rows += [self.next + cell // side for cell in range(count)]
        columns += [self.next + cell % side for cell in range(count)]
        self.next += side  # as in Qwen2.5-VL: text goes on after the longest axis


class Conversations:
    """Draws conversations about pictures, and about captions alone.

    Args:
        tokenizer: of the world.
        scenes: of the pictures.
        rng: decides everything that is drawn.
        mixture: of the scenes that are told in words.
    """

    def __init__(
        self, tokenizer: Qwen2Tokenizer, scenes: Sequence[Scene], rng: Random, mixture: Mixture = USUAL
    ) -> None:
        self.scenes, self.rng, self.mixture = scenes, rng, mixture
        self.encode = lru_cache(maxsize=200_000)(lambda text: tuple(tokenizer(text)["input_ids"]))
        self.image_token = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        words = [*GLYPHS, *COLORS, *BACKGROUNDS, "nothing"]
        self.word = dict(zip(words, find_last_ids(tokenizer, words), strict=True))
        self.places = [
            (r, c) for r in find_last_ids(tokenizer, ROW_NAMES) for c in find_last_ids(tokenizer, COLUMN_NAMES)
        ]

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
        scene, cells, side = choose_window(rng, self.scenes[picture], CELLS if kind == "imagine" else side)
        # A caption takes the place of the picture; then only what it says can be asked for.
        text, colored = "", True
        kinds: tuple[str, ...] = QUESTION_KINDS
        if kind in ("name", "answer", "imagine") and not seen:
            cells, scene = [], sample_scene(rng, self.mixture)
            text = sample_caption(rng, scene)
            colored = any(color in text for color in COLORS)
            kinds = TOLD_KINDS + (COLOR_KINDS if colored else ())
        # Each kind of conversation teaches something else, with questions and answers, or with an imagined picture.
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
            turns = self._describe(scene, with_edits=side == CELLS)
        else:
            cells, turns = [], [self._repeat_caption() for _ in range(4)]
        prefix = self._build_prefix(kind, text, cells, side, bool(imagined))
        return self._add_turns(prefix, kind, turns, imagined, picture)

    def _describe(self, scene: Scene, with_edits: bool) -> list[tuple[str, str]]:
        """Describe the scene in words, and what two edits would make of it."""
        turns = [("", write_long_caption(scene))]
        if with_edits:
            edits = (sample_edit(self.rng, scene) for _ in range(2))
            turns += [(edit.instruction, write_long_caption(edit.target)) for edit in edits]
        return turns

    def _repeat_caption(self) -> tuple[str, str]:
        """Draw a caption; returns it with and without its opening."""
        said = sample_caption(self.rng, sample_scene(self.rng, self.mixture))
        opening = max((opening for opening in OPENINGS if said.startswith(opening)), key=len)
        return said, said.removeprefix(opening)

    def _layout(self, scene: Scene, colored: bool, lit: bool) -> tuple[tuple[int, int], ...]:
        """Lay out a scene: two words for each cell: colour and shape, or twice shape, background or "nothing"."""
        nothing = self.word[scene.background if lit else "nothing"]
        said = {}
        for item in scene.items:
            shape = self.word[item.shape]
            said[item.row * CELLS + item.column] = (self.word[item.color] if colored else shape, shape)
        return tuple(said.get(cell, (nothing, nothing)) for cell in range(CELLS * CELLS))

    def _build_prefix(self, kind: str, text: str, cells: list[int], side: int, imagines: bool) -> _Prefix:
        """Build what all branches see: the system message, the picture, the text, and tokens for imagined cells."""
        system = ANSWER_SYSTEM if kind in ("answer", "name") else SYSTEM_PROMPT
        prefix = _Prefix(cells)
        prefix.add_text(self.encode(f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n"))
        if cells:
            prefix.add_text(self.encode(VISION_START))
            prefix.add_picture(self.image_token, len(cells), side)
            prefix.add_text(self.encode(VISION_END))
        prefix.add_text(self.encode(text))
        if imagines:
            prefix.add_text(self.encode(REPLY + VISION_START))
            prefix.add_text([column for _, column in self.places])
        return prefix

    def _add_turns(
        self,
        prefix: _Prefix,
        kind: str,
        turns: list[tuple[str, str]],
        imagined: tuple[tuple[int, int], ...],
        picture: int,
    ) -> Conversation:
        """Add questions and answers, each pair as a branch that begins where the prefix ends."""
        tokens, positions = list(prefix.tokens), [list(axis) for axis in prefix.positions]
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
                axis += range(prefix.next, prefix.next + length)
        rows = [row for row, _ in self.places] if imagined else []
        return Conversation(tokens, labels, branches, positions, picture, prefix.cells, rows, imagined)
