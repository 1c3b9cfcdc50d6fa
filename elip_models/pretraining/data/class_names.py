"""Names of classes, as texts use them.

    WordNet ids               names of ImageNet's classes; some of them suffice, as in ImageNet-R
    numbers, names=imagenet   the same by number, as in ImageNet-V2; the classes get WordNet ids
    any, names=FILE           names of a JSON object {"class": "name", ..}, or for numbers a list
    others                    the classes with spaces for "_"

The names of ImageNet's classes are those of open_clip if it is installed, otherwise of timm.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

from elip_models.pretraining.data.checks import existing_files, expand_user
from elip_models.pretraining.data.json_files import read_json
from elip_models.validation import shortened

if TYPE_CHECKING:
    from timm.data import ImageNetInfo

IMAGENET = "imagenet"


class NamedClasses(NamedTuple):
    """Classes and their names, in the same order."""

    classes: tuple[str, ...]
    names: tuple[str, ...]


def named_classes(classes: Sequence[str], source: str | None) -> NamedClasses:
    """Return the classes with their names, see the top of this file.

    Args:
        classes: Names of folders, or of the labels of a dataset.
        source: "imagenet", a JSON file, or None.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: A class has no name.
    """
    from timm.data import ImageNetInfo

    classes, imagenet = tuple(classes), ImageNetInfo("imagenet-1k")
    ids = imagenet.label_names()
    if source == IMAGENET:
        classes = tuple(_imagenet_id(name, ids) for name in classes)
    elif source is not None:
        return NamedClasses(classes, _listed_names(classes, source))
    if not set(classes) <= set(ids):
        return NamedClasses(classes, tuple(name.replace("_", " ") for name in classes))
    return NamedClasses(classes, _imagenet_names(classes, imagenet))


def check_not_numbers(names: Sequence[str], spec: str) -> None:
    """Raise ValueError if all names are numbers, which no text can describe."""
    if all(name.isdecimal() for name in names):
        shown = ", ".join(names[:3])
        raise ValueError(
            f"spec: expected classes with names, got the numbers {shown}.. in {shortened(spec)}; "
            f"add ,names={IMAGENET} if they are those of ImageNet's classes, as in ImageNet-V2, "
            'or ,names=FILE with a JSON object {"0": "name", ..}'
        )


def _imagenet_id(name: str, ids: Sequence[str]) -> str:
    """Return the WordNet id of an ImageNet class, given by id or number."""
    if name.isdecimal() and int(name) < len(ids):
        return ids[int(name)]
    if name not in ids:
        raise ValueError(
            f"names: expected WordNet ids or the numbers 0 to {len(ids) - 1} with {IMAGENET}, got "
            f"the class {shortened(name)}; give a JSON file of names"
        )
    return name


def _imagenet_names(classes: Sequence[str], imagenet: "ImageNetInfo") -> tuple[str, ...]:
    if find_spec("open_clip") is None:
        described = map(imagenet.label_name_to_description, classes)
        return tuple(text.partition(",")[0] for text in described)
    from open_clip import IMAGENET_CLASSNAMES

    numbers = {label: number for number, label in enumerate(imagenet.label_names())}
    return tuple(IMAGENET_CLASSNAMES[numbers[name]] for name in classes)


def _listed_names(classes: Sequence[str], file: str) -> tuple[str, ...]:
    wanted = 'a JSON object {"class": "name", ..} or a list'
    (path,) = existing_files("names", expand_user(file))
    listed = read_json(path, wanted)
    if isinstance(listed, list):
        listed = {str(number): name for number, name in enumerate(listed)}
    if not isinstance(listed, dict) or not all(isinstance(each, str) for each in listed.values()):
        raise ValueError(f"{file}: expected {wanted} of texts, got {listed!r:.200}")
    missing = [name for name in classes if name not in listed]
    if missing:
        raise ValueError(
            f"{file}: expected a name for each of the {len(classes)} classes, got none for "
            f"{shortened(missing[0])}; add it"
        )
    return tuple(listed[name] for name in classes)
