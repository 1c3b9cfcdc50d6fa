"""Winoground, ARO and SugarCrepe, from the files that their authors publish.

    winoground      {"id", "image_0", "image_1", "caption_0", "caption_1",
                     "collapsed_tag" (optional)}                          one object per line
    vg_relation     [{"image_path", "bbox_x", "bbox_y", "bbox_w", "bbox_h", "true_caption",
                      "false_caption", "relation_name"}, ..]
    vg_attribution  the same with "attributes", two texts, instead of "relation_name"
    order           [{"image", "caption_options": [the caption, a permutation, ..]}, ..]
    sugarcrepe      {"0": {"filename", "caption", "negative_caption"}, ..}     a file per category

`order` is COCO-Order and Flickr30k-Order: a dump of `test_cases` of ARO's two classes, which
permute the captions by the word classes of spaCy.
Source: Winoground (Thrush et al., 2022); ARO (Yuksekgonul et al., 2023); SugarCrepe (Hsieh et al.,
2023).
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from PIL import Image

from elip_models.images import MAX_PIXELS, SampleError
from elip_models.pretraining.data.data_spec import FileSpec
from elip_models.pretraining.data.file_rows import Box, FileRow, StoredRows, read_rows, stored_row
from elip_models.pretraining.data.json_files import read_json
from elip_models.pretraining.data.samples import Sample, Source
from elip_models.validation import shortened

MIN_ATTRIBUTES = 25
"""Number of examples from which on a pair of attributes is scored, as in ARO's code."""

_SYMMETRIC = (
    "adjusting, around, attached to, beside, between, bigger than, biting, boarding, brushing, "
    "by, chewing, cleaning, climbing, close to, coming from, coming out of, contain, crossing, "
    "dragging, draped over, drinking, drinking from, driving, driving down, driving on, eating "
    "from, eating in, enclosing, exiting, facing, filled with, floating in, floating on, "
    "flying, flying above, flying in, flying over, flying through, full of, going down, going "
    "into, going through, grazing in, growing in, growing on, guiding, hanging from, hanging "
    "in, hanging off, hanging over, higher than, holding onto, hugging, in between, jumping "
    "off, jumping on, jumping over, kept in, larger than, leading, leaning over, leaving, "
    "licking, longer than, looking in, looking into, looking out, looking over, looking "
    "through, lying next to, lying on top of, making, mixed with, mounted on, moving, near, "
    "next to, of, on the back of, on the edge of, on the front of, on the other side of, on the "
    "side of, opening, painted on, parked at, parked beside, parked by, parked in, parked in "
    "front of, parked near, parked next to, perched on, petting, piled on, playing, playing in, "
    "playing on, playing with, pouring, reaching for, reading, reflected on, riding on, running "
    "in, running on, running through, seen through, sitting behind, sitting beside, sitting by, "
    "sitting in front of, sitting near, sitting next to, sitting under, skiing down, skiing on, "
    "sleeping in, sleeping on, smiling at, sniffing, splashing, sprinkled on, stacked on, "
    "standing against, standing around, standing behind, standing beside, standing in front of, "
    "standing near, standing next to, staring at, stuck in, surrounding, swimming in, swinging, "
    "talking to, topped with, touching, traveling down, traveling on, tying, typing on, "
    "underneath, wading in, waiting for, walking across, walking by, walking down, walking next "
    "to, walking through, with, working in, working on, worn on, wrapped around, wrapped in"
)
SYMMETRIC_RELATIONS = frozenset(_SYMMETRIC.split(", "))
"""Relations that ARO's notebook leaves out of the mean over relations, as symmetric."""


class CompositionExample(NamedTuple):
    """Captions to be matched with one image, or with two.

    Attributes:
        id: Id of the example.
        category: Name of its category, or "".
        images: Ids of its images in the source. Of two images, caption i describes image i.
            Otherwise the first caption is correct, and the others are wrong.
        captions: The captions.
        cluster: Number that examples with a common image share.
    """

    id: str
    category: str
    images: tuple[str, ...]
    captions: tuple[str, ...]
    cluster: int


class CompositionSource(Source, Protocol):
    """A `Source` of images, each with all captions that it is compared with, and its examples.

    Attributes:
        benchmark: Name of the benchmark.
        examples: Examples that refer to images by their ids.
        categories: Categories that are scored separately.
        averages: Whether the benchmark reports the mean over `categories`.
    """

    benchmark: str
    examples: Sequence[CompositionExample]
    categories: tuple[str, ...]
    averages: bool


_BENCHMARKS = {
    "caption_0": "winoground",
    "relation_name": "vg_relation",
    "attributes": "vg_attribution",
    "caption_options": "order",
    "negative_caption": "sugarcrepe",
}
"""Key that only the entries of a benchmark have."""


class CompositionFiles(StoredRows):
    """A `CompositionSource` over files of one benchmark. Each part of an image is read once.

    A missing or damaged image raises SampleError for that image only.

    Raises:
        ValueError: A file has none of the formats, the files have different ones, or two examples
            have the same id.
    """

    def __init__(self, spec: FileSpec, files: Sequence[Path]) -> None:
        read = {file: _read(file) for file in files}
        self.benchmark, *others = dict.fromkeys(benchmark for benchmark, _ in read.values())
        if others:
            named = ", ".join(f"{name} in {file.name}" for file, (name, _) in read.items())
            raise ValueError(f"spec: expected files of one benchmark, got {named}")
        views: dict[str, dict[str, Any]] = {}
        examples: list[CompositionExample] = []
        for file, (_, rows) in read.items():
            for place, row in rows.items():
                stored = stored_row(row, file, place, spec.images)
                names = tuple(_view_name(image, row.box) for image in stored["images"])
                for name, image in zip(names, stored["images"], strict=True):
                    view = stored | {"images": [image], "id": name, "box": row.box, "captions": {}}
                    views.setdefault(name, view)["captions"].update(dict.fromkeys(row.texts))
                texts = tuple(row.texts)
                examples.append(CompositionExample(row.id, row.category, names, texts, cluster=0))
        super().__init__([view | {"captions": [*view["captions"]]} for view in views.values()])
        numbers = {name: self.image_number(index) for index, name in enumerate(views)}
        clusters = _clusters([[numbers[name] for name in example.images] for example in examples])
        self.examples = [
            example._replace(cluster=cluster)
            for example, cluster in zip(examples, clusters, strict=True)
        ]
        self.categories = _scored_categories(self.benchmark, self.examples)
        self.averages = self.benchmark in ("vg_relation", "vg_attribution") or (
            self.benchmark == "sugarcrepe" and len(self.categories) > 1
        )
        ids = Counter(example.id for example in self.examples)
        if twice := [name for name, count in ids.items() if count > 1]:
            raise ValueError(f"id: expected another one for each example, got {twice[0]!r} again")

    def __getitem__(self, index: int) -> Sample:
        row = self._row(index)
        (image,) = self._images(row)
        if row["box"] is not None:
            image = _crop(image, row["box"], row["place"])
        return Sample(image, tuple(row["captions"]), row["id"])

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the captions without decoding the image."""
        return tuple(self._row(index)["captions"])


def _read(file: Path) -> tuple[str, dict[int | str, FileRow]]:
    """Return the benchmark that a file belongs to by the keys of its first entry, and its rows."""
    expected = f"entries with one of the keys {', '.join(_BENCHMARKS)}"
    data = read_json(file, expected)
    entries = data.values() if isinstance(data, dict) else data
    first = next(iter(entries), None) if isinstance(data, list | dict) else None
    keys = {*(data if isinstance(data, dict) else ()), *(first if isinstance(first, dict) else ())}
    key = next((key for key in _BENCHMARKS if key in keys), None)
    if key is None:
        raise ValueError(f"{file}: expected {expected}, got {shortened(data)}")
    rows = read_rows(data, file, key, images=2 if key == "caption_0" else 1)
    for place, row in rows.items():
        row.texts = [" ".join(text.split()) for text in row.texts]
        if len(row.texts) < 2 or not all(row.texts):
            raise ValueError(
                f"{file}[{place}]: expected at least two captions, got {shortened(row.texts)}"
            )
        if key == "caption_options":  # a permutation that equals the caption is not wrong
            row.texts = [*dict.fromkeys(row.texts)]
        if key in ("relation_name", "attributes") and row.box is None:
            raise ValueError(f"{file}[{place}]: expected bbox_x, bbox_y, bbox_w and bbox_h")
        if key == "negative_caption":
            row.category = file.stem
        if key != "caption_0" or not row.id:  # the id of ARO's entries is that of the image
            row.id = f"{file.stem}/{place}"
    return _BENCHMARKS[key], rows


def _scored_categories(benchmark: str, examples: Sequence[CompositionExample]) -> tuple[str, ...]:
    counts = Counter(example.category for example in examples if example.category)
    least = MIN_ATTRIBUTES if benchmark == "vg_attribution" else 1
    left_out = SYMMETRIC_RELATIONS if benchmark == "vg_relation" else ()
    return tuple(name for name in sorted(counts) if counts[name] >= least and name not in left_out)


def _view_name(image: str, box: Box | None) -> str:
    return image if box is None else f"{image}[{', '.join(f'{side:g}' for side in box)}]"


def _crop(image: Image.Image, box: Box, name: str) -> Image.Image:
    """Return the part of an image in a box; parts of the box outside the image are black."""
    left, top, width, height = box
    outside = left >= image.width or top >= image.height or left + width <= 0 or top + height <= 0
    if outside or width < 1 or height < 1 or width * height > MAX_PIXELS:
        raise SampleError(
            name,
            f"expected a box in the image of {image.width} x {image.height} pixels, at least one "
            f"pixel wide and high, got {box}",
        )
    return image.crop((left, top, left + width, top + height))


def _clusters(groups: Sequence[Sequence[int]]) -> list[int]:
    """Return a number for each group; groups that share an item, or are linked, share it."""
    parents: dict[int, int] = {}

    def root(item: int) -> int:
        while parents.setdefault(item, item) != item:
            parents[item] = item = parents[parents[item]]
        return item

    for first, *others in groups:
        for other in others:
            parents[root(other)] = root(first)
    numbers: dict[int, int] = {}
    return [numbers.setdefault(root(first), len(numbers)) for first, *_ in groups]
