"""EmojiQuestions: visual question answering on emoji scenes.

    is there a dog?                              yes, no
    how many dogs are there?                     1, 2, 3
    where is the dog?                            the nine places
    what colour is the background?               the eight colours
    is the dog to the left of the fox?           yes, no
    what is immediately to the left of the fox?  any other emoji

A question is drawn first, then one of its answers, uniformly, then a scene in which that answer is
correct. The text of a question therefore does not predict its answer.
"""

from dataclasses import replace

from elip_models.pretraining.data.scene_captions import plural, with_article
from elip_models.pretraining.data.scene_sampling import COLOURS, COUNTS, NAMES, Scene, place_names
from elip_models.pretraining.data.tasks.emoji_examples import EmojiExamples, ExampleSampler

Question = tuple[str, str, tuple[Scene]]
_YES_NO, _NUMBERS = ("yes", "no"), tuple(map(str, COUNTS))


def _exists(sampler: ExampleSampler) -> Question:
    (name,), answer = sampler.names(1), sampler.answer(_YES_NO)
    scene = sampler.scene(names=[name] if answer == "yes" else [], absent=[name])
    return f"is there {with_article(name)}?", answer, (scene,)


def _how_many(sampler: ExampleSampler) -> Question:
    (name,), answer = sampler.names(1), sampler.answer(_NUMBERS)
    scene = sampler.with_count(name, int(answer))
    return f"how many {plural(name)} are there?", answer, (scene,)


def _where(sampler: ExampleSampler) -> Question:
    (name,), answer = sampler.names(1), sampler.answer(place_names(sampler.clutter))
    scene = sampler.scene(names=[name], counts=[1], place=answer)
    return f"where is the {name}?", answer, (scene,)


def _background(sampler: ExampleSampler) -> Question:
    answer = sampler.answer(COLOURS)
    scene = replace(sampler.scene(), background=answer)
    return "what colour is the background?", answer, (scene,)


def _is_beside(sampler: ExampleSampler) -> Question:
    names, side, answer = sampler.names(2), sampler.side(), sampler.answer(_YES_NO)
    scene = sampler.related(names if answer == "yes" else names[::-1], side)
    return f"is the {names[0]} {side} the {names[1]}?", answer, (scene,)


def _what_is_beside(sampler: ExampleSampler) -> Question:
    (name,), side = sampler.names(1), sampler.side()
    answer = sampler.answer([other for other in NAMES if other != name])
    while True:
        scene = sampler.related([answer, name], side)
        here, there = (group.place for group in scene.groups[:2])
        if abs(here.row - there.row) + abs(here.column - there.column) == 1:
            return f"what is immediately {side} the {name}?", answer, (scene,)


class EmojiQuestions(EmojiExamples):
    """Questions with short answers; each appears twice, with two scenes and two answers."""

    name = "emoji_questions"
    forms = (_exists, _how_many, _where, _background, _is_beside, _what_is_beside)
    answers = tuple(
        dict.fromkeys((*_YES_NO, *_NUMBERS, *place_names(0), *place_names(1), *COLOURS, *NAMES))
    )
