"""Specifications of data: names of files with options, as one line or as a mapping.

questions.json,annotations.json,images=val2014
{files: [questions.json, annotations.json], images: val2014}
emoji_questions:seed=0,size=2000
"""

import inspect
import itertools
import json
import math
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field

from elip_models.pretraining.data.json_files import validate
from elip_models.validation import did_you_mean, shortened

Spec = str | Mapping[str, Any]
"""One line, or a mapping with the fields of `FileSpec`."""
_RANGE = re.compile(r"\{(\d{1,18})\.\.(\d{1,18})\}")
_MAX_NAMES = 10**6


class FileSpec(BaseModel, frozen=True):
    """Data files and how to read them.

    Args:
        files: Paths. A reader may also accept ranges, globs and folders.
        images: Folder that image paths are relative to. None: the folder of the file.
        split: Part of a file, or several parts: "test", "train+restval". None: the whole file.
        answers: JSON list of all possible answers. None: the list is made from the data.
        weight: Weight of each correct answer, for example 0.5 (ALBEF) or 0.2 (BLIP) for Visual
            Genome.
        label: Name of the class column of a table. None: the only class column.
        names: Names of the classes: "imagenet" or a JSON file. None: see `class_sources`.
    """

    files: Annotated[
        tuple[str, ...], BeforeValidator(lambda files: [files] if isinstance(files, str) else files)
    ]
    images: str | None = None
    split: str | None = None
    answers: str | None = None
    weight: float = Field(1.0, gt=0, allow_inf_nan=False)
    label: str | None = None
    names: str | None = None


def parse_files(spec: Spec, allowed: Collection[str], expected: str) -> FileSpec:
    """Parse a specification of files, with no options except those `allowed`.

    In the one-line form, every part that is not an option is a file name. A file name that contains
    a comma needs the mapping form. A malformed specification raises TypeError or ValueError; the
    message of a spec without files has what is `expected`.
    """
    if not isinstance(spec, str | Mapping):
        raise TypeError(f"spec: expected a text or a mapping, got {shortened(spec)}")
    fields = dict(spec) if isinstance(spec, Mapping) else _parse_line(spec)
    _check_options(fields.keys() - {"files"}, allowed, spec)
    if not fields.get("files"):
        raise ValueError(f"spec: expected {expected}, got {shortened(spec)}")
    return validate(FileSpec, fields, "spec")


def _parse_line(spec: str) -> dict[str, Any]:
    fields: dict[str, Any] = {"files": []}
    for part in filter(None, (part.strip() for part in spec.split(","))):
        name, is_option, value = part.partition("=")
        if is_option and name in FileSpec.model_fields:
            fields[name] = value
        else:
            fields["files"].append(part)
    return fields


def _check_options(options: Collection[str], allowed: Collection[str], spec: Spec) -> None:
    for name in options:
        if name not in allowed:
            raise ValueError(
                f"spec: expected the options {', '.join(allowed)}, got {shortened(name)} in "
                f"{shortened(spec)}{did_you_mean(name, allowed)}"
            )


def built_in_options(spec: Spec, source: type[Any]) -> dict[str, Any] | None:
    """Return {"seed": 0, "size": 100} for "NAME:seed=0,size=100", or None for other data.

    `source` is the class of the built-in data. Other options than its arguments raise ValueError.
    """
    if not isinstance(spec, str) or spec.partition(":")[0].strip() != source.name:
        return None
    parts = (part.partition("=") for part in spec.partition(":")[2].split(",") if part.strip())
    options = {option.strip(): _parse_value(value) for option, _, value in parts}
    known = [name for name in inspect.signature(source).parameters if name != "image_size"]
    _check_options(options, known, spec)
    if "size" not in options:
        example = f"{source.name}:seed=0,size=500"
        raise ValueError(f"spec: expected a size, got {shortened(spec)}; write {example}")
    return options


def _parse_value(text: str) -> Any:
    """Return a number or a truth value, or else the text, for which the data raises an error."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def expand_ranges(path: str) -> Iterator[str]:
    """Yield "a-08.tar", "a-09.tar" and "a-10.tar" for "a-{08..10}.tar", as the shell does.

    Raises ValueError for a falling range, and for more than a million names.
    """
    parts = _RANGE.split(path)
    bounds = [*zip(parts[1::3], parts[2::3], strict=True)]
    ranges = [range(int(first), int(last) + 1) for first, last in bounds]
    count = math.prod(float(len(numbers)) for numbers in ranges)
    if not 0 < count <= _MAX_NAMES:
        raise ValueError(
            f"spec: expected rising ranges of at most {_MAX_NAMES} names in all, got {count:.4g} "
            f"names in {shortened(path)}"
        )
    for numbers in itertools.product(*ranges):
        pairs = zip(numbers, bounds, strict=True)
        names = (f"{number:0{len(first)}d}" for number, (first, _) in pairs)
        yield "".join(itertools.chain(*zip(parts[::3], [*names, ""], strict=True)))


def expand_user(path: str | Path) -> Path:
    """Return the path with ~ and the ~name of a known user expanded."""
    return Path(os.path.expanduser(path))


def path_list(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """Return one path or several as a list."""
    return [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
