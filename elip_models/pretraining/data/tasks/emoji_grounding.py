"""EmojiGrounding: referring expressions on emoji scenes, with the boxes of all emoji."""

from elip_models.pretraining.data.scene_captions import at_place, in_words
from elip_models.pretraining.data.scene_sampling import COUNTS, Box, Group, Scene
from elip_models.pretraining.data.tasks.emoji_examples import EmojiExamples, ExampleSampler
from elip_models.pretraining.data.tasks.grounding import Target


def _expression(sampler: ExampleSampler, place: str | None) -> tuple[str, str, tuple[Scene]]:
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
        lambda sampler: _expression(sampler, sampler.place()),
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
