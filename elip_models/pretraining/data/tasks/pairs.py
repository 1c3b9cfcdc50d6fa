"""EmojiPairs: statements about two images, as in NLVR2, on emoji scenes.

    there is a dog in both images
    exactly one of the images has a dog
    there are more dogs in the left image than in the right one
    both images have a blue background
    the two images show three dogs in all
    the left image has a dog and the right one a fox

Each statement appears twice, once true and once false, so the text alone does not predict which.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from elip_models.pretraining.data.scene_captions import in_words, plural, with_article
from elip_models.pretraining.data.scene_sampling import BACKGROUNDS, EMOJI, Scene, sample_scene
from elip_models.pretraining.data.tasks.conditional_scenes import (
    MOST,
    assign_emoji,
    find_groups,
    pick,
    sample_scene_where,
    sample_two_emoji,
    scene_with_count,
)
from elip_models.pretraining.data.tasks.emoji_examples import EmojiExamples, SceneExample

ANSWERS = ("false", "true")
Pair = tuple[Scene, Scene]


class Statement(NamedTuple):
    """A statement; `sample` draws the left and the right scene for which it is true or false."""

    text: str
    sample: Callable[[np.random.Generator, bool], Pair]


def _scene_pair(rng: np.random.Generator, clutter: int, name: str, left: int, right: int) -> Pair:
    return scene_with_count(rng, clutter, name, left), scene_with_count(rng, clutter, name, right)


def _scenes_showing(rng: np.random.Generator, clutter: int, name: str, images: int) -> Pair:
    """Draw two scenes, of which `images` show the emoji: 0, 1 or 2."""
    order = rng.permutation(2).tolist()
    counts = [int(rng.integers(1, MOST + 1)) for _ in order]
    left, right = (count if i < images else 0 for i, count in zip(order, counts, strict=True))
    return _scene_pair(rng, clutter, name, left, right)


def _both(rng: np.random.Generator, clutter: int) -> Statement:
    name = pick(rng, EMOJI)
    return Statement(
        f"there is {with_article(name)} in both images",
        lambda rng, true: _scenes_showing(rng, clutter, name, 2 if true else 1),
    )


def _exactly_one(rng: np.random.Generator, clutter: int) -> Statement:
    name = pick(rng, EMOJI)
    return Statement(
        f"exactly one of the images has {with_article(name)}",
        lambda rng, true: _scenes_showing(rng, clutter, name, 1 if true else pick(rng, (0, 2))),
    )


def _more(rng: np.random.Generator, clutter: int) -> Statement:
    name = pick(rng, EMOJI)

    def sample(rng: np.random.Generator, true: bool) -> Pair:
        fewer, more = sorted(rng.choice(MOST + 1, size=2, replace=False).tolist())
        if not true and rng.integers(2):
            fewer = more
        left, right = (more, fewer) if true else (fewer, more)
        return _scene_pair(rng, clutter, name, left, right)

    many = plural(name)
    return Statement(f"there are more {many} in the left image than in the right one", sample)


def _background(rng: np.random.Generator, clutter: int) -> Statement:
    colour = pick(rng, BACKGROUNDS)

    def sample(rng: np.random.Generator, true: bool) -> Pair:
        other = pick(rng, [name for name in BACKGROUNDS if name != colour])
        colours = rng.permutation([colour, colour if true else other]).tolist()
        left, right = (replace(sample_scene(rng, clutter), background=each) for each in colours)
        return left, right

    return Statement(f"both images have {with_article(colour)} background", sample)


def _in_all(rng: np.random.Generator, clutter: int) -> Statement:
    name, totals = pick(rng, EMOJI), range(1, 2 * MOST)
    total = pick(rng, totals)

    def sample(rng: np.random.Generator, true: bool) -> Pair:
        shown = total if true else pick(rng, [other for other in totals if other != total])
        left = int(rng.integers(max(0, shown - MOST), min(shown, MOST) + 1))
        return _scene_pair(rng, clutter, name, left, shown - left)

    return Statement(f"the two images show {in_words(total, name)} in all", sample)


def _each(rng: np.random.Generator, clutter: int) -> Statement:
    name, other = sample_two_emoji(rng)

    def sample(rng: np.random.Generator, true: bool) -> Pair:
        scenes = []
        for shown, absent in ((name, other), (other, name)):
            scene, number = sample_scene_where(rng, clutter, find_groups)
            scenes.append(assign_emoji(scene, rng, {number: shown}, absent=(absent,)))
        left, right = scenes if true else reversed(scenes)
        return left, right

    one, two = with_article(name), with_article(other)
    return Statement(f"the left image has {one} and the right one {two}", sample)


FORMS = (_both, _exactly_one, _more, _background, _in_all, _each)


class EmojiPairs(EmojiExamples):
    """Statements about two images; true and false ones, and all forms, are balanced."""

    name = "emoji_pairs"
    answers = ANSWERS
    turns = 2
    stream = 13

    def _make_example(self, number: int, turn: int, rng: np.random.Generator) -> SceneExample:
        statement = FORMS[number % len(FORMS)](rng, self.options.clutter)
        true = turn == 0
        answers = {"true" if true else "false": 1.0}
        return SceneExample(statement.text, answers, lambda rng: statement.sample(rng, true))
