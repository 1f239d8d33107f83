"""Reads the lexicon: the words for each concept, those for training and those that training never sees."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data_prep.shapes.language import EDIT_TYPES, RELATIONS
from data_prep.shapes.scene import BACKGROUNDS, COLORS, COLUMN_NAMES, GLYPHS, ROW_NAMES, Scene

FILE = Path(__file__).with_name("lexicon.yaml")
SPLITS = ("train", "held_out")
PLACES = tuple(f"{row} {column}" for row in ROW_NAMES for column in COLUMN_NAMES)
# What the lexicon must have words for, by kind.
CONCEPTS: dict[str, tuple[str, ...]] = {
    "colors": tuple(COLORS),
    "shapes": tuple(GLYPHS),
    "backgrounds": tuple(BACKGROUNDS),
    "numbers": ("2", "3", "4", "5", "6"),
    "relations": RELATIONS,
    "verbs": ("be",),
    "places": PLACES,
    "color_clues": tuple(COLORS),
    "shape_clues": tuple(GLYPHS),
    "edits": EDIT_TYPES,
}
SENTENCES = ("openings", "clauses", "misleading", "negations", "riddles")  # kinds of one concept, of their own name
PATTERNS = (
    "color_after",
    "color_denied",
    "relation",
    "relation_sentence",
    "place",
    "place_sentence",
    "background",
    "joined",
)

Words = Sequence[str]


@dataclass(frozen=True)
class Lexicon:
    """The words of the world.

    Attributes:
        words: kind -> concept -> split (`train`, `held_out`) -> words for it. Those of shapes are singulars.
        plurals: singular of a shape's word -> its plural.
        patterns: name -> ways of building a phrase, which serve both splits.
        unseen_pairs: shape -> the color in which training never draws it.
    """

    words: Mapping[str, Mapping[str, Mapping[str, Words]]]
    plurals: Mapping[str, str]
    patterns: Mapping[str, Words]
    unseen_pairs: Mapping[str, str]

    def list_words(self, split: str) -> Iterator[str]:
        """List all words and sentences of a split, with the plurals."""
        for concepts in self.words.values():
            for by_split in concepts.values():
                yield from by_split[split]
                yield from (self.plurals[word] for word in by_split[split] if word in self.plurals)

    def is_unseen(self, scene: Scene) -> bool:
        """Whether a scene has a shape in the color in which training never draws it."""
        return any(self.unseen_pairs.get(item.shape) == item.color for item in scene.items)


def read_lexicon(path: Path = FILE) -> Lexicon:
    """Read a lexicon.

    Raises:
        ValueError: when a concept has no words of a split, a word stands in both, or a name isn't known.
    """
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    expected = {*CONCEPTS, *SENTENCES, "patterns", "unseen_pairs"}
    if not isinstance(content, dict) or set(content) != expected:
        raise ValueError(f"{path} must have {', '.join(sorted(expected))}")
    words = {}
    for kind in (*CONCEPTS, *SENTENCES):
        # A kind of sentences has no concepts, so it is its own one.
        concepts = content[kind] if kind in CONCEPTS else {kind: content[kind]}
        words[kind] = read_concepts(concepts, CONCEPTS.get(kind, (kind,)), f"{path}: {kind}")
    plurals: dict[str, str] = {}
    for entry in content["shapes"].values():
        plurals |= entry["train"] | entry["held_out"]
    if set(content["patterns"]) != set(PATTERNS):
        raise ValueError(f"{path}: patterns must have {', '.join(PATTERNS)}")
    pairs = content["unseen_pairs"]
    if not all(shape in GLYPHS and color in COLORS for shape, color in pairs.items()):
        raise ValueError(f"{path}: unseen_pairs must map shapes to colors, got {pairs}")
    return Lexicon(words, plurals, content["patterns"], pairs)


def read_concepts(concepts: Mapping[Any, Any], expected: Sequence[str], place: str) -> dict[str, dict[str, list[str]]]:
    """Read the words of each concept of a kind: concept -> split -> words.

    Args:
        concepts: concept -> split -> words, or a mapping of singulars to plurals, of which the singulars are taken.
        expected: the concepts that there must be.
        place: where they stand, for messages.

    Raises:
        ValueError: unless there are words of both splits for each concept, none of which stands in both.
    """
    by_name = {str(name): entry for name, entry in concepts.items()}
    if set(by_name) != set(expected):
        raise ValueError(f"{place} must have {', '.join(expected)}, got {', '.join(by_name)}")
    words = {}
    for name, entry in by_name.items():
        if set(entry) != set(SPLITS) or not all(entry[split] for split in SPLITS):
            raise ValueError(f"{place}.{name} must have words for {' and '.join(SPLITS)}")
        shared = set(entry["train"]) & set(entry["held_out"])
        if shared:
            raise ValueError(f"{place}.{name}: {', '.join(map(str, sorted(shared)))} can't be both seen and unseen")
        words[name] = {split: list(map(str, entry[split])) for split in SPLITS}
    return words
