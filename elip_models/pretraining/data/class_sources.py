"""Images with class labels, for zero-shot classification: a `Source` whose caption is the class.

    emoji_classes:seed=0,size=600    built-in images of one emoji each, with balanced classes
    FOLDER                           one folder of images per class, as ImageNet's validation set
    datasets:NAME,split=test         a dataset of the hub, or a folder of parquet files

The last two take `,names=imagenet` or `,names=FILE`, see `class_names`. If open_clip is installed,
its templates are used.
"""

import io
import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from elip_models.images import SampleError, decode_image
from elip_models.pretraining.data.checks import check_index, expand_user
from elip_models.pretraining.data.class_names import check_not_numbers, named_classes
from elip_models.pretraining.data.data_spec import parse_files
from elip_models.pretraining.data.examples import Example
from elip_models.pretraining.data.readers import parse_options
from elip_models.pretraining.data.sample import Sample, Source
from elip_models.pretraining.data.scene_captions import with_article
from elip_models.pretraining.data.scenes import EmojiClasses
from elip_models.validation import require_extra, shortened

if TYPE_CHECKING:
    from datasets import Dataset

Template = Callable[[str], str]
_BUILT_IN = "emoji_classes"
_DATASETS = "datasets"


class ClassSource(Source, Protocol):
    """A `Source` whose samples have one class each.

    Attributes:
        classes: Class names as the captions write them, without duplicates.
        names: Names used in texts, in the same order.
        templates: Functions from a name to a text.
    """

    classes: tuple[str, ...]
    names: tuple[str, ...]
    templates: tuple[Template, ...]

    def sample_id(self, index: int) -> str:
        """Return the id of a sample without decoding the image."""


def _photo_template(name: str) -> str:
    return f"a photo of {with_article(name)}."


class _LabelledPhotos:
    classes: tuple[str, ...]
    _numbers: Sequence[int]  # the class of each image

    def __len__(self) -> int:
        return len(self._numbers)

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the class."""
        check_index(index, len(self))
        return (self.classes[self._numbers[index]],)

    @property
    def templates(self) -> tuple[Template, ...]:
        """Templates of open_clip, or a default; not stored, since functions cannot be pickled."""
        if find_spec("open_clip") is None:
            return (_photo_template,)
        from open_clip import OPENAI_IMAGENET_TEMPLATES

        return tuple(OPENAI_IMAGENET_TEMPLATES)


class ClassFolder(_LabelledPhotos):
    """A `ClassSource` of a folder that has one folder of images for each class.

    Args:
        path: The folder.
        names: "imagenet", a JSON file, or None; see `named_classes`.

    Raises:
        FileNotFoundError: The folder is missing, or the folder of a class has no image.
    """

    def __init__(self, path: str | Path, *, names: str | None = None) -> None:
        with require_extra("ClassFolder"):
            from torchvision.datasets import ImageFolder
        root = expand_user(path)
        if not os.path.isdir(root):  # false too for a path that is too long
            raise FileNotFoundError(
                f"spec: expected {_BUILT_IN}:size=600, {_DATASETS}:NAME,split=test, or a folder "
                f"with a folder of images per class, got {shortened(str(path))}; the working "
                f"folder is {Path.cwd()}"
            )
        try:
            folder = ImageFolder(str(root))
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"spec: expected a folder with a folder of images per class, got "
                f"{shortened(str(path))}: {error}"
            ) from error
        self.classes, self.names = named_classes(folder.classes, names)
        self._paths = [Path(path) for path, _ in folder.samples]
        self._numbers = folder.targets

    def __getitem__(self, index: int) -> Sample:
        captions, sample_id = self.captions(index), self.sample_id(index)
        return Sample(decode_image(self._paths[index], sample_id), captions, sample_id)

    def sample_id(self, index: int) -> str:
        """Return the folder and the name of an image."""
        return f"{self._paths[index].parent.name}/{self._paths[index].name}"


class ClassDataset(_LabelledPhotos):
    """A `ClassSource` of a dataset of the hub, or of a folder of parquet files.

    The library `datasets` reads it. The images are in its only column of images.

    Args:
        path: Name on the hub, or a folder.
        split: Name of the split.
        label: Class column. None: the only column of classes.
        names: As of `ClassFolder`.

    Raises:
        FileNotFoundError: There is no such dataset.
        ValueError: It lacks the split or a column, or images have no class, as in many test sets.
    """

    def __init__(
        self, path: str, *, split: str, label: str | None = None, names: str | None = None
    ) -> None:
        with require_extra("ClassDataset"):
            import datasets
        try:
            table = datasets.load_dataset(str(expand_user(path)), split=split)
        except ConnectionError as error:
            raise FileNotFoundError(
                f"spec: expected a folder of parquet files or a dataset of the hub, got {path!r}, "
                f"and the hub is not reachable: {error}"
            ) from error
        image = _only_column(table, datasets.Image, None)
        self._label = _only_column(table, datasets.ClassLabel, label)
        self._images = table.cast_column(image, datasets.Image(decode=False))[image]
        self._numbers = table[self._label]
        numbers = table.select_columns(self._label)[:][self._label]
        unknown = sum(number is None or number < 0 for number in numbers)
        if unknown:
            raise ValueError(
                f"split: expected one whose images all have a class, got {split!r}: {unknown} "
                f"of {len(numbers)} have none; use another split, such as validation"
            )
        self._name = f"{Path(path).name}-{split}"
        self.classes, self.names = named_classes(table.features[self._label].names, names)

    def __getitem__(self, index: int) -> Sample:
        captions, sample_id = self.captions(index), self.sample_id(index)
        stored = self._images[index]
        if stored is None:
            raise SampleError(sample_id, "no image")
        file = Path(stored["path"]) if stored["bytes"] is None else io.BytesIO(stored["bytes"])
        return Sample(decode_image(file, sample_id), captions, sample_id)

    def sample_id(self, index: int) -> str:
        """Return the name of the dataset, its split, and the number of the row."""
        return f"{self._name}-{index}"


class ClassExamples:
    """An `ExampleSource` of images without text, whose `answers` are the classes."""

    def __init__(self, source: ClassSource) -> None:
        self.source = source
        self.answers = source.classes

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        return self.text_alone(index)._replace(images=(self.source[index].image,))

    def text_alone(self, index: int) -> Example:
        """Return the class without decoding the image."""
        (name,) = self.source.captions(index)
        return Example((), "", {name: 1.0}, self.source.sample_id(index))


def _only_column(table: "Dataset", kind: type, name: str | None) -> str:
    """Return the column of a type: the one called `name`, or the only one."""
    found = [column for column, feature in table.features.items() if isinstance(feature, kind)]
    chosen = [column for column in found if name in (None, column)]
    if len(chosen) != 1:
        wanted = f"a column of {kind.__name__}" + (f" named {name!r}" if name else "")
        raise ValueError(
            f"label: expected {wanted}, got {found} of {table.column_names}; add label=NAME"
        )
    return chosen[0]


def open_classes(spec: str, *, image_size: int) -> ClassSource:
    """Open the images that `spec` names, see the top of this file.

    Args:
        spec: Built-in images, a folder, or a dataset of the hub.
        image_size: Size in pixels of built-in images.

    Raises:
        TypeError, ValueError: The specification is malformed, or the names of the classes are
            numbers.
        FileNotFoundError: There is no such folder or dataset.
    """
    source = open_labelled(spec, image_size=image_size)
    check_not_numbers(source.names, spec)
    return source


def open_labelled(spec: str, *, image_size: int) -> ClassSource:
    """Return `open_classes(spec)` for a task without texts; the names may be numbers."""
    if not isinstance(spec, str):
        got = shortened(spec)
        raise TypeError(f"spec: expected {_BUILT_IN}:seed=0,size=600 or a folder, got {got}")
    name, _, options = spec.partition(":")
    if name.strip() == _DATASETS:
        named = parse_files(options, ("split", "label", "names"))
        if len(named.files) != 1 or named.split is None:
            got = shortened(spec)
            raise ValueError(f"spec: expected {_DATASETS}:NAME_OR_FOLDER,split=test, got {got}")
        chosen = {"label": named.label, "names": named.names}
        return ClassDataset(named.files[0], split=named.split, **chosen)
    if name.strip() == _BUILT_IN:
        allowed = ("seed", "size", "textures")
        return EmojiClasses(**parse_options(spec, options, allowed), image_size=image_size)
    folder, _, names = spec.partition(",names=")
    return ClassFolder(folder, names=names or None)
