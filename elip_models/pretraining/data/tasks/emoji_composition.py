"""EmojiComposition: pairs of scenes and captions that differ in which emoji belong together."""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from random import Random

from elip_models.pretraining.data.checks import check_index
from elip_models.pretraining.data.sample import Sample
from elip_models.pretraining.data.scene_captions import at_place, in_words, relation, with_article
from elip_models.pretraining.data.scene_sampling import (
    COUNTS,
    NAMES,
    Scene,
    add_texture,
    sample_scene,
)
from elip_models.pretraining.data.scenes import EmojiData, render
from elip_models.pretraining.data.tasks.composition_files import CompositionExample

_Form = tuple[Scene, Callable[[str, str], str]]
"""A scene of two emoji, and a function from their names to a caption."""


def _related(rng: Random, clutter: int, one: str, two: str) -> _Form:
    scene = sample_scene(rng, clutter, names=[one, two], counts=[1, 1])
    side = relation(*scene.groups[:2])
    return scene, lambda one, two: f"the {one} is {side} the {two}"


def _placed(rng: Random, clutter: int, one: str, two: str) -> _Form:
    scene = sample_scene(rng, clutter, names=[one, two], counts=[1, 1])
    here, there = (at_place(group.place.name) for group in scene.groups[:2])
    return scene, lambda one, two: f"{with_article(one)} {here} and {with_article(two)} {there}"


def _counted(rng: Random, clutter: int, one: str, two: str) -> _Form:
    """Draw two different counts; each copy in a scene with clutter forms a group of its own."""
    few, many = (1, 2) if clutter else sorted(rng.sample([*COUNTS], 2))
    names = [one, two, two] if clutter else [one, two]
    scene = sample_scene(rng, clutter, names=names, counts=[few, many])
    return scene, lambda one, two: f"{in_words(few, one)} and {in_words(many, two)}"


_FORMS = {"relation": _related, "place": _placed, "count": _counted}


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
    categories = tuple(_FORMS)
    averages = False

    def __len__(self) -> int:
        """Return the number of images, two for each example."""
        return 2 * self.size

    def __getitem__(self, index: int) -> Sample:
        captions, scene = self.captions(index), self.scenes(index // 2)[index % 2]
        image_id = self.examples[index // 2].images[index % 2]
        return Sample(render(scene, self.image_size), captions, image_id)

    @cached_property
    def examples(self) -> tuple[CompositionExample, ...]:
        """The examples, without their images."""
        examples = []
        for number in range(self.size):
            name, category = self.sample_id(number), self.categories[number % len(_FORMS)]
            images = (f"{name}-0", f"{name}-1")
            captions = self.captions(2 * number)
            examples.append(CompositionExample(name, category, images, captions, number))
        return tuple(examples)

    def captions(self, index: int) -> tuple[str, str]:
        """Return both captions of the example of an image, without drawing the image."""
        check_index(index, len(self))
        return self._draw(index // 2)[1]

    def scenes(self, number: int) -> tuple[Scene, Scene]:
        """Return the two scenes of an example as data, without drawing them."""
        check_index(number, self.size)
        return self._draw(number)[0]

    def _draw(self, number: int) -> tuple[tuple[Scene, Scene], tuple[str, str]]:
        """Return the two scenes and the two captions of an example."""
        rng = self.random(number)
        one, two = rng.sample(NAMES, 2)
        draw = _FORMS[self.categories[number % len(_FORMS)]]
        scene, write = draw(rng, self.clutter, one, two)
        if self.textures:  # the same for both
            scene = add_texture(rng, scene)
        swapped = {one: two, two: one}
        groups = (
            replace(group, name=swapped.get(group.name, group.name)) for group in scene.groups
        )
        return (scene, replace(scene, groups=tuple(groups))), (write(one, two), write(two, one))
