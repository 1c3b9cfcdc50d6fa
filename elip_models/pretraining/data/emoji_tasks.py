"""The built-in data of the tasks: questions, hypotheses, statements, .. on emoji scenes.

An example is drawn from its text and its answer: the answer is drawn uniformly, and then a scene
for which it is correct. `EmojiExamples` repeats each text several times in a row, with another
answer and other images each time. The text alone therefore does not predict its answer.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import product
from typing import Any, ClassVar

from elip_models.pretraining.data.composition_files import CompositionExample
from elip_models.pretraining.data.samples import Example, Sample, Target, check_index
from elip_models.pretraining.data.scene_captions import (
    at_place,
    in_words,
    plural,
    relation,
    with_article,
)
from elip_models.pretraining.data.scene_sampling import (
    COLOURS,
    COUNTS,
    NAMES,
    SIDES,
    Box,
    Group,
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
        answers = {answer: 1.0} if self.answers else {}
        return Example((), text, answers, self.sample_id(index)), scenes


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


def _expression(sampler: ExampleSampler, place: str | None) -> Drawn:
    (name,) = sampler.names(1)
    drawn = sampler.text.choices([*COUNTS], [*COUNTS.values()])[0]
    count = 1 if sampler.clutter else drawn
    names = [name] if place is None else [name, name]
    noun = name if count == 1 else in_words(count, name)
    text = f"the {noun}" if place is None else f"the {noun} {at_place(place)}"
    return text, "", (sampler.scene(names=names, counts=[count], place=place),)


class EmojiGrounding(EmojiExamples):
    """Expressions such as "the dog" and "the two dogs on the left", in equal numbers.

    With a place, another group of the scene shows the same emoji. Boxes are the squares around the
    emoji of a group; the proposals of an image are the boxes of all its groups.
    """

    name = "emoji_grounding"
    answers = ()
    forms = (
        lambda sampler: _expression(sampler, None),
        lambda sampler: _expression(sampler, sampler.text.choice(place_names(sampler.clutter))),
    )

    def target(self, index: int) -> Target:
        """Return the boxes of the group that the expression names, and of all groups."""
        (scene,), size = self.scenes(index), self.image_size
        boxes = [_group_box(group, size) for group in scene.groups]
        return Target(boxes[0], tuple(sorted(boxes)), "", (size, size))


def _group_box(group: Group, image_size: int) -> Box:
    """Return the box around the squares of all copies, in pixels."""
    left = min(copy.x - copy.size / 2 for copy in group.copies) * image_size
    top = min(copy.y - copy.size / 2 for copy in group.copies) * image_size
    right = max(copy.x + copy.size / 2 for copy in group.copies) * image_size
    bottom = max(copy.y + copy.size / 2 for copy in group.copies) * image_size
    return Box(left, top, right - left, bottom - top)


def _relation_caption(scene: Scene) -> str:
    one, two, *_ = scene.groups
    return f"the {one.name} is {relation(one, two)} the {two.name}"


def _place_caption(scene: Scene) -> str:
    one, two, *_ = scene.groups
    here, there = at_place(one.place.name), at_place(two.place.name)
    return f"{with_article(one.name)} {here} and {with_article(two.name)} {there}"


def _count_caption(scene: Scene) -> str:
    one, two, *_ = scene.groups
    counts = Counter(group.name for group in scene.groups for _ in group.copies)
    return f"{in_words(counts[one.name], one.name)} and {in_words(counts[two.name], two.name)}"


_CAPTIONS = {"relation": _relation_caption, "place": _place_caption, "count": _count_caption}
"""Category: the caption of the first two emoji of a scene."""


class EmojiComposition(EmojiData):
    """A `CompositionSource` of `size` examples in the form of Winoground, drawn on the fly.

        the dog is to the left of the fox           the fox is to the left of the dog
        a dog at the top and a fox in the centre    a fox at the top and a dog in the centre
        one dog and three foxes                     one fox and three dogs

    In the second image, two emoji of the first one are swapped. Neither the words of a caption nor
    the emoji of an image thus predict which of them belong together. Categories are balanced. The
    arguments are those of `EmojiData`.
    """

    name = benchmark = "emoji_composition"
    categories = tuple(_CAPTIONS)
    averages = False

    def __len__(self) -> int:
        """Return the number of images, two for each example."""
        return 2 * self.size

    def __getitem__(self, index: int) -> Sample:
        (number, side), size = divmod(index, 2), self.image_size
        example, scenes = self._draw(number)
        return Sample(render(scenes[side], size), example.captions, example.images[side])

    @cached_property
    def examples(self) -> tuple[CompositionExample, ...]:
        """The examples, without their images."""
        return tuple(self._draw(number)[0] for number in range(self.size))

    def captions(self, index: int) -> tuple[str, str]:
        """Return both captions of the example of an image, without drawing the image."""
        return self._draw(index // 2)[0].captions

    def scenes(self, number: int) -> tuple[Scene, Scene]:
        """Return the two scenes of an example as data, without drawing them."""
        return self._draw(number)[1]

    def _draw(self, number: int) -> tuple[CompositionExample, tuple[Scene, Scene]]:
        check_index(number, self.size)
        rng, name = self.random(number), self.sample_id(number)
        category = self.categories[number % len(self.categories)]
        names, counts = rng.sample(NAMES, 2), [1, 1]
        if category == "count" and self.clutter:  # each copy is a group of its own
            names.append(names[1])
        elif category == "count":
            counts = rng.sample([*COUNTS], 2)
        scene = sample_scene(rng, self.clutter, names=names, counts=counts)
        if self.textures:  # the same for both
            scene = add_texture(rng, scene)
        swapped = {names[0]: names[1], names[1]: names[0]}
        groups = (
            replace(group, name=swapped.get(group.name, group.name)) for group in scene.groups
        )
        scenes = (scene, replace(scene, groups=tuple(groups)))
        captions = tuple(map(_CAPTIONS[category], scenes))
        images = (f"{name}-0", f"{name}-1")
        return CompositionExample(name, category, images, captions, number), scenes
