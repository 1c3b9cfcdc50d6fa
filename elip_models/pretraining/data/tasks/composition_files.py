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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Protocol

from PIL import Image

from elip_models.images import MAX_PIXELS, SampleError, decode_image
from elip_models.pretraining.data.checks import check_index, expand_user
from elip_models.pretraining.data.data_spec import FileSpec
from elip_models.pretraining.data.json_files import read_entries, read_fields, read_json
from elip_models.pretraining.data.sample import Sample
from elip_models.pretraining.data.tasks.file_examples import existing_image
from elip_models.validation import Bounds, TextError, check_text, shortened

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

_EXPECTED = (
    'lines with "caption_0" (Winoground), a list with "true_caption" or "caption_options" (ARO), '
    'or an object of {"filename", "caption", "negative_caption"} (SugarCrepe)'
)
_Pixels = Annotated[float, Bounds(-(2**24), 2**24)]
Box = tuple[float, float, float, float]
View = tuple[Path, Box | None]
"""An image file, and the left, top, width and height in pixels of the part that is shown."""


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


class CompositionSource(Protocol):
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

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """Read and decode one image. Raises SampleError if it cannot be read."""

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the captions without decoding the image."""


class StoredCase(NamedTuple):
    """An example whose images have not been read."""

    id: str
    category: str
    views: tuple[View, ...]
    captions: tuple[str, ...]


class CompositionFiles:
    """A `CompositionSource` over stored examples. Each view of an image is read once.

    A missing or damaged image raises SampleError for that image only.

    Raises:
        ValueError: Two examples have the same id.
    """

    def __init__(
        self,
        benchmark: str,
        cases: Sequence[StoredCase],
        categories: tuple[str, ...] = (),
        *,
        averages: bool = False,
    ) -> None:
        self.benchmark, self.categories, self.averages = benchmark, categories, averages
        ids = Counter(case.id for case in cases)
        if twice := [name for name, count in ids.items() if count > 1]:
            raise ValueError(f"id: expected another one for each example, got {twice[0]!r} again")
        captions: dict[View, dict[str, None]] = {}
        for case in cases:
            for view in case.views:
                captions.setdefault(view, {}).update(dict.fromkeys(case.captions))
        self._views = [*captions]
        self._captions = [tuple(texts) for texts in captions.values()]
        clusters = _clusters([[str(path) for path, _ in case.views] for case in cases])
        self.examples = [
            CompositionExample(
                case.id, case.category, tuple(map(_view_id, case.views)), case.captions, cluster
            )
            for case, cluster in zip(cases, clusters, strict=True)
        ]

    def __len__(self) -> int:
        return len(self._views)

    def __getitem__(self, index: int) -> Sample:
        check_index(index, len(self))
        path, box = self._views[index]
        name = _view_id(self._views[index])
        image = decode_image(existing_image(path), name)
        return Sample(image if box is None else _crop(image, box, name), self.captions(index), name)

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the captions without decoding the image."""
        check_index(index, len(self))
        return self._captions[index]


def _view_id(view: View) -> str:
    path, box = view
    return str(path) if box is None else f"{path}[{', '.join(f'{side:g}' for side in box)}]"


def _crop(image: Image.Image, box: Box, name: str) -> Image.Image:
    """Return the part of an image in a box; parts of the box outside the image are black."""
    left, top, width, height = box
    outside = left >= image.width or top >= image.height or left + width <= 0 or top + height <= 0
    if outside or width < 1 or height < 1 or width * height > MAX_PIXELS:
        raise SampleError(
            name,
            f"expected a box in the image of {image.width} x {image.height} pixels, at least one "
            f"pixel wide and high",
        )
    return image.crop((left, top, left + width, top + height))


def _clusters(groups: Sequence[Sequence[str]]) -> list[int]:
    """Return a number for each group; groups that share an item, or are linked, share it."""
    parents: dict[str, str] = {}

    def root(item: str) -> str:
        while parents.setdefault(item, item) != item:
            parents[item] = item = parents[parents[item]]
        return item

    for first, *others in groups:
        for other in others:
            parents[root(other)] = root(first)
    numbers: dict[str, int] = {}
    return [numbers.setdefault(root(first), len(numbers)) for first, *_ in groups]


def read_composition(spec: FileSpec, files: Sequence[Path]) -> CompositionFiles:
    """Read the examples of files of one benchmark.

    Raises:
        ValueError: A file has none of the formats, or the files have different ones.
    """
    cases, benchmarks = [], {}
    for file in files:
        root = file.parent if spec.images is None else expand_user(spec.images)
        entries = _entries(file)
        benchmark = benchmarks[file] = _benchmark(file, entries[0][1])
        for key, entry in entries:
            where = f"{file}[{key}]"
            case = _PARSERS[benchmark](where, entry, root, f"{file.stem}/{key}")
            try:
                check_text("text", case.id, case.category, *case.captions)
                check_text("image", *(str(path) for path, _ in case.views))
            except TextError as error:
                raise ValueError(f"{ascii(where)[1:-1]}: {error}") from error
            cases.append(case)
    benchmark, *others = dict.fromkeys(benchmarks.values())
    if others:
        named = ", ".join(f"{name} in {file.name}" for file, name in benchmarks.items())
        raise ValueError(f"spec: expected files of one benchmark, got {named}")
    categories = _scored_categories(benchmark, cases)
    averages = benchmark.startswith("vg_") or (benchmark == "sugarcrepe" and len(categories) > 1)
    return CompositionFiles(benchmark, cases, categories, averages=averages)


def _entries(file: Path) -> list[tuple[Any, Any]]:
    """Return the entries of a file with their keys: of SugarCrepe, or positions from 0."""
    lines = file.suffix.lower() == ".jsonl"
    content = read_entries(file, _EXPECTED) if lines else read_json(file, _EXPECTED)
    if not content or not isinstance(content, list | dict):
        raise ValueError(f"{file}: expected {_EXPECTED}, got {shortened(content)}")
    return [*(content.items() if isinstance(content, dict) else enumerate(content))]


def _benchmark(file: Path, entry: Any) -> str:
    """Return the benchmark that an entry belongs to, by its keys."""
    keys = entry.keys() if isinstance(entry, dict) else ()
    found = next((name for name, key in _KEYS.items() if key in keys), None)
    if found is None:
        raise ValueError(f"{file}: expected {_EXPECTED}, got {shortened(entry)}")
    return found


def _scored_categories(benchmark: str, cases: Sequence[StoredCase]) -> tuple[str, ...]:
    counts = Counter(case.category for case in cases if case.category)
    least = MIN_ATTRIBUTES if benchmark == "vg_attribution" else 1
    left_out = SYMMETRIC_RELATIONS if benchmark == "vg_relation" else ()
    return tuple(name for name in sorted(counts) if counts[name] >= least and name not in left_out)


def _winoground(where: str, entry: Any, root: Path, case_id: str) -> StoredCase:
    names = ("image_0", "image_1", "caption_0", "caption_1")
    *texts, number = read_fields(where, entry, **dict.fromkeys(names, str), id=int | str)
    left, right, *captions = texts
    (tag,) = read_fields(where, {"collapsed_tag": ""} | entry, collapsed_tag=str)
    views = ((root / left, None), (root / right, None))
    return StoredCase(str(number), tag, views, _clean(where, captions))


def _relation(where: str, entry: Any, root: Path, case_id: str) -> StoredCase:
    (name,) = read_fields(where, entry, relation_name=str)
    return _visual_genome(where, entry, root, case_id)._replace(category=name)


def _attribution(where: str, entry: Any, root: Path, case_id: str) -> StoredCase:
    (names,) = read_fields(where, entry, attributes=list)
    if len(names) != 2 or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{where}: attributes: expected two texts, got {shortened(names)}")
    return _visual_genome(where, entry, root, case_id)._replace(category="_".join(names))


def _visual_genome(where: str, entry: Any, root: Path, case_id: str) -> StoredCase:
    texts = dict.fromkeys(("image_path", "true_caption", "false_caption"), str)
    sides = dict.fromkeys(("bbox_x", "bbox_y", "bbox_w", "bbox_h"), _Pixels)
    image, right, wrong, *box = read_fields(where, entry, **texts, **sides)
    views = ((root / image, tuple(map(float, box))),)
    return StoredCase(case_id, "", views, _clean(where, [right, wrong]))


def _order(where: str, entry: Any, root: Path, case_id: str) -> StoredCase:
    """Return a caption with its permutations, except those that equal it: they are not wrong."""
    image, options = read_fields(where, entry, image=str, caption_options=list)
    if len(options) < 2 or not all(isinstance(text, str) for text in options):
        got = shortened(options)
        raise ValueError(f"{where}: caption_options: expected at least two texts, got {got}")
    captions = tuple(dict.fromkeys(_clean(where, options)))
    return StoredCase(case_id, "", ((root / image, None),), captions)


def _sugarcrepe(where: str, entry: Any, root: Path, case_id: str) -> StoredCase:
    names = ("filename", "caption", "negative_caption")
    image, *captions = read_fields(where, entry, **dict.fromkeys(names, str))
    category = case_id.partition("/")[0]
    return StoredCase(case_id, category, ((root / image, None),), _clean(where, captions))


def _clean(where: str, captions: Sequence[str]) -> tuple[str, ...]:
    """Return the captions with white space collapsed; none may be empty."""
    found = tuple(" ".join(text.split()) for text in captions)
    if not all(found):
        raise ValueError(f"{where}: caption: expected a text, got an empty one")
    return found


_KEYS = {
    "winoground": "caption_0",
    "vg_relation": "relation_name",
    "vg_attribution": "attributes",
    "order": "caption_options",
    "sugarcrepe": "negative_caption",
}
"""Benchmark: the key that only its entries have."""

_PARSERS: dict[str, Callable[[str, Any, Path, str], StoredCase]] = {
    "winoground": _winoground,
    "vg_relation": _relation,
    "vg_attribution": _attribution,
    "order": _order,
    "sugarcrepe": _sugarcrepe,
}
