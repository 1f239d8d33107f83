"""Says what is in a scene, and how to change it, as people write: in other words each time, short or long."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from random import Random

from data_prep.shapes.language import Edit, find_relations, is_stacked
from data_prep.shapes.scene import COLORS, GLYPHS, Item, Scene
from data_prep.words.lexicon import Lexicon, Words

AFTER_NOUN = "the color "  # colors that begin so stand after the noun


@dataclass(frozen=True)
class Habits:
    """How often training captions do what, as shares.

    Attributes:
        colorless: captions without colors.
        relation: captions of two objects side by side that say where one stands relative to the other.
        long: captions that give the place of every object, though it follows from how pictures are composed.
        background: captions that name the background.
        denied: single objects whose color is told apart from another one.
        riddle: captions of one object that are riddles.
        clause, misleading, negated: captions with a clause that doesn't matter, with one that names what isn't in the
            picture, and with a negation.
        british: texts that spell color and gray as the British do.
        sentence: texts that begin with a capital and end with a full stop.
    """

    colorless: float = 0.12
    relation: float = 0.6
    long: float = 0.1
    background: float = 0.12
    denied: float = 0.06
    riddle: float = 0.12
    clause: float = 0.2
    misleading: float = 0.08
    negated: float = 0.1
    british: float = 0.25
    sentence: float = 0.3


@dataclass(frozen=True)
class Said:
    """A description, and whether it is a sentence by itself and not the name of something."""

    text: str
    is_sentence: bool = False


def add_article(phrase: str) -> str:
    """Put "a" or "an" before a phrase."""
    vowel = phrase[0].lower() in "aeiou" or phrase.startswith(("L-", "L "))
    return f"{'an' if vowel else 'a'} {phrase}"


class Speaker:
    """Finds words for objects, relations, scenes and edits.

    Args:
        lexicon: the words.
        rng: decides which.
        unseen: kinds of words (`colors`, `shapes`, …) that are taken from those that training never sees.
        habits: how captions are built.
    """

    def __init__(
        self, lexicon: Lexicon, rng: Random, unseen: Collection[str] = (), habits: Habits | None = None
    ) -> None:
        self.lexicon, self.rng, self.unseen, self.habits = lexicon, rng, unseen, habits or Habits()

    def list_choices(self, kind: str, concept: str | None = None) -> Words:
        """List the words for a concept, or the sentences of a kind that is its own concept."""
        return self.lexicon.words[kind][concept or kind]["held_out" if kind in self.unseen else "train"]

    def choose(self, kind: str, concept: str | None = None) -> str:
        """Choose a word for a concept, or a sentence of a kind that is its own concept."""
        return self.rng.choice(self.list_choices(kind, concept))

    def build(self, pattern: str, **parts: str) -> str:
        """Build a phrase by one of the patterns of this name."""
        return self.rng.choice(self.lexicon.patterns[pattern]).format(**parts)

    def happens(self, share: float) -> bool:
        """Decide whether to do what is done with this share."""
        return self.rng.random() < share

    def name_kind(self, shape: str, color: str | None = None, count: int = 1) -> str:
        """Name objects without an article: "scarlet square", "boxes the color of blood"."""
        noun = self.choose("shapes", shape)
        if count > 1:
            noun = self.lexicon.plurals[noun]
        if color is None:
            return noun
        word = self.choose("colors", color)
        if count == 1 and self.happens(self.habits.denied):
            other = self.choose("colors", self.rng.choice([name for name in COLORS if name != color]))
            return self.build("color_denied", noun=noun, color=word, other=other)
        if word.startswith(AFTER_NOUN):
            form = self.build("color_after", noun=noun, color=word)
            return form.replace("that has", "that have") if count > 1 else form
        return f"{word} {noun}"

    def name(self, shape: str, color: str | None = None, count: int = 1) -> str:
        """Name objects: "a scarlet square", "a pair of boxes"."""
        kind = self.name_kind(shape, color, count)
        return add_article(kind) if count == 1 else f"{self.choose('numbers', str(count))} {kind}"

    def relate(self, first: str, relation: str, second: str) -> Said:
        """Say where something that is named stands relative to something else."""
        pattern = self.rng.choice(("relation", "relation_sentence"))
        where, verb = self.choose("relations", relation), self.choose("verbs", "be")
        return Said(self.build(pattern, a=first, b=second, where=where, verb=verb), pattern != "relation")

    def place(self, item: Item, pattern: str) -> str:
        """Say where an object stands, by the pattern of this name."""
        place, verb = self.choose("places", item.place), self.choose("verbs", "be")
        return self.build(pattern, a=self.name(item.shape, item.color), place=place, verb=verb)

    def join(self, names: list[str]) -> str:
        """Join what is listed."""
        if len(names) == 1:
            return names[0]
        return self.build("joined", first=", ".join(names[:-1]), last=names[-1])

    def list_groups(self, scene: Scene, with_color: bool) -> str:
        """List the objects in reading order as counted groups."""
        kinds = [(item.shape, item.color if with_color else None) for item in scene.items]
        return self.join([self.name(*kind, count) for kind, count in Counter(kinds).items()])

    def describe_fully(self, scene: Scene) -> Said:
        """Give the place of every object, in any order, and the background."""
        pattern = self.rng.choice(("place", "place_sentence"))
        items = self.rng.sample(scene.items, len(scene.items))
        body = self.join([self.place(item, pattern) for item in items])
        return Said(self.add_background(body, scene), pattern != "place")

    def add_background(self, body: str, scene: Scene) -> str:
        """Name the background too."""
        return self.build("background", scene=body, background=self.choose("backgrounds", scene.background))

    def tell_riddle(self, shape: str, color: str) -> Said:
        """Describe an object by clues."""
        clues = {"shape": self.choose("shape_clues", shape), "color": self.choose("color_clues", color)}
        return Said(self.choose("riddles").format(**clues), True)

    def describe(self, scene: Scene) -> Said:
        """Describe a scene: by what follows from how pictures are composed, or else in full."""
        follows = scene.composed or is_stacked(scene)
        if not follows or self.happens(self.habits.long):
            return self.describe_fully(scene)
        items = scene.items
        if len(items) == 1 and self.happens(self.habits.riddle):
            return self.tell_riddle(items[0].shape, items[0].color)
        with_color = not self.happens(self.habits.colorless)
        # Two objects one above the other are told by their relation; what stands side by side may also be listed.
        if is_stacked(scene) or (
            len(items) == 2 and items[0].shape != items[1].shape and self.happens(self.habits.relation)
        ):
            first, second = self.rng.sample(items, 2)
            where = self.rng.choice(find_relations(first, second))
            names = [self.name(item.shape, item.color if with_color else None) for item in (first, second)]
            said = self.relate(names[0], where, names[1])
        else:
            said = Said(self.list_groups(scene, with_color))
        if self.happens(self.habits.background):
            return Said(self.add_background(said.text, scene), said.is_sentence)
        return said

    def wrap(self, said: Said, scene: Scene) -> str:
        """Put a description into a sentence, with clauses that don't matter and things that aren't there."""
        # Other words of a sentence name shapes and colors that the scene hasn't.
        drawn_shapes, drawn_colors = {item.shape for item in scene.items}, {item.color for item in scene.items}
        shapes = [shape for shape in GLYPHS if shape not in drawn_shapes]
        colors = [color for color in COLORS if color not in drawn_colors]
        return self.fill(self._draw_sentence(), said, shapes, colors)

    def _draw_sentence(self) -> str:
        """Draw the kind of sentence."""
        habits = self.habits
        kinds = {"negations": habits.negated, "misleading": habits.misleading, "clauses": habits.clause}
        draw = self.rng.random()
        for kind, share in kinds.items():
            draw -= share
            if draw < 0:
                return kind
        return "openings"

    def fill(self, kind: str, said: Said, shapes: Sequence[str], colors: Sequence[str]) -> str:
        """Put a description into a sentence of this kind, which may name one of `shapes` and of `colors` besides."""
        # Only those sentences whose blanks can be filled, and into which the description fits.
        unfilled = [blank for blank, names in (("{shapes}", shapes), ("{color}", colors)) if not names]
        sentences = []
        for sentence in self.list_choices(kind):
            fits = not said.is_sentence or sentence.startswith("{}") or sentence.endswith(": {}")
            if fits and not any(blank in sentence for blank in unfilled):
                sentences.append(sentence)
        sentence = self.rng.choice(sentences) if sentences else "{}"
        if "{shapes}" in sentence:
            sentence = sentence.replace("{shapes}", self.name_kind(self.rng.choice(shapes), count=2))
        if "{color}" in sentence:
            sentence = sentence.replace("{color}", self.choose("colors", self.rng.choice(colors)))
        return sentence.replace("{}", said.text)

    def spell(self, text: str) -> str:
        """Spell a text as this or that writer would."""
        text = text.replace(",,", ",").rstrip(",")
        if self.happens(self.habits.british):
            text = text.replace("color", "colour").replace("gray", "grey")
        if self.happens(self.habits.sentence):
            text = f"{text[0].upper()}{text[1:]}."
        return text

    def write_caption(self, scene: Scene) -> str:
        """Write a caption of a scene."""
        return self.spell(self.wrap(self.describe(scene), scene))

    def write_instruction(self, edit: Edit) -> str:
        """Write the instruction of an edit. The place of an object that is added may be left out."""
        source, target = set(edit.source.items), set(edit.target.items)
        parts = {"background": self.choose("backgrounds", edit.target.background)}
        if source - target:
            (old,) = source - target
            parts["old"] = f"the {self.name_kind(old.shape, old.color)}"
        if target - source:
            (new,) = target - source
            parts["new"], parts["color"] = self.name(new.shape, new.color), self.choose("colors", new.color)
            parts["place"] = self.choose("places", new.place)
            if edit.kind == "add" and not edit.anywhere:
                parts["new"] += f" {parts['place']}"
        return self.spell(self.choose("edits", edit.kind).format(**parts))
