"""Specifications of data files: names and options, as one line or as a mapping.

questions.json,annotations.json,images=val2014
{files: [questions.json, annotations.json], images: val2014}
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from elip_models.validation import Positive, check_fields, did_you_mean


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
    """

    files: tuple[str, ...]
    images: str | None = None
    split: str | None = None
    answers: str | None = None
    weight: Positive = 1.0
    label: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)


_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
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
                f"spec: expected the options {', '.join(allowed)}, got {name!r} in {spec!r}"
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
    """Yield "a-08.tar", "a-09.tar" and "a-10.tar" for "a-{08..10}.tar", as the shell does."""
    found = _RANGE.search(path)
    if found is None:
        yield path
        return
    first, last = found.groups()
    if int(first) > int(last):
        raise ValueError(f"spec: expected a rising range, got {found.group()!r} in {path!r}")
    for number in range(int(first), int(last) + 1):
        rest = path[found.end() :]
        for tail in expand_ranges(rest):
            yield f"{path[: found.start()]}{number:0{len(first)}d}{tail}"
