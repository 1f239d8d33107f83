"""Captions of the world of words with what is true of them, for `experiments/probe.py`: in words seen and unseen."""

from collections.abc import Callable
from random import Random

from data_prep.shapes.language import RELATIONS
from data_prep.shapes.scene import COLORS, GLYPHS
from data_prep.words.lexicon import Lexicon, read_lexicon
from data_prep.words.speech import Speaker
from data_prep.words.suites import PLAIN
from tbac.evaluation.captions import LabelledCaption, choose_split

Told = tuple[str, dict[str, str]]  # a caption without opening, and what is true of it
KIND_OF = {"color": "colors", "shape": "shapes", "count": "numbers", "relation": "relations"}
UNSEEN_SHARE = 0.35  # of captions


def tell_object(speaker: Speaker) -> Told:
    """Tell of one object."""
    shape, color = speaker.rng.choice(list(GLYPHS)), speaker.rng.choice(list(COLORS))
    return speaker.name(shape, color), {"shape": shape, "color": color}


def tell_group(speaker: Speaker) -> Told:
    """Tell of two to four objects of one kind."""
    count = speaker.rng.randint(2, 4)
    shape, color = speaker.rng.choice(list(GLYPHS)), speaker.rng.choice([None, *COLORS])
    return speaker.name(shape, color, count), {"count": str(count), "shape": shape}


def tell_pair(speaker: Speaker) -> Told:
    """Tell where one object stands relative to another, and label which color stands left or above."""
    (first, color), (other, other_color) = zip(
        speaker.rng.sample(list(GLYPHS), 2), speaker.rng.sample(list(COLORS), 2), strict=True
    )
    relation = speaker.rng.choice(RELATIONS)
    said = speaker.relate(speaker.name(first, color), relation, speaker.name(other, other_color))
    leads = relation in ("left of", "above")  # the object that is named first stands left or above
    return said.text, {"relation": relation, "color of the left or upper": color if leads else other_color}


TELL: dict[str, tuple[Callable[[Speaker], Told], ...]] = {
    "color": (tell_object,),
    "shape": (tell_object, tell_group),
    "count": (tell_group,),
    "relation": (tell_pair,),
}


def draw_captions(seed: int, count: int, lexicon: Lexicon | None = None) -> list[LabelledCaption]:
    """Draw captions about one object, a group, or two objects.

    A caption of the split `unseen` has words that training never sees for one concept, and is a test of that alone.

    Args:
        seed: of the draws.
        count: how many captions; those that are drawn twice are there once.
        lexicon: the words; None = the world's own.

    Returns:
        Captions with the concepts color, shape, count, relation, and the color of that object of two which stands left
        or above: a bag of words doesn't tell it.
    """
    rng, lexicon = Random(f"words captions/{seed}"), lexicon or read_lexicon()
    captions: dict[str, LabelledCaption] = {}
    for _ in range(count):
        concept = rng.choice(list(KIND_OF))
        unseen = rng.random() < UNSEEN_SHARE
        speaker = Speaker(lexicon, rng, (KIND_OF[concept],) if unseen else (), PLAIN)
        text, labels = rng.choice(TELL[concept])(speaker)
        text = speaker.choose("openings").replace("{}", text)
        if unseen:
            captions[text] = LabelledCaption(text, {concept: labels[concept]}, "unseen")
        else:
            captions[text] = LabelledCaption(text, labels, choose_split(text))
    return list(captions.values())
