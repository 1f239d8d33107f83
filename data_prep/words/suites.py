"""Writes the suites of the world of words: prompts in GenEval's format, which the exact detector judges.

Each suite changes one thing against `seen_words`, so that what fails tells what wasn't understood.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from random import Random
from typing import Any

from data_prep.shapes.language import GENEVAL_TAGS, RELATIONS
from data_prep.shapes.scene import COLORS, GLYPHS
from data_prep.words.lexicon import Lexicon
from data_prep.words.speech import Habits, Said, Speaker

PLAIN = Habits(**{habit.name: 0.0 for habit in fields(Habits)})
OF_SCENES = ("colors", "shapes", "numbers", "relations", "verbs")  # kinds of words that these prompts use


@dataclass(frozen=True)
class Asked:
    """What a prompt asks for: its text, and what GenEval's rules look for in the picture.

    Attributes:
        said: the description.
        include: objects that must be seen.
        exclude: objects that mustn't.
    """

    said: Said
    include: list[dict[str, Any]]
    exclude: list[dict[str, Any]] = field(default_factory=list)

    def list_others(self) -> tuple[list[str], list[str]]:
        """List the shapes and the colors that aren't asked for."""
        shapes, colors = {wanted["class"] for wanted in self.include}, {wanted.get("color") for wanted in self.include}
        return [shape for shape in GLYPHS if shape not in shapes], [color for color in COLORS if color not in colors]


class Requests:
    """Draws what prompts ask for.

    Args:
        lexicon: the words.
        rng: decides everything.
        unseen: kinds of words that are taken from those that training never sees.
    """

    def __init__(self, lexicon: Lexicon, rng: Random, unseen: tuple[str, ...] = ()) -> None:
        self.lexicon, self.rng = lexicon, rng
        self.speaker = Speaker(lexicon, rng, unseen, PLAIN)

    def draw_pair(self, unseen: bool = False) -> tuple[str, str]:
        """Draw a shape and its color: such as training draws, or one of those that it never does."""
        pairs = self.lexicon.unseen_pairs
        if unseen:
            return self.rng.choice(sorted(pairs.items()))
        return self.rng.choice([(s, c) for s in GLYPHS for c in COLORS if pairs.get(s) != c])

    def draw_other(self, shape: str, color: str) -> tuple[str, str]:
        """Draw a shape and its color, both of which differ from these."""
        while True:
            other = self.draw_pair()
            if other[0] != shape and other[1] != color:
                return other

    def ask_one(self, with_color: bool, unseen: bool = False) -> Asked:
        """Ask for one object."""
        shape, color = self.draw_pair(unseen)
        said = Said(self.speaker.name(shape, color if with_color else None))
        return Asked(said, [make_entry(shape, color if with_color else None)])

    def ask_two(self, with_color: bool, unseen: bool = False) -> Asked:
        """Ask for two different objects, the first of which may be one that training never draws."""
        first = self.draw_pair(unseen)
        both = [first, self.draw_other(*first)]
        self.rng.shuffle(both)
        wanted = [(shape, color if with_color else None) for shape, color in both]
        said = Said(self.speaker.join([self.speaker.name(*pair) for pair in wanted]))
        return Asked(said, [make_entry(*pair) for pair in wanted])

    def ask_many(self, with_color: bool = False, unseen: bool = False) -> Asked:
        """Ask for two to four objects of one kind."""
        (shape, color), count = self.draw_pair(unseen), self.rng.randint(2, 4)
        said = Said(self.speaker.name(shape, color if with_color else None, count))
        wanted = make_entry(shape, color if with_color else None, count)
        return Asked(said, [wanted], [{"class": shape, "count": count + 1}])

    def ask_relation(self, with_color: bool = False) -> Asked:
        """Ask for two objects, one of which stands in a relation to the other."""
        first = self.draw_pair()
        other, relation = self.draw_other(*first), self.rng.choice(RELATIONS)
        wanted = [(shape, color if with_color else None) for shape, color in (first, other)]
        said = self.speaker.relate(self.speaker.name(*wanted[0]), relation, self.speaker.name(*wanted[1]))
        return Asked(said, [make_entry(*wanted[1]), {**make_entry(*wanted[0]), "position": [relation, 0]}])

    def ask_riddle(self) -> Asked:
        """Ask for one object by clues."""
        shape, color = self.draw_pair()
        return Asked(self.speaker.tell_riddle(shape, color), [make_entry(shape, color)])

    def ask_any(self) -> Asked:
        """Ask for one or two objects with colors, or for one beside another."""
        ask = self.rng.choice((self.ask_one, self.ask_two, self.ask_relation))
        return ask(with_color=True)

    def write(self, asked: Asked, sentence: str) -> tuple[str, Asked]:
        """Write the prompt by a kind of sentence; returns it, and what it asks for."""
        shapes, colors = asked.list_others()
        if sentence in ("misleading", "negations"):
            # What the sentence may name besides mustn't be seen.
            shapes = [self.rng.choice(shapes)]
            asked = replace(asked, exclude=[*asked.exclude, {"class": shapes[0], "count": 1}])
        return self.speaker.spell(self.speaker.fill(sentence, asked.said, shapes, colors)), asked


def make_entry(shape: str, color: str | None, count: int = 1) -> dict[str, Any]:
    """Make an entry of GenEval's `include`."""
    entry: dict[str, Any] = {"class": shape, "count": count}
    return entry if color is None else {**entry, "color": color}


Ask = Callable[[Requests], Asked]
BY_TAG: dict[str, Ask] = {
    "single_object": lambda r: r.ask_one(with_color=False),
    "two_object": lambda r: r.ask_two(with_color=False),
    "counting": lambda r: r.ask_many(),
    "colors": lambda r: r.ask_one(with_color=True),
    "position": lambda r: r.ask_relation(),
    "color_attr": lambda r: r.ask_two(with_color=True),
}


@dataclass(frozen=True)
class Tag:
    """A part of a suite.

    Attributes:
        ask: draws what is asked for.
        unseen: kinds of words and sentences that training never sees.
        sentence: kind of sentence around the description.
    """

    ask: Ask
    unseen: tuple[str, ...] = ()
    sentence: str = "openings"


def ask_shape(requests: Requests) -> Asked:
    """Ask for one or two objects without colors."""
    return BY_TAG[requests.rng.choice(("single_object", "two_object"))](requests)


def ask_color(requests: Requests) -> Asked:
    """Ask for one or two objects with colors."""
    return BY_TAG[requests.rng.choice(("colors", "color_attr"))](requests)


def ask_anything(requests: Requests) -> Asked:
    """Ask for whatever GenEval's tags ask for, with colors."""
    asks: tuple[Ask, ...] = (
        lambda r: r.ask_one(True), lambda r: r.ask_two(True), lambda r: r.ask_many(True), lambda r: r.ask_relation(True)
    )  # fmt: skip
    return requests.rng.choice(asks)(requests)


SUITES: Mapping[str, Mapping[str, Tag]] = {
    "seen_words": {tag: Tag(BY_TAG[tag]) for tag in GENEVAL_TAGS},
    "unseen_words": {
        "color": Tag(ask_color, ("colors",)),
        "shape": Tag(ask_shape, ("shapes",)),
        "number": Tag(BY_TAG["counting"], ("numbers",)),
        "relation": Tag(BY_TAG["position"], ("relations", "verbs")),
        "all": Tag(ask_anything, OF_SCENES),
    },
    "unseen_compositions": {
        "single": Tag(lambda r: r.ask_one(True, unseen=True)),
        "pair": Tag(lambda r: r.ask_two(True, unseen=True)),
        "count": Tag(lambda r: r.ask_many(True, unseen=True)),
    },
    "distractors": {
        "clause": Tag(Requests.ask_any, ("clauses",), "clauses"),
        "misleading": Tag(Requests.ask_any, ("misleading",), "misleading"),
        "negated": Tag(Requests.ask_any, ("negations",), "negations"),
    },
    "riddles": {
        "shape": Tag(Requests.ask_riddle, ("shape_clues",)),
        "color": Tag(Requests.ask_riddle, ("color_clues",)),
        "both": Tag(Requests.ask_riddle, ("shape_clues", "color_clues")),
    },
}


def sample_suite(name: str, lexicon: Lexicon, rng: Random, per_tag: int) -> list[dict[str, Any]]:
    """Draw the rows of a suite, at most `per_tag` different prompts for each of its tags."""
    rows = []
    for tag, part in SUITES[name].items():
        requests = Requests(lexicon, rng, part.unseen)
        prompts: set[str] = set()
        for _ in range(per_tag * 50):
            prompt, asked = requests.write(part.ask(requests), part.sentence)
            if prompt not in prompts:
                prompts.add(prompt)
                exclude = {"exclude": asked.exclude} if asked.exclude else {}
                rows.append({"tag": tag, "include": asked.include, **exclude, "prompt": prompt})
            if len(prompts) == per_tag:
                break
    return rows
