"""Names of classes, as texts use them.

    WordNet ids               names of ImageNet's classes; some of them suffice, as in ImageNet-R
    numbers, names=imagenet   the same by number, as in ImageNet-V2; the classes get WordNet ids
    any, names=FILE           names of a JSON object {"class": "name", ..}, or for numbers a list
    others                    the classes with spaces for "_"

The names of ImageNet's classes are those of open_clip if it is installed, otherwise of timm.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from elip_models.pretraining.data.checks import existing_files, expand_user
from elip_models.pretraining.data.json_files import read_json, validate
from elip_models.validation import shortened

if TYPE_CHECKING:
    from timm.data import ImageNetInfo

IMAGENET = "imagenet"


def named_classes(
    classes: Sequence[str], source: str | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the classes and their names, see the top of this file.

    Args:
        classes: Names of folders, or of the labels of a dataset.
        source: "imagenet", a JSON file, or None.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: A class has no name.
    """
    from timm.data import ImageNetInfo

    imagenet = ImageNetInfo("imagenet-1k")
    ids = imagenet.label_names()
    if source == IMAGENET:
        numbers = {str(number): name for number, name in enumerate(ids)}
        classes = [numbers.get(name, name) for name in classes]
    if source not in (None, IMAGENET):
        names = _listed_names(source)
    elif source == IMAGENET or set(classes) <= set(ids):
        names = dict(zip(ids, _imagenet_names(imagenet), strict=True))
    else:
        names = {name: name.replace("_", " ") for name in classes}
    if missing := [name for name in classes if name not in names]:
        raise ValueError(
            f"names: expected a name for each of the {len(classes)} classes, got none for "
            f"{shortened(missing[0])} in {source}; add it to a JSON file of names"
        )
    return tuple(classes), tuple(names[name] for name in classes)


def _imagenet_names(imagenet: "ImageNetInfo") -> list[str]:
    if find_spec("open_clip") is None:
        return [text.partition(",")[0] for text in imagenet.label_descriptions()]
    from open_clip import IMAGENET_CLASSNAMES

    return IMAGENET_CLASSNAMES


def _listed_names(source: str) -> dict[str, str]:
    (file,) = existing_files("names", expand_user(source))
    names = read_json(file, 'a JSON object {"class": "name", ..} or a list')
    if isinstance(names, list):
        names = {str(number): name for number, name in enumerate(names)}
    return validate(dict[str, str], names, str(file))
