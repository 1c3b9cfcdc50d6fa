"""EmojiPairs: statements about two images, as in NLVR2, on emoji scenes.

    there is a dog in both images
    there are more dogs in the left image than in the right one
    the two images show three dogs in all
    both images have a blue background

Each statement appears twice, once true and once false, so the text alone does not predict which.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import product

from elip_models.pretraining.data.scene_captions import in_words, plural, with_article
from elip_models.pretraining.data.scene_sampling import COLOURS, COUNTS, Scene
from elip_models.pretraining.data.tasks.emoji_examples import EmojiExamples, ExampleSampler

ANSWERS = ("false", "true")
Statement = tuple[str, str, tuple[Scene, Scene]]
_NUMBERS = range(max(COUNTS) + 1)


def _on_counts(
    sampler: ExampleSampler, text: str, name: str, is_true: Callable[[int, int], bool]
) -> Statement:
    """Return a statement on the numbers of an emoji in the left and in the right image."""
    answer = sampler.answer(ANSWERS)
    pairs = product(_NUMBERS, repeat=2)
    chosen = sampler.rng.choice([pair for pair in pairs if is_true(*pair) == (answer == "true")])
    left, right = (sampler.with_count(name, count) for count in chosen)
    return text, answer, (left, right)


def _both(sampler: ExampleSampler) -> Statement:
    (name,) = sampler.names(1)
    text = f"there is {with_article(name)} in both images"
    return _on_counts(sampler, text, name, lambda left, right: min(left, right) > 0)


def _more(sampler: ExampleSampler) -> Statement:
    (name,) = sampler.names(1)
    text = f"there are more {plural(name)} in the left image than in the right one"
    return _on_counts(sampler, text, name, lambda left, right: left > right)


def _in_all(sampler: ExampleSampler) -> Statement:
    (name,), total = sampler.names(1), sampler.text.randrange(1, 2 * max(COUNTS))
    text = f"the two images show {in_words(total, name)} in all"
    return _on_counts(sampler, text, name, lambda left, right: left + right == total)


def _background(sampler: ExampleSampler) -> Statement:
    colour, answer = sampler.text.choice(COLOURS), sampler.answer(ANSWERS)
    other = colour if answer == "true" else sampler.another(COLOURS, colour)
    left, right = (
        replace(sampler.scene(), background=shown)
        for shown in sampler.rng.sample([colour, other], 2)
    )
    return f"both images have {with_article(colour)} background", answer, (left, right)


class EmojiPairs(EmojiExamples):
    """Statements about two images; true and false ones, and all forms, are balanced."""

    name = "emoji_pairs"
    answers = ANSWERS
    forms = (_both, _more, _in_all, _background)
