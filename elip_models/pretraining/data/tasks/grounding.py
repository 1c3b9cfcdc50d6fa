"""Referring expressions: a text, and the box in its image that the text refers to.

    emoji_grounding:seed=1,size=200         built-in scenes
    refcoco+.json,images=coco,split=testA   [{"image", "text", "box", "split", "proposals"}, ..]

A box is [left, top, width, height] in pixels of the stored image, as in COCO. "split" and
"proposals", the boxes of a detector, are optional; either all entries have proposals or none has.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Protocol, runtime_checkable

from elip_models.images import SampleError, open_image_file
from elip_models.pretraining.data.checks import expand_user
from elip_models.pretraining.data.data_spec import FileSpec
from elip_models.pretraining.data.examples import Example
from elip_models.pretraining.data.json_files import read_entries, read_fields
from elip_models.pretraining.data.scene_sampling import Box
from elip_models.pretraining.data.tasks.file_examples import FileExamples, StoredExample
from elip_models.validation import Bounds, mismatch_error, shortened

_EXPECTED = 'a list of {"image": path, "text": expression, "box": [left, top, width, height]}'
_MOST = 2**24  # exact in float32
_Place = Annotated[float, Bounds(-_MOST, _MOST)]
_Length = Annotated[float, Bounds(0, _MOST, includes_low=False)]


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


class GroundingFiles(FileExamples):
    """Expressions in JSON lists. An image without a file or an empty text raises SampleError."""

    def __init__(self, rows: Sequence[StoredExample], targets: Sequence[dict[str, Any]]) -> None:
        super().__init__(rows, ())
        self._targets = targets

    def __getitem__(self, index: int) -> Example:
        if not self.text_alone(index).text:
            raise SampleError(self._index[index]["entry"], "the expression is empty")
        return super().__getitem__(index)

    def target(self, index: int) -> Target:
        """Return the boxes of an expression, and the size of its image."""
        row = self._index[index]
        with open_image_file(Path(row["images"][0]), row["entry"]) as image:
            return Target(**self._targets[index], size=image.size)


def grounding_examples(spec: FileSpec, files: Sequence[Path]) -> GroundingFiles:
    """Read referring expressions, all or those of some splits ("testA", "val+testA").

    Raises:
        ValueError: An entry is malformed, only some have proposals, or no entry is of the split.
    """
    rows: list[StoredExample] = []
    targets: list[dict[str, Any]] = []
    wanted = None if spec.split is None else spec.split.split("+")
    found: set[str] = set()
    for row, target in _entries(spec, files):
        found.add(target["split"])
        if wanted is None or target["split"] in wanted:
            rows.append(row)
            targets.append(target)
    missing = sorted(set(wanted or ()) - found)
    if missing:
        raise ValueError(f"split: expected some of {sorted(found)}, got {missing}")
    if len({target["proposals"] is None for target in targets}) > 1:
        lacking = next(i for i, target in enumerate(targets) if target["proposals"] is None)
        raise ValueError(
            f"{rows[lacking].entry}: proposals: expected boxes in all entries or in none, got none "
            "here; write [] where the detector found nothing"
        )
    return GroundingFiles(rows, targets)


def _entries(
    spec: FileSpec, files: Sequence[Path]
) -> Iterator[tuple[StoredExample, dict[str, Any]]]:
    for file in files:
        root = file.parent if spec.images is None else expand_user(spec.images)
        for number, entry in enumerate(read_entries(file, _EXPECTED)):
            where, name = f"{file}[{number}]", f"{file.name}[{number}]"
            image, text, box = read_fields(where, entry, image=str, text=str, box=list)
            given = {"split": "", "proposals": None} | entry
            split, proposals = read_fields(where, given, split=str, proposals=list | None)
            if proposals is not None:
                proposals = tuple(_box(f"{where}: proposals", each) for each in proposals)
            target = {"box": _box(f"{where}: box", box), "proposals": proposals, "split": split}
            yield StoredExample(name, name, " ".join(text.split()), {}, (root / image,)), target


def _box(where: str, value: Any) -> Box:
    numbers = tuple(value) if isinstance(value, list) else value
    if mismatch_error(numbers, tuple[_Place, _Place, _Length, _Length]) is not None:
        raise ValueError(
            f"{where}: expected [left, top, width, height] in pixels, width and height above 0, "
            f"got {shortened(value)}"
        )
    return Box(*map(float, numbers))
