"""EmojiEntailment, visual entailment in the world of EmojiScenes.

    there is a dog on the left
    a blue picture with a dog on the left
    the dog is to the left of the fox
    there are exactly two dogs on the left         not in clutter

A dark board hides one place of every picture. A hypothesis is entailed where the picture shows it,
contradicted where it shows otherwise, and neutral where what would decide it is behind the board.
Each hypothesis comes with all three pictures, so that its words say nothing about the class, and
every picture has its board, so that the board alone does not either.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np

from elip_models.data.captions import at_place, in_words, with_article
from elip_models.data.tasks.staging import (
    RELATIONS,
    cover,
    draw,
    numbers,
    others,
    pick,
    places,
    recast,
    related,
    two_names,
)
from elip_models.data.tasks.worlds import Asked, EmojiExamples
from elip_models.data.world import BACKGROUNDS, COUNTS, EMOJI, Scene

LABELS = ("entailment", "neutral", "contradiction")


class Hypothesis(NamedTuple):
    """stage: a label -> a scene, one place of it hidden, in which the text has that label."""

    text: str
    stage: Callable[[np.random.Generator, str], Scene]


def _with_one(scene: Scene, number: int, name: str, label: str, rng: np.random.Generator) -> Scene:
    """The scene whose group shows the emoji, does not, or cannot be seen; a place is hidden."""
    rest = others(scene, rng, number)
    if label == "entailment":
        return cover(recast(scene, rng, {number: name}), rest[0])
    if label == "neutral":
        return cover(recast(scene, rng, {}, absent=(name,)), number)
    elsewhere = {rest[1]: name} if len(rest) > 1 and rng.integers(2) else {}
    return cover(recast(scene, rng, elsewhere, absent=(name,)), rest[0])


def _placed(rng: np.random.Generator, clutter: int) -> Hypothesis:
    name, place = pick(rng, EMOJI), pick(rng, places(clutter))

    def stage(rng: np.random.Generator, label: str) -> Scene:
        scene, number = draw(rng, clutter, lambda scene: numbers(scene, place=place))
        return _with_one(scene, number, name, label, rng)

    return Hypothesis(f"there is {with_article(name)} {at_place(place)}", stage)


def _coloured(rng: np.random.Generator, clutter: int) -> Hypothesis:
    name, place, colour = (pick(rng, each) for each in (EMOJI, places(clutter), BACKGROUNDS))
    text = f"{with_article(colour)} picture with {with_article(name)} {at_place(place)}"

    def stage(rng: np.random.Generator, label: str) -> Scene:
        scene, number = draw(rng, clutter, lambda scene: numbers(scene, place=place))
        background = colour
        if label == "contradiction" and rng.integers(2):
            background = pick(rng, [other for other in BACKGROUNDS if other != colour])
            label = "entailment"
        scene = replace(scene, background=background)
        return _with_one(scene, number, name, label, rng)

    return Hypothesis(text, stage)


def _related(rng: np.random.Generator, clutter: int) -> Hypothesis:
    (name, other), wanted = two_names(rng), pick(rng, RELATIONS)

    def pairs(scene: Scene) -> list[tuple[int, int]]:
        """None where no third group is there to hide."""
        return related(scene, wanted) if len(scene.groups) > 2 else []

    def stage(rng: np.random.Generator, label: str) -> Scene:
        scene, pair = draw(rng, clutter, pairs)
        first, second = reversed(pair) if label == "contradiction" else pair
        hidden = pick(rng, pair) if label == "neutral" else others(scene, rng, *pair)[0]
        return cover(recast(scene, rng, {first: name, second: other}), hidden)

    return Hypothesis(f"the {name} is {wanted} the {other}", stage)


def _counted(rng: np.random.Generator, clutter: int) -> Hypothesis:
    name, place = pick(rng, EMOJI), pick(rng, places(clutter))
    count = pick(rng, COUNTS)
    verb = "is" if count == 1 else "are"

    def stage(rng: np.random.Generator, label: str) -> Scene:
        shown = count
        if label == "contradiction" and rng.integers(2):
            shown = pick(rng, [other for other in COUNTS if other != count])
            label = "entailment"
        fits = partial(numbers, place=place, count=shown)
        scene, number = draw(rng, clutter, fits)
        return _with_one(scene, number, name, label, rng)

    return Hypothesis(f"there {verb} exactly {in_words(count, name)} {at_place(place)}", stage)


FORMS = (_placed, _coloured, _related, _counted)
IN_CLUTTER = FORMS[:3]
"""Where no place has more than one emoji."""


class EmojiEntailment(EmojiExamples):
    """Hypotheses about pictures in three classes, each class and each form as often."""

    name = "emoji_entailment"
    answers = LABELS
    turns = len(LABELS)
    stream = 12

    def _ask(self, number: int, turn: int, rng: np.random.Generator) -> Asked:
        forms = IN_CLUTTER if self.options.clutter else FORMS
        hypothesis = forms[number % len(forms)](rng, self.options.clutter)
        label = LABELS[turn]
        return Asked(hypothesis.text, {label: 1.0}, lambda rng: (hypothesis.stage(rng, label),))
