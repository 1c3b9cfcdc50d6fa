"""The built-in data of the tasks: questions, hypotheses, statements, .. on emoji scenes.

An example is drawn from its text and its answer: the answer is drawn uniformly, and then a scene
for which it is correct. `EmojiExamples` repeats each text several times in a row, with another
answer and other images each time. The text alone therefore does not predict its answer.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, ClassVar

from elip_models.pretraining.data.samples import Example, check_index
from elip_models.pretraining.data.scene_captions import (
    at_place,
    in_words,
    plural,
    with_article,
)
from elip_models.pretraining.data.scene_sampling import (
    COLOURS,
    COUNTS,
    NAMES,
    SIDES,
    Scene,
    add_texture,
    hide_group,
    place_names,
    sample_scene,
)
from elip_models.pretraining.data.scenes import EmojiData, render

Drawn = tuple[str, str, tuple[Scene, ...]]
"""A text, its answer, and the scenes of its images."""


class ExampleSampler:
    """The random choices of one example: those of its text and answer, and those of its scenes.

    All repetitions of a text make the same choices for the text.
    """

    def __init__(self, data: "EmojiExamples", index: int) -> None:
        number, self.turn = divmod(index, data.turns)
        self.turns, self.clutter = data.turns, data.clutter
        self.text, self.rng = data.random(number), data.random(number, self.turn)

    def names(self, count: int) -> list[str]:
        """Return different emoji for the text."""
        return self.text.sample(NAMES, count)

    def answer(self, answers: Sequence[str]) -> str:
        """Return one of the answers, drawn uniformly; each repetition gets another one."""
        return self.text.sample(answers, self.turns)[self.turn]

    def another(self, values: Sequence[Any], value: Any) -> Any:
        """Return one of the values other than `value`, for a scene."""
        return self.rng.choice([other for other in values if other != value])

    def scene(self, **options: Any) -> Scene:
        """Draw a scene with the options of `sample_scene`."""
        return sample_scene(self.rng, self.clutter, **options)

    def related(self, names: Sequence[str], side: str, **options: Any) -> Scene:
        """Draw scenes until the first of two single emoji is on a side of the second."""
        while True:
            scene = self.scene(names=names, counts=(1, 1), **options)
            if scene.groups[0].is_beside(scene.groups[1], side):
                return scene

    def with_count(self, name: str, count: int) -> Scene:
        """Draw a scene with `count` copies of an emoji, 0 to 3.

        They form one group, or one group each in a scene with clutter.
        """
        if count == 0:
            return self.scene(absent=[name])
        return self.scene(names=[name] * (count if self.clutter else 1), counts=[count])


class EmojiExamples(EmojiData):
    """An `ExampleSource`; the arguments are those of `EmojiData`.

    The forms of texts take turns. All answers of a form are equally probable.
    """

    answers: ClassVar[tuple[str, ...]]
    turns: ClassVar[int] = 2
    """Number of consecutive examples with the same text."""
    forms: ClassVar[Sequence[Callable[[ExampleSampler], Drawn]]]
    """Functions that draw a text, its answer, and scenes for which the answer is correct."""

    def __getitem__(self, index: int) -> Example:
        example, scenes = self._draw(index)
        return example._replace(images=tuple(render(scene, self.image_size) for scene in scenes))

    def text_alone(self, index: int) -> Example:
        """Return the example without images; none is drawn."""
        return self._draw(index)[0]

    def scenes(self, index: int) -> tuple[Scene, ...]:
        """Return the scenes of the images as data, without drawing them."""
        return self._draw(index)[1]

    def _draw(self, index: int) -> tuple[Example, tuple[Scene, ...]]:
        check_index(index, self.size)
        sampler = ExampleSampler(self, index)
        text, answer, scenes = self.forms[index // self.turns % len(self.forms)](sampler)
        if self.textures:
            scenes = tuple(add_texture(sampler.rng, scene) for scene in scenes)
        return Example((), text, {answer: 1.0}, self.sample_id(index)), scenes


_YES_NO, _NUMBERS = ("yes", "no"), tuple(map(str, COUNTS))


def _exists(sampler: ExampleSampler) -> Drawn:
    (name,), answer = sampler.names(1), sampler.answer(_YES_NO)
    scene = sampler.scene(names=[name] if answer == "yes" else [], absent=[name])
    return f"is there {with_article(name)}?", answer, (scene,)


def _how_many(sampler: ExampleSampler) -> Drawn:
    (name,), answer = sampler.names(1), sampler.answer(_NUMBERS)
    scene = sampler.with_count(name, int(answer))
    return f"how many {plural(name)} are there?", answer, (scene,)


def _where(sampler: ExampleSampler) -> Drawn:
    (name,), answer = sampler.names(1), sampler.answer(place_names(sampler.clutter))
    scene = sampler.scene(names=[name], counts=[1], place=answer)
    return f"where is the {name}?", answer, (scene,)


def _what_colour(sampler: ExampleSampler) -> Drawn:
    answer = sampler.answer(COLOURS)
    scene = replace(sampler.scene(), background=answer)
    return "what colour is the background?", answer, (scene,)


def _is_beside(sampler: ExampleSampler) -> Drawn:
    names, side, answer = sampler.names(2), sampler.text.choice(SIDES), sampler.answer(_YES_NO)
    scene = sampler.related(names if answer == "yes" else names[::-1], side)
    return f"is the {names[0]} {side} the {names[1]}?", answer, (scene,)


def _what_is_beside(sampler: ExampleSampler) -> Drawn:
    (name,), side = sampler.names(1), sampler.text.choice(SIDES)
    answer = sampler.answer([other for other in NAMES if other != name])
    while True:
        scene = sampler.related([answer, name], side)
        here, there = (group.place for group in scene.groups[:2])
        if abs(here.row - there.row) + abs(here.column - there.column) == 1:
            return f"what is immediately {side} the {name}?", answer, (scene,)


class EmojiQuestions(EmojiExamples):
    """Questions with short answers; each appears twice, with two scenes and two answers.

    is there a dog?                              yes, no
    how many dogs are there?                     1, 2, 3
    where is the dog?                            the nine places
    what colour is the background?               the eight colours
    is the dog to the left of the fox?           yes, no
    what is immediately to the left of the fox?  any other emoji
    """

    name = "emoji_questions"
    forms = (_exists, _how_many, _where, _what_colour, _is_beside, _what_is_beside)
    answers = tuple(
        dict.fromkeys((*_YES_NO, *_NUMBERS, *place_names(0), *place_names(1), *COLOURS, *NAMES))
    )


_LABELS = ("entailment", "neutral", "contradiction")


def _placed(sampler: ExampleSampler) -> Drawn:
    (name,), place = sampler.names(1), sampler.text.choice(place_names(sampler.clutter))
    label = sampler.answer(_LABELS)
    count = 1 if sampler.clutter else sampler.text.choice(list(COUNTS))
    names, shown = [name], count
    if label == "neutral":
        names = []
    elif label == "contradiction":  # another number, or another emoji there
        if not sampler.clutter and sampler.rng.random() < 0.5:
            shown = sampler.another(list(COUNTS), count)
        else:
            names = [sampler.another(NAMES, name), *[name] * sampler.rng.randint(0, 1)]
    scene = sampler.scene(names=names, absent=[name], counts=[shown], place=place)
    scene = hide_group(scene, 0 if label == "neutral" else len(scene.groups) - 1)
    verb = "is" if count == 1 else "are"
    text = f"there {verb} exactly {in_words(count, name)} {at_place(place)}"
    return text, label, (scene,)


def _related(sampler: ExampleSampler) -> Drawn:
    names, side, label = sampler.names(2), sampler.text.choice(SIDES), sampler.answer(_LABELS)
    text = f"the {names[0]} is {side} the {names[1]}"
    scene = sampler.related(names[::-1] if label == "contradiction" else names, side, numbers=[3])
    return text, label, (hide_group(scene, sampler.rng.randint(0, 1) if label == "neutral" else 2),)


class EmojiEntailment(EmojiExamples):
    """Hypotheses about images with three labels; labels and forms are balanced.

        there are exactly two dogs on the left
        the dog is to the left of the fox

    A dark rectangle hides one place of every image. A hypothesis is entailed if the image shows it,
    contradicted if the image shows otherwise, and neutral if the deciding place is hidden. Each
    hypothesis appears once with each label, so neither the text nor the rectangle alone predicts
    the label.
    """

    name = "emoji_entailment"
    answers = _LABELS
    forms = (_placed, _related)
    turns = len(_LABELS)


_TRUTH = ("false", "true")


def _on_counts(
    sampler: ExampleSampler, text: str, name: str, is_true: Callable[[int, int], bool]
) -> Drawn:
    """Return a statement on the numbers of an emoji in the left and in the right image."""
    answer = sampler.answer(_TRUTH)
    pairs = product(range(max(COUNTS) + 1), repeat=2)
    chosen = sampler.rng.choice([pair for pair in pairs if is_true(*pair) == (answer == "true")])
    return text, answer, tuple(sampler.with_count(name, count) for count in chosen)


def _both(sampler: ExampleSampler) -> Drawn:
    (name,) = sampler.names(1)
    text = f"there is {with_article(name)} in both images"
    return _on_counts(sampler, text, name, lambda left, right: min(left, right) > 0)


def _more(sampler: ExampleSampler) -> Drawn:
    (name,) = sampler.names(1)
    text = f"there are more {plural(name)} in the left image than in the right one"
    return _on_counts(sampler, text, name, lambda left, right: left > right)


def _in_all(sampler: ExampleSampler) -> Drawn:
    (name,), total = sampler.names(1), sampler.text.randrange(1, 2 * max(COUNTS))
    text = f"the two images show {in_words(total, name)} in all"
    return _on_counts(sampler, text, name, lambda left, right: left + right == total)


def _same_background(sampler: ExampleSampler) -> Drawn:
    colour, answer = sampler.text.choice(COLOURS), sampler.answer(_TRUTH)
    other = colour if answer == "true" else sampler.another(COLOURS, colour)
    shown = sampler.rng.sample([colour, other], 2)
    scenes = tuple(replace(sampler.scene(), background=background) for background in shown)
    return f"both images have {with_article(colour)} background", answer, scenes


class EmojiPairs(EmojiExamples):
    """Statements about two images, as in NLVR2; true and false ones, and all forms, are balanced.

    there is a dog in both images
    there are more dogs in the left image than in the right one
    the two images show three dogs in all
    both images have a blue background
    """

    name = "emoji_pairs"
    answers = _TRUTH
    forms = (_both, _more, _in_all, _same_background)
