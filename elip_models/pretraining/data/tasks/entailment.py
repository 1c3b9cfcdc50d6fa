"""EmojiEntailment: visual entailment on emoji scenes.

    there is a dog on the left
    a blue picture with a dog on the left
    the dog is to the left of the fox
    there are exactly two dogs on the left         not with clutter

A dark rectangle hides one place of every image. A hypothesis is entailed if the image shows it,
contradicted if the image shows otherwise, and neutral if the deciding place is hidden. Each
hypothesis appears once with each label, so neither the text nor the rectangle alone predicts the
label.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np

from elip_models.pretraining.data.scene_captions import at_place, in_words, with_article
from elip_models.pretraining.data.scene_sampling import BACKGROUNDS, COUNTS, EMOJI, Scene
from elip_models.pretraining.data.tasks.conditional_scenes import (
    RELATIONS,
    assign_emoji,
    find_groups,
    hide_group,
    other_groups,
    pick,
    place_names,
    related_pairs,
    sample_scene_where,
    sample_two_emoji,
)
from elip_models.pretraining.data.tasks.emoji_examples import EmojiExamples, SceneExample

LABELS = ("entailment", "neutral", "contradiction")


class Hypothesis(NamedTuple):
    """A hypothesis; `sample` draws a scene, with one place hidden, for a given label."""

    text: str
    sample: Callable[[np.random.Generator, str], Scene]


def _with_one(scene: Scene, number: int, name: str, label: str, rng: np.random.Generator) -> Scene:
    """Return the scene for a label, where group `number` would show the emoji `name`."""
    rest = other_groups(scene, rng, number)
    if label == "entailment":
        return hide_group(assign_emoji(scene, rng, {number: name}), rest[0])
    if label == "neutral":
        return hide_group(assign_emoji(scene, rng, {}, absent=(name,)), number)
    elsewhere = {rest[1]: name} if len(rest) > 1 and rng.integers(2) else {}
    return hide_group(assign_emoji(scene, rng, elsewhere, absent=(name,)), rest[0])


def _placed(rng: np.random.Generator, clutter: int) -> Hypothesis:
    name, place = pick(rng, EMOJI), pick(rng, place_names(clutter))

    def sample(rng: np.random.Generator, label: str) -> Scene:
        scene, number = sample_scene_where(rng, clutter, partial(find_groups, place=place))
        return _with_one(scene, number, name, label, rng)

    return Hypothesis(f"there is {with_article(name)} {at_place(place)}", sample)


def _coloured(rng: np.random.Generator, clutter: int) -> Hypothesis:
    name, place, colour = (pick(rng, each) for each in (EMOJI, place_names(clutter), BACKGROUNDS))
    text = f"{with_article(colour)} picture with {with_article(name)} {at_place(place)}"

    def sample(rng: np.random.Generator, label: str) -> Scene:
        scene, number = sample_scene_where(rng, clutter, partial(find_groups, place=place))
        background = colour
        if label == "contradiction" and rng.integers(2):
            background = pick(rng, [other for other in BACKGROUNDS if other != colour])
            label = "entailment"
        scene = replace(scene, background=background)
        return _with_one(scene, number, name, label, rng)

    return Hypothesis(text, sample)


def _related(rng: np.random.Generator, clutter: int) -> Hypothesis:
    (name, other), wanted = sample_two_emoji(rng), pick(rng, RELATIONS)

    def pairs(scene: Scene) -> list[tuple[int, int]]:
        """Return the related pairs of a scene in which a third group can be hidden."""
        return related_pairs(scene, wanted) if len(scene.groups) > 2 else []

    def sample(rng: np.random.Generator, label: str) -> Scene:
        scene, pair = sample_scene_where(rng, clutter, pairs)
        first, second = reversed(pair) if label == "contradiction" else pair
        hidden = pick(rng, pair) if label == "neutral" else other_groups(scene, rng, *pair)[0]
        return hide_group(assign_emoji(scene, rng, {first: name, second: other}), hidden)

    return Hypothesis(f"the {name} is {wanted} the {other}", sample)


def _counted(rng: np.random.Generator, clutter: int) -> Hypothesis:
    name, place = pick(rng, EMOJI), pick(rng, place_names(clutter))
    count = pick(rng, COUNTS)
    verb = "is" if count == 1 else "are"

    def sample(rng: np.random.Generator, label: str) -> Scene:
        shown = count
        if label == "contradiction" and rng.integers(2):
            shown = pick(rng, [other for other in COUNTS if other != count])
            label = "entailment"
        choices = partial(find_groups, place=place, count=shown)
        scene, number = sample_scene_where(rng, clutter, choices)
        return _with_one(scene, number, name, label, rng)

    return Hypothesis(f"there {verb} exactly {in_words(count, name)} {at_place(place)}", sample)


FORMS = (_placed, _coloured, _related, _counted)
CLUTTER_FORMS = FORMS[:3]
"""Forms for scenes with clutter, in which every place has one emoji."""


class EmojiEntailment(EmojiExamples):
    """Hypotheses about images with three labels; labels and forms are balanced."""

    name = "emoji_entailment"
    answers = LABELS
    turns = len(LABELS)
    stream = 12

    def _make_example(self, number: int, turn: int, rng: np.random.Generator) -> SceneExample:
        forms = CLUTTER_FORMS if self.options.clutter else FORMS
        hypothesis = forms[number % len(forms)](rng, self.options.clutter)
        label = LABELS[turn]
        return SceneExample(
            hypothesis.text, {label: 1.0}, lambda rng: (hypothesis.sample(rng, label),)
        )
