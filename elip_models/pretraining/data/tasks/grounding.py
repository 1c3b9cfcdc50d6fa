"""Referring expressions: a text, and the box in its image that the text refers to.

    emoji_grounding:seed=1,size=200         built-in scenes
    refcoco+.json,images=coco,split=testA   [{"image", "text", "box", "split", "proposals"}, ..]

A box is [left, top, width, height] in pixels of the stored image, as in COCO. "split" and
"proposals", the boxes of a detector, are optional; either all entries have proposals or none has.
`file_examples` reads the files.
"""

from dataclasses import replace
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from elip_models.pretraining.data.scene_captions import at_place, in_words
from elip_models.pretraining.data.scene_sampling import COUNTS, EMOJI, Box, Group, Scene
from elip_models.pretraining.data.tasks.conditional_scenes import (
    assign_emoji,
    find_groups,
    other_groups,
    pick,
    place_names,
    sample_scene_where,
)
from elip_models.pretraining.data.tasks.emoji_examples import EmojiExamples, SceneExample


class Target(NamedTuple):
    """What an expression refers to.

    Attributes:
        box: Left, top, width and height, in pixels of the image.
        proposals: Boxes of a detector in the same form; None: no detector was used.
        split: Name of the part of the data, such as "testA", or "".
        size: Width and height of the image in pixels.
    """

    box: Box
    proposals: tuple[Box, ...] | None
    split: str
    size: tuple[int, int]


@runtime_checkable
class Referring(Protocol):
    """Part of an `ExampleSource` of referring expressions."""

    def target(self, index: int) -> Target:
        """Return what the expression refers to. Reads the header of the image, not its pixels."""


class EmojiGrounding(EmojiExamples):
    """Expressions such as "the dog" and "the two dogs on the left", in equal numbers.

    With a place, another group of the scene shows the same emoji. Boxes are the squares around the
    emoji of a group; the proposals of an image are the boxes of all its groups.
    """

    name = "emoji_grounding"
    answers = ()
    turns = 2
    stream = 13

    def target(self, index: int) -> Target:
        """Return the boxes of the group that the expression names, and of all groups."""
        (scene,), size = self.scenes(index), self.options.image_size
        boxes = [_group_box(group, size) for group in scene.groups]
        return Target(boxes[0], tuple(sorted(boxes)), "", (size, size))

    def _make_example(self, number: int, turn: int, rng: np.random.Generator) -> SceneExample:
        clutter, name = self.options.clutter, pick(rng, EMOJI)
        count = 1 if clutter else int(rng.choice(list(COUNTS), p=list(COUNTS.values())))
        place = pick(rng, place_names(clutter)) if number % 2 else None

        def sample(rng: np.random.Generator) -> tuple[Scene, ...]:
            wanted = partial(find_groups, place=place, count=count)
            scene, chosen = sample_scene_where(rng, clutter, wanted)
            names = {chosen: name}
            if place is not None:
                names[other_groups(scene, rng, chosen)[0]] = name
            groups = assign_emoji(scene, rng, names).groups
            others = groups[:chosen] + groups[chosen + 1 :]
            return (replace(scene, groups=(groups[chosen], *others)),)

        noun = name if count == 1 else in_words(count, name)
        text = f"the {noun}" if place is None else f"the {noun} {at_place(place)}"
        return SceneExample(text, {}, sample)


def _group_box(group: Group, image_size: int) -> Box:
    """Return the box around the squares of all copies, in pixels."""
    copies = np.array([(copy.x, copy.y, copy.size) for copy in group.copies]) * image_size
    centres, half = copies[:, :2], copies[:, 2:] / 2
    first, last = (centres - half).min(0), (centres + half).max(0)
    return Box(*first.tolist(), *(last - first).tolist())
