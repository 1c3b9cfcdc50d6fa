"""Referring expressions: a text, and the box in its image that the text refers to.

    emoji_grounding:seed=1,size=200         built-in scenes
    refcoco+.json,images=coco,split=testA   [{"image", "text", "box", "split", "proposals"}, ..]

A box is [left, top, width, height] in pixels of the stored image, as in COCO. "split" and
"proposals", the boxes of a detector, are optional; either all entries have proposals or none has.
`file_examples` reads the files.
"""

from typing import NamedTuple, Protocol, runtime_checkable

from elip_models.pretraining.data.scene_sampling import Box


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
