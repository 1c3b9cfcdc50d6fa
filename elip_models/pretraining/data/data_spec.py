"""Specifications of data files: names and options, as one line or as a mapping.

questions.json,annotations.json,images=val2014
{files: [questions.json, annotations.json], images: val2014}
"""

import itertools
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from elip_models.validation import Positive, check_fields, did_you_mean, shortened


@dataclass(frozen=True)
class FileSpec:
    """Data files and how to read them.

    Args:
        files: Paths. A reader may also accept ranges, globs and folders.
        images: Folder that image paths are relative to. None: the folder of the file.
        split: Part of a file, or several parts: "test", "train+restval". None: the whole file.
        answers: JSON list of all possible answers. None: the list is made from the data.
        weight: Weight of each correct answer, for example 0.5 (ALBEF) or 0.2 (BLIP) for Visual
            Genome.
        label: Name of the class column of a table. None: the only class column.
        names: Names of the classes: "imagenet" or a JSON file. None: see `named_classes`.
    """

    files: tuple[str, ...]
    images: str | None = None
    split: str | None = None
    answers: str | None = None
    weight: Positive = 1.0
    label: str | None = None
    names: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)


_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MAX_DIGITS = 18
_MAX_NAMES, _MAX_CHARACTERS = 10**6, 2**28
OPTIONS = tuple(field.name for field in fields(FileSpec) if field.name != "files")


def parse_files(spec: str | Mapping[str, Any], allowed: Collection[str]) -> FileSpec:
    """Parse a specification of files, with no options except those `allowed`.

    In the one-line form, every part that is not an option is a file name. A file name that contains
    a comma needs the mapping form. A malformed specification raises TypeError or ValueError.
    """
    given = dict(spec) if isinstance(spec, Mapping) else _parts(spec)
    known = ("files", *allowed)
    for name in given:
        if name not in known:
            raise ValueError(
                f"spec: expected the options {', '.join(allowed)}, got {shortened(name)} in "
                f"{shortened(spec)}"
                f"{did_you_mean(name, known)}"
            )
    files = given.pop("files", ())
    files = (files,) if isinstance(files, str) else files
    return FileSpec(tuple(files) if isinstance(files, list | tuple) else files, **given)


def _parts(spec: str) -> dict[str, Any]:
    found: dict[str, Any] = {"files": []}
    for part in filter(None, (part.strip() for part in spec.split(","))):
        name, is_option, value = part.partition("=")
        if is_option and name in OPTIONS:
            found[name] = _number(value) if name == "weight" else value
        else:
            found["files"].append(part)
    return found


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def expand_ranges(path: str) -> Iterator[str]:
    """Yield "a-08.tar", "a-09.tar" and "a-10.tar" for "a-{08..10}.tar", as the shell does.

    Raises ValueError for a falling range, and for more than a million names.
    """
    parts = _RANGE.split(path)
    ranges = []
    for first, last in zip(parts[1::3], parts[2::3], strict=True):
        if max(len(first), len(last)) > _MAX_DIGITS or int(first) > int(last):
            raise ValueError(
                f"spec: expected a rising range, got '{{{first:.20}..{last:.20}}}' (at most "
                f"{_MAX_DIGITS} digits)"
            )
        ranges.append(range(int(first), int(last) + 1))
    count = math.prod(float(len(each)) for each in ranges)  # a product of integers can be too long
    if count > _MAX_NAMES or count * len(path) > _MAX_CHARACTERS:
        raise ValueError(
            f"spec: expected ranges of at most {_MAX_NAMES} names and {_MAX_CHARACTERS} "
            f"characters in all, got {count:.4g} names of {len(path)} characters"
        )
    for numbers in itertools.product(*ranges):
        shown = (f"{n:0{len(first)}d}" for n, first in zip(numbers, parts[1::3], strict=True))
        yield "".join(itertools.chain(*zip(parts[::3], [*shown, ""], strict=True)))
