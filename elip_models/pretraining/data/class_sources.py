"""Images with class labels, for zero-shot classification: a `Source` whose caption is the class.

    emoji_classes:seed=0,size=600    built-in images of one emoji each, with balanced classes
    FOLDER                           one folder of images per class, as ImageNet's validation set
    datasets:NAME,split=test         a dataset of the hub, or a folder of parquet files

The last two take `,names=imagenet` or `,names=FILE`. Names of classes, as texts use them:

    WordNet ids               names of ImageNet's classes; some of them suffice, as in ImageNet-R
    numbers, names=imagenet   the same by number, as in ImageNet-V2; the classes get WordNet ids
    any, names=FILE           names of a JSON object {"class": "name", ..}, or for numbers a list
    others                    the classes with spaces for "_"

The names and templates of ImageNet are those of open_clip if it is installed. Otherwise the names
are those of timm, and "a photo of a dog." is the only template.
"""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from elip_models.calibration.class_names import Template, imagenet_names, prompt_templates
from elip_models.images import SampleError, decode_image
from elip_models.pretraining.data.data_spec import (
    FileSpec,
    Spec,
    built_in_options,
    expand_user,
    parse_files,
)
from elip_models.pretraining.data.json_files import read_json, validate
from elip_models.pretraining.data.samples import Example, Sample, Source, check_index
from elip_models.pretraining.data.scenes import EmojiClasses
from elip_models.validation import shortened

if TYPE_CHECKING:
    from datasets import Dataset

_FORMS = (
    "emoji_classes:size=600, datasets:NAME_OR_FOLDER,split=test, or a folder with a folder of "
    "images per class"
)


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


class LabelledImages:
    """A `ClassSource` over a table of the library `datasets`.

    Args:
        table: The images, in its only column of images.
        name: Ids are this name and the number of the row. "": the folder and name of the file.
        spec: The class column `label`, by default the only one, and the `names` of the classes.

    Raises:
        ValueError: A column is missing, or images have no class, as in many test sets.
    """

    def __init__(self, table: "Dataset", name: str, spec: FileSpec) -> None:
        from datasets import ClassLabel, Image

        image = _only_column(table, Image, None)
        label = _only_column(table, ClassLabel, spec.label)
        self._images = table.cast_column(image, Image(decode=False))[image]
        self._numbers, self._name = table[label][:], name
        unknown = sum(number is None or number < 0 for number in self._numbers)
        if unknown:
            raise ValueError(
                f"split: expected one whose images all have a class, got {unknown} of "
                f"{len(table)} without one in {name}; use another split, such as validation"
            )
        self.classes, self.names = _named_classes(table.features[label].names, spec.names)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Sample:
        captions, sample_id = self.captions(index), self.sample_id(index)
        stored = self._images[index]
        if stored is None:
            raise SampleError(sample_id, "no image")
        file = Path(stored["path"]) if stored["bytes"] is None else io.BytesIO(stored["bytes"])
        return Sample(decode_image(file, sample_id), captions, sample_id)

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the class."""
        check_index(index, len(self))
        return (self.classes[self._numbers[index]],)

    def sample_id(self, index: int) -> str:
        """Return the id of a sample without decoding the image."""
        if self._name:
            return f"{self._name}-{index}"
        return "/".join(Path(self._images[index]["path"]).parts[-2:])

    @property
    def templates(self) -> tuple[Template, ...]:
        """Templates of open_clip, or a default; not stored, since functions cannot be pickled."""
        return prompt_templates()


def _only_column(table: "Dataset", kind: type, name: str | None) -> str:
    """Return the column of a type: the one called `name`, or the only one."""
    columns = [column for column, feature in table.features.items() if isinstance(feature, kind)]
    chosen = [column for column in columns if name in (None, column)]
    if len(chosen) != 1:
        wanted = f"one column of {kind.__name__}" + (f" named {name!r}" if name else "")
        got = columns or table.column_names
        raise ValueError(f"label: expected {wanted}, got {got}; add label=NAME")
    return chosen[0]


class ClassExamples:
    """An `ExampleSource` of images without text, whose `answers` are the classes."""

    def __init__(self, source: ClassSource) -> None:
        self.source, self.answers = source, source.classes

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        return self.text_alone(index)._replace(images=(self.source[index].image,))

    def text_alone(self, index: int) -> Example:
        """Return the class without decoding the image."""
        (name,) = self.source.captions(index)
        return Example((), "", {name: 1.0}, self.source.sample_id(index))


def open_classes(spec: Spec, *, image_size: int, needs_names: bool = True) -> ClassSource:
    """Open the images that `spec` names, see the top of this file.

    Built-in images have `image_size` pixels. Classes whose names are numbers raise ValueError,
    unless `needs_names` is False, for a task without texts.
    """
    options = built_in_options(spec, EmojiClasses)
    if options is not None:
        return EmojiClasses(**options, image_size=image_size)
    is_dataset = str(spec).startswith("datasets:")
    allowed = ("split", "label", "names") if is_dataset else ("names",)
    named = parse_files(
        str(spec).removeprefix("datasets:") if is_dataset else spec, allowed, _FORMS
    )
    if len(named.files) != 1 or (is_dataset and named.split is None):
        raise ValueError(f"spec: expected {_FORMS}, got {shortened(spec)}")
    source = _read_dataset(named) if is_dataset else _read_folder(named)
    if needs_names and all(name.isdecimal() for name in source.names):
        shown = ", ".join(source.names[:3])
        raise ValueError(
            f"spec: expected classes with names, got the numbers {shown}.. in {shortened(spec)}; "
            "add ,names=imagenet if they are those of ImageNet's classes, as in ImageNet-V2, "
            'or ,names=FILE with a JSON object {"0": "name", ..}'
        )
    return source


def _read_dataset(spec: FileSpec) -> LabelledImages:
    from datasets import load_dataset

    path = expand_user(spec.files[0])
    table = load_dataset(str(path), split=spec.split)
    return LabelledImages(table, f"{path.name}-{spec.split}", spec)


def _read_folder(spec: FileSpec) -> LabelledImages:
    # `load_dataset("imagefolder")` would take a class called "train" or "test" for a split.
    from datasets import ClassLabel, Dataset, Features, Image
    from torchvision.datasets import ImageFolder

    root = expand_user(spec.files[0])
    if not os.path.isdir(root):
        raise FileNotFoundError(f"spec: expected {_FORMS}, got {shortened(spec.files[0])}")
    folder = ImageFolder(str(root))
    columns = {"image": [file for file, _ in folder.samples], "label": folder.targets}
    features = Features({"image": Image(decode=False), "label": ClassLabel(names=folder.classes)})
    return LabelledImages(Dataset.from_dict(columns, features=features), "", spec)


def _named_classes(
    classes: Sequence[str], source: str | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the classes and their names, by "imagenet", a JSON file, or None."""
    from timm.data import ImageNetInfo

    ids = ImageNetInfo("imagenet-1k").label_names()
    if source == "imagenet":
        numbers = {str(number): name for number, name in enumerate(ids)}
        classes = [numbers.get(name, name) for name in classes]
    if source not in (None, "imagenet"):
        file = expand_user(source)
        names = read_json(file, 'a JSON object {"class": "name", ..} or a list')
        if isinstance(names, list):
            names = {str(number): name for number, name in enumerate(names)}
        names = validate(dict[str, str], names, str(file))
    elif source is None and not set(classes) <= set(ids):
        names = {name: name.replace("_", " ") for name in classes}
    else:
        names = dict(zip(ids, imagenet_names(), strict=True))
    if missing := [name for name in classes if name not in names]:
        raise ValueError(
            f"names: expected a name for each of the {len(classes)} classes, got none for "
            f"{shortened(missing[0])} in {source}; add it to a JSON file of names"
        )
    return tuple(classes), tuple(names[name] for name in classes)
