"""EmojiQuestions: visual question answering on emoji scenes.

    is there a dog?                          yes, no
    how many dogs are there?                 1, 2, 3
    where is the dog?                        the nine places
    what colour is the background?           the eight colours
    is the dog to the left of the fox?       yes, no
    what is to the left of the fox?          any other emoji; both if there are two

A question is drawn first, then one of its answers, uniformly, then a scene in which that answer is
correct. The text of a question therefore does not predict its answer.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np

from elip_models.pretraining.data.scene_captions import GRID_PLACES, PLACES, plural, with_article
from elip_models.pretraining.data.scene_sampling import BACKGROUNDS, EMOJI, Scene, sample_scene
from elip_models.pretraining.data.tasks.conditional_scenes import (
    MOST,
    RELATIONS,
    assign_emoji,
    find_groups,
    groups_beside,
    pick,
    place_names,
    related_pairs,
    sample_scene_where,
    sample_two_emoji,
    scene_with_count,
)
from elip_models.pretraining.data.tasks.emoji_examples import EmojiExamples, SceneExample

_YES_NO = ("yes", "no")
_MAX_CLUTTER_FOR_ONE = 4
"""With more clutter, at least two groups are on any side of an emoji."""
_NUMBERS = tuple(str(count) for count in range(1, MOST + 1))


class Question(NamedTuple):
    """A question with its possible answers."""

    text: str
    answers: tuple[str, ...]  # all that can be correct
    sample: Callable[..., Scene]  # draws a scene in which exactly the given answers are correct
    counts: tuple[int, ...] = (1,)  # possible numbers of simultaneously correct answers


def _exists(rng: np.random.Generator, clutter: int) -> Question:
    name = pick(rng, EMOJI)

    def sample(rng: np.random.Generator, *right: str) -> Scene:
        scene, number = sample_scene_where(rng, clutter, find_groups)
        if right == ("yes",):
            return assign_emoji(scene, rng, {number: name})
        return assign_emoji(scene, rng, {}, absent=(name,))

    return Question(f"is there {with_article(name)}?", _YES_NO, sample)


def _how_many(rng: np.random.Generator, clutter: int) -> Question:
    name = pick(rng, EMOJI)

    def sample(rng: np.random.Generator, *right: str) -> Scene:
        return scene_with_count(rng, clutter, name, int(*right))

    return Question(f"how many {plural(name)} are there?", _NUMBERS, sample)


def _where(rng: np.random.Generator, clutter: int) -> Question:
    name = pick(rng, EMOJI)

    def sample(rng: np.random.Generator, *right: str) -> Scene:
        scene, number = sample_scene_where(
            rng, clutter, partial(find_groups, place=right[0], count=1)
        )
        return assign_emoji(scene, rng, {number: name})

    return Question(f"where is the {name}?", place_names(clutter), sample)


def _background(rng: np.random.Generator, clutter: int) -> Question:
    def sample(rng: np.random.Generator, *right: str) -> Scene:
        return replace(sample_scene(rng, clutter), background=right[0])

    return Question("what colour is the background?", tuple(BACKGROUNDS), sample)


def _is_beside(rng: np.random.Generator, clutter: int) -> Question:
    (name, other), wanted = sample_two_emoji(rng), pick(rng, RELATIONS)

    def sample(rng: np.random.Generator, *right: str) -> Scene:
        scene, (first, second) = sample_scene_where(
            rng, clutter, partial(related_pairs, wanted=wanted)
        )
        names = (name, other) if right == ("yes",) else (other, name)
        return assign_emoji(scene, rng, {first: names[0], second: names[1]})

    return Question(f"is the {name} {wanted} the {other}?", _YES_NO, sample)


def _what_is_beside(rng: np.random.Generator, clutter: int) -> Question:
    name, wanted = pick(rng, EMOJI), pick(rng, RELATIONS)

    def sample(rng: np.random.Generator, *right: str) -> Scene:
        def choices(scene: Scene) -> list[tuple[int, list[int]]]:
            """Return single emoji with as many groups on that side as there are answers."""
            found = (
                (number, groups_beside(scene, number, wanted))
                for number in find_groups(scene, count=1)
            )
            return [(number, groups) for number, groups in found if len(groups) == len(right)]

        scene, (number, groups) = sample_scene_where(rng, clutter, choices)
        return assign_emoji(scene, rng, {number: name, **dict(zip(groups, right, strict=True))})

    answers = tuple(other for other in EMOJI if other != name)
    counts = (2,) if clutter > _MAX_CLUTTER_FOR_ONE else (1, 2)
    return Question(f"what is {wanted} the {name}?", answers, sample, counts)


FORMS = (_exists, _how_many, _where, _background, _is_beside, _what_is_beside)


class EmojiQuestions(EmojiExamples):
    """Questions with short answers; all forms of questions are balanced.

    Each question appears twice, with two scenes and two answers. If two answers are correct, each
    has a share of 0.5.
    """

    name = "emoji_questions"
    answers = (*_YES_NO, *_NUMBERS, *PLACES, *GRID_PLACES, *BACKGROUNDS, *EMOJI)
    turns = 2
    stream = 11

    def _make_example(self, number: int, turn: int, rng: np.random.Generator) -> SceneExample:
        question = FORMS[number % len(FORMS)](rng, self.options.clutter)
        order = [question.answers[i] for i in rng.permutation(len(question.answers))]
        right = order[turn :: self.turns][: pick(rng, question.counts)]
        answers = dict.fromkeys(right, 1 / len(right))
        return SceneExample(question.text, answers, lambda rng: (question.sample(rng, *right),))
