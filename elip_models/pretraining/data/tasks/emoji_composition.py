"""EmojiComposition: pairs of scenes and captions that differ in which emoji belong together."""

from collections import Counter
from dataclasses import replace
from functools import cached_property

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


def _related(scene: Scene) -> str:
    one, two, *_ = scene.groups
    return f"the {one.name} is {relation(one, two)} the {two.name}"


def _placed(scene: Scene) -> str:
    one, two, *_ = scene.groups
    here, there = at_place(one.place.name), at_place(two.place.name)
    return f"{with_article(one.name)} {here} and {with_article(two.name)} {there}"


def _counted(scene: Scene) -> str:
    one, two, *_ = scene.groups
    counts = Counter(group.name for group in scene.groups for _ in group.copies)
    return f"{in_words(counts[one.name], one.name)} and {in_words(counts[two.name], two.name)}"


_CAPTIONS = {"relation": _related, "place": _placed, "count": _counted}
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
