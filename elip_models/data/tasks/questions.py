"""EmojiQuestions, visual question answering in the world of EmojiScenes.

    is there a dog?                          yes, no
    how many dogs are there?                 1, 2, 3
    where is the dog?                        the nine places
    what colour is the background?           the eight colours
    is the dog to the left of the fox?       yes, no
    what is to the left of the fox?          any other emoji; two where two are there

A question is drawn first, then one of its answers, each as likely, then a scene in which that
answer is right: what a question asks says nothing about its answer.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np

from elip_models.data.captions import (
    GRID_PLACES,
    PLACES,
    plural,
    with_article,
)
from elip_models.data.tasks.staging import (
    MOST,
    RELATIONS,
    beside,
    draw,
    numbers,
    pick,
    places,
    recast,
    related,
    two_names,
    with_count,
)
from elip_models.data.tasks.worlds import Asked, EmojiExamples
from elip_models.data.world import BACKGROUNDS, EMOJI, Scene, sample_scene

_YES_NO = ("yes", "no")
_ONE_ALONE = 4
"""With more clutter no side of an emoji has one group alone."""
_NUMBERS = tuple(str(count) for count in range(1, MOST + 1))


class Question(NamedTuple):
    """answers: what can be right, and `counts` how many of them at once. stage: those -> a scene
    where they are, and no other.
    """

    text: str
    answers: tuple[str, ...]
    stage: Callable[..., Scene]
    counts: tuple[int, ...] = (1,)


def _exists(rng: np.random.Generator, clutter: int) -> Question:
    name = pick(rng, EMOJI)

    def stage(rng: np.random.Generator, *right: str) -> Scene:
        scene, number = draw(rng, clutter, numbers)
        roles, absent = ({number: name}, ()) if right == ("yes",) else ({}, (name,))
        return recast(scene, rng, roles, absent)

    return Question(f"is there {with_article(name)}?", _YES_NO, stage)


def _how_many(rng: np.random.Generator, clutter: int) -> Question:
    name = pick(rng, EMOJI)

    def stage(rng: np.random.Generator, *right: str) -> Scene:
        return with_count(rng, clutter, name, int(*right))

    return Question(f"how many {plural(name)} are there?", _NUMBERS, stage)


def _where(rng: np.random.Generator, clutter: int) -> Question:
    name = pick(rng, EMOJI)

    def stage(rng: np.random.Generator, *right: str) -> Scene:
        scene, number = draw(rng, clutter, partial(numbers, place=right[0], count=1))
        return recast(scene, rng, {number: name})

    return Question(f"where is the {name}?", places(clutter), stage)


def _background(rng: np.random.Generator, clutter: int) -> Question:
    def stage(rng: np.random.Generator, *right: str) -> Scene:
        return replace(sample_scene(rng, clutter), background=right[0])

    return Question("what colour is the background?", tuple(BACKGROUNDS), stage)


def _is_beside(rng: np.random.Generator, clutter: int) -> Question:
    (name, other), wanted = two_names(rng), pick(rng, RELATIONS)

    def stage(rng: np.random.Generator, *right: str) -> Scene:
        scene, (first, second) = draw(rng, clutter, partial(related, wanted=wanted))
        names = (name, other) if right == ("yes",) else (other, name)
        return recast(scene, rng, {first: names[0], second: names[1]})

    return Question(f"is the {name} {wanted} the {other}?", _YES_NO, stage)


def _what_is_beside(rng: np.random.Generator, clutter: int) -> Question:
    name, wanted = pick(rng, EMOJI), pick(rng, RELATIONS)

    def stage(rng: np.random.Generator, *right: str) -> Scene:
        def so_many(scene: Scene) -> list[tuple[int, list[int]]]:
            """Single emoji with as many groups on the side that is asked for."""
            found = ((number, beside(scene, number, wanted)) for number in numbers(scene, count=1))
            return [(number, groups) for number, groups in found if len(groups) == len(right)]

        scene, (number, groups) = draw(rng, clutter, so_many)
        return recast(scene, rng, {number: name, **dict(zip(groups, right, strict=True))})

    answers = tuple(other for other in EMOJI if other != name)
    counts = (2,) if clutter > _ONE_ALONE else (1, 2)
    return Question(f"what is {wanted} the {name}?", answers, stage, counts)


FORMS = (_exists, _how_many, _where, _background, _is_beside, _what_is_beside)


class EmojiQuestions(EmojiExamples):
    """Questions with short answers, each of the forms as often.

    Each question comes twice, with two scenes and two answers. Where two answers are right, each
    has half a share.
    """

    name = "emoji_questions"
    answers = (*_YES_NO, *_NUMBERS, *PLACES, *GRID_PLACES, *BACKGROUNDS, *EMOJI)
    turns = 2
    stream = 11

    def _ask(self, number: int, turn: int, rng: np.random.Generator) -> Asked:
        question = FORMS[number % len(FORMS)](rng, self.options.clutter)
        order = [question.answers[i] for i in rng.permutation(len(question.answers))]
        right = order[turn :: self.turns][: pick(rng, question.counts)]
        answers = dict.fromkeys(right, 1 / len(right))
        return Asked(question.text, answers, lambda rng: (question.stage(rng, *right),))
