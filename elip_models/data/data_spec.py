"""What a spec says of files: their names, and options, in one line or as a mapping.

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
    """Files and where what they name is.

    Args:
        files: paths; ranges, globs and folders where the reader takes them.
        images: the folder that paths of images are relative to; None: that of the file.
        split: which part of a file, or several: "test", "train+restval"; None: all of it.
        answers: a JSON list of all that can be answered; None: made from the data.
        weight: what each right answer counts: 0.5 of Visual Genome's in ALBEF, 0.2 in BLIP.
        label: which column of a table is the class; None: the only one.
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
    """Read a spec of files, with no options but those `allowed`.

    In one line, a part that is no option is a file; what has a comma in its name needs the mapping.
    Raises TypeError or ValueError for a malformed one.
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
    """ "a-{08..10}.tar" -> "a-08.tar", "a-09.tar", "a-10.tar", as the shell does."""
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
