"""EmojiPairs, statements about two images, as NLVR2 has them, in the world of EmojiScenes.

    there is a dog in both images
    exactly one of the images has a dog
    there are more dogs in the left image than in the right one
    both images have a blue background
    the two images show three dogs in all
    the left image has a dog and the right one a fox

Each statement comes twice, with two images of which it is true and with two of which it is false:
its words say nothing about which.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from elip_models.data.captions import in_words, plural, with_article
from elip_models.data.tasks.staging import MOST, draw, numbers, pick, recast, two_names, with_count
from elip_models.data.tasks.worlds import Asked, EmojiExamples
from elip_models.data.world import BACKGROUNDS, EMOJI, Scene, sample_scene

ANSWERS = ("false", "true")
Two = tuple[Scene, Scene]


class Statement(NamedTuple):
    """stage: whether it is to be true -> the scenes of the left and the right image."""

    text: str
    stage: Callable[[np.random.Generator, bool], Two]


def _counts(rng: np.random.Generator, clutter: int, name: str, left: int, right: int) -> Two:
    return with_count(rng, clutter, name, left), with_count(rng, clutter, name, right)


def _some(rng: np.random.Generator) -> int:
    return int(rng.integers(1, MOST + 1))


def _shown_in(rng: np.random.Generator, clutter: int, name: str, images: int) -> Two:
    """An emoji in none, one or both of the images."""
    left, right = (_some(rng) * (number < images) for number in rng.permutation(2).tolist())
    return _counts(rng, clutter, name, left, right)


def _both(rng: np.random.Generator, clutter: int) -> Statement:
    name = pick(rng, EMOJI)

    def stage(rng: np.random.Generator, true: bool) -> Two:
        return _shown_in(rng, clutter, name, 2 if true else 1)

    return Statement(f"there is {with_article(name)} in both images", stage)


def _exactly_one(rng: np.random.Generator, clutter: int) -> Statement:
    name = pick(rng, EMOJI)

    def stage(rng: np.random.Generator, true: bool) -> Two:
        return _shown_in(rng, clutter, name, 1 if true else pick(rng, (0, 2)))

    return Statement(f"exactly one of the images has {with_article(name)}", stage)


def _more(rng: np.random.Generator, clutter: int) -> Statement:
    name = pick(rng, EMOJI)

    def stage(rng: np.random.Generator, true: bool) -> Two:
        fewer, more = sorted(rng.choice(MOST + 1, size=2, replace=False).tolist())
        if not true and rng.integers(2):
            fewer = more
        return _counts(rng, clutter, name, *((more, fewer) if true else (fewer, more)))

    many = plural(name)
    return Statement(f"there are more {many} in the left image than in the right one", stage)


def _background(rng: np.random.Generator, clutter: int) -> Statement:
    colour = pick(rng, BACKGROUNDS)

    def stage(rng: np.random.Generator, true: bool) -> Two:
        other = pick(rng, [name for name in BACKGROUNDS if name != colour])
        colours = rng.permutation([colour, colour if true else other]).tolist()
        left, right = (replace(sample_scene(rng, clutter), background=each) for each in colours)
        return left, right

    return Statement(f"both images have {with_article(colour)} background", stage)


def _in_all(rng: np.random.Generator, clutter: int) -> Statement:
    name, totals = pick(rng, EMOJI), range(1, 2 * MOST)
    total = pick(rng, totals)

    def stage(rng: np.random.Generator, true: bool) -> Two:
        shown = total if true else pick(rng, [other for other in totals if other != total])
        left = int(rng.integers(max(0, shown - MOST), min(shown, MOST) + 1))
        return _counts(rng, clutter, name, left, shown - left)

    return Statement(f"the two images show {in_words(total, name)} in all", stage)


def _each(rng: np.random.Generator, clutter: int) -> Statement:
    name, other = two_names(rng)

    def stage(rng: np.random.Generator, true: bool) -> Two:
        scenes = []
        for shown, absent in ((name, other), (other, name)):
            scene, number = draw(rng, clutter, numbers)
            scenes.append(recast(scene, rng, {number: shown}, absent=(absent,)))
        left, right = scenes if true else reversed(scenes)
        return left, right

    one, two = with_article(name), with_article(other)
    return Statement(f"the left image has {one} and the right one {two}", stage)


FORMS = (_both, _exactly_one, _more, _background, _in_all, _each)


class EmojiPairs(EmojiExamples):
    """Statements about two images, as often true as false, each of the forms as often."""

    name = "emoji_pairs"
    answers = ANSWERS
    turns = 2
    stream = 13

    def _ask(self, number: int, turn: int, rng: np.random.Generator) -> Asked:
        statement = FORMS[number % len(FORMS)](rng, self.options.clutter)
        true = turn == 0
        answers = {ANSWERS[true]: 1.0}
        return Asked(statement.text, answers, lambda rng: statement.stage(rng, true))
