"""`EmojiComposition`, the built-in compositional benchmark, in the form of Winoground."""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from elip_models.pretraining.data.checks import check_index
from elip_models.pretraining.data.sample import Sample
from elip_models.pretraining.data.scene_captions import at_place, in_words, relation, with_article
from elip_models.pretraining.data.scene_sampling import Scene, add_texture, sample_scene
from elip_models.pretraining.data.scenes import render
from elip_models.pretraining.data.tasks.composition_files import (
    CompositionExample,
)
from elip_models.pretraining.data.tasks.conditional_scenes import (
    assign_emoji,
    find_groups,
    other_groups,
    sample_scene_where,
    sample_two_emoji,
)
from elip_models.pretraining.data.tasks.emoji_examples import EmojiTaskData


class _Form(NamedTuple):
    """A scene, the groups of its two emoji, and a function from the two names to a caption."""

    scene: Scene
    first: list[int]
    second: list[int]
    write: Callable[[str, str], str]


def _single_groups(scene: Scene) -> list[tuple[int, int]]:
    single = find_groups(scene, count=1)
    return [(i, j) for i in single for j in single if i != j]


def _related(rng: np.random.Generator, clutter: int) -> _Form:
    scene, (i, j) = sample_scene_where(rng, clutter, _single_groups)
    side = relation(scene.groups[i], scene.groups[j])
    return _Form(scene, [i], [j], lambda one, two: f"the {one} is {side} the {two}")


def _placed(rng: np.random.Generator, clutter: int) -> _Form:
    scene, (i, j) = sample_scene_where(rng, clutter, _single_groups)
    here, there = (at_place(scene.groups[number].place) for number in (i, j))

    def write(one: str, two: str) -> str:
        return f"{with_article(one)} {here} and {with_article(two)} {there}"

    return _Form(scene, [i], [j], write)


def _counted(rng: np.random.Generator, clutter: int) -> _Form:
    """Draw two different counts; each copy in a scene with clutter forms a group of its own."""

    def unequal(scene: Scene) -> list[tuple[int, int]]:
        groups = [*enumerate(scene.groups)]
        return [(i, j) for i, one in groups for j, two in groups if one.count < two.count]

    if clutter:
        scene = sample_scene(rng, clutter)
        i, *others = other_groups(scene, rng)
        few, many, second = 1, 2, others[:2]
    else:
        scene, (i, j) = sample_scene_where(rng, clutter, unequal)
        few, many, second = scene.groups[i].count, scene.groups[j].count, [j]

    def write(one: str, two: str) -> str:
        return f"{in_words(few, one)} and {in_words(many, two)}"

    return _Form(scene, [i], second, write)


FORMS = {"relation": _related, "place": _placed, "count": _counted}
"""Category: the function that draws its scenes."""


class _Drawn(NamedTuple):
    """Two scenes and their captions."""

    scenes: tuple[Scene, Scene]
    captions: tuple[str, str]


class EmojiComposition(EmojiTaskData):
    """A `CompositionSource` of `size` examples in the form of Winoground, drawn on the fly.

        the dog is to the left of the fox           the fox is to the left of the dog
        a dog at the top and a fox in the centre    a fox at the top and a dog in the centre
        one dog and three foxes                     one fox and three dogs

    In the second image, two emoji of the first one are swapped. Neither the words of a caption nor
    the emoji of an image thus predict which of them belong together. Categories are balanced.
    Example i depends on (seed, i) and the options only. The other arguments and errors are those of
    `EmojiScenes`.
    """

    benchmark = "emoji_composition"
    categories = tuple(FORMS)
    averages = False
    stream = 14

    def __len__(self) -> int:
        """Return the number of images, two for each example."""
        return 2 * len(self.options)

    def __getitem__(self, index: int) -> Sample:
        check_index(index, len(self))
        number, side = divmod(index, 2)
        scenes, captions = self._draw(number)
        image = render(scenes[side], self.options.image_size)
        return Sample(image, captions, self._image_id(number, side))

    @cached_property
    def examples(self) -> tuple[CompositionExample, ...]:
        """The examples, without their images."""
        return tuple(map(self._example, range(len(self.options))))

    def captions(self, index: int) -> tuple[str, str]:
        """Return both captions of the example of an image, without drawing the image."""
        check_index(index, len(self))
        return self._draw(index // 2).captions

    def scenes(self, number: int) -> tuple[Scene, Scene]:
        """Return the two scenes of an example as data, without drawing them."""
        check_index(number, len(self.options))
        return self._draw(number).scenes

    def _example(self, number: int) -> CompositionExample:
        images = tuple(self._image_id(number, side) for side in (0, 1))
        category = self.categories[number % len(self.categories)]
        captions = self._draw(number).captions
        return CompositionExample(images[0][:-2], category, images, captions, number)

    def _image_id(self, number: int, side: int) -> str:
        return f"{self.benchmark}-{self.options.seed}-{number}-{side}"

    def _draw(self, number: int) -> _Drawn:
        rng = self._rng(number)
        draw = FORMS[self.categories[number % len(self.categories)]]
        scene, first, second, write = draw(rng, self.options.clutter)
        one, two = sample_two_emoji(rng)
        scene = assign_emoji(scene, rng, dict.fromkeys(first, one) | dict.fromkeys(second, two))
        swapped = {one: two, two: one}
        groups = (replace(each, name=swapped.get(each.name, each.name)) for each in scene.groups)
        scenes = (scene, replace(scene, groups=tuple(groups)))
        if self.options.textures:  # the same for both
            scenes = tuple(add_texture(each, self._rng(number, 1)) for each in scenes)
        return _Drawn(scenes, (write(one, two), write(two, one)))
