"""Names of classes, as texts use them.

    WordNet ids               names of ImageNet's classes; some of them suffice, as in ImageNet-R
    numbers, names=imagenet   the same by number, as in ImageNet-V2; the classes get WordNet ids
    any, names=FILE           names of a JSON object {"class": "name", ..}, or for numbers a list
    others                    the classes with spaces for "_"

The names of ImageNet's classes are those of open_clip if it is installed, otherwise of timm.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import NamedTuple

from elip_models.pretraining.data.checks import existing_files, expand_user
from elip_models.pretraining.data.json_files import read_json, validate
from elip_models.validation import shortened

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
    if source not in (None, IMAGENET):
        return NamedClasses(tuple(classes), _listed_names(classes, source))
    imagenet = _imagenet_names()
    if source == IMAGENET:
        ids = [*imagenet]
        classes = [
            ids[int(name)] if name.isdecimal() and int(name) < len(ids) else name
            for name in classes
        ]
        if unknown := [name for name in classes if name not in imagenet]:
            raise ValueError(
                f"names: expected WordNet ids or the numbers 0 to {len(ids) - 1} with {IMAGENET}, "
                f"got the class {shortened(unknown[0])}; give a JSON file of names"
            )
    if all(name in imagenet for name in classes):
        return NamedClasses(tuple(classes), tuple(imagenet[name] for name in classes))
    return NamedClasses(tuple(classes), tuple(name.replace("_", " ") for name in classes))


def _imagenet_names() -> dict[str, str]:
    """Return the names of ImageNet's classes by their WordNet ids, in order."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    ids = info.label_names()
    if find_spec("open_clip") is not None:
        from open_clip import IMAGENET_CLASSNAMES

        return dict(zip(ids, IMAGENET_CLASSNAMES, strict=True))
    return {name: info.label_name_to_description(name).partition(",")[0] for name in ids}


def _listed_names(classes: Sequence[str], source: str) -> tuple[str, ...]:
    (file,) = existing_files("names", expand_user(source))
    listed = read_json(file, 'a JSON object {"class": "name", ..} or a list')
    if isinstance(listed, list):
        listed = {str(number): name for number, name in enumerate(listed)}
    names = validate(dict[str, str], listed, str(file))
    if missing := [name for name in classes if name not in names]:
        raise ValueError(
            f"{file}: expected a name for each of the {len(classes)} classes, got none for "
            f"{shortened(missing[0])}; add it"
        )
    return tuple(names[name] for name in classes)
