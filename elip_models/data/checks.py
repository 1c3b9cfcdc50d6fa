"""Checks of what no type hint says: samples, indexes, files."""

import os
from collections.abc import Sequence, Sized
from pathlib import Path


def check_not_empty(argument: str, value: Sized, spec: object = None) -> None:
    """At least one sample; `spec` is what names them."""
    if len(value) == 0:
        where = "" if spec is None else f" in {spec!r}"
        raise ValueError(f"{argument}: expected at least one sample, got none{where}")


def check_index(index: int, length: int) -> None:
    """Raise IndexError unless 0 <= index < length, so that a `for` over a source ends."""
    if not 0 <= index < length:
        raise IndexError(f"index: expected 0 <= index < {length}, got {index}")


def expanded(path: str | Path) -> Path:
    """The path, with ~ and ~user as their home folders; FileNotFoundError without such a user."""
    found = os.path.expanduser(path)
    if found.startswith("~"):
        raise FileNotFoundError(f"{path}: expected a user with a home folder; or write ./{path}")
    return Path(found)


def existing_files(argument: str, value: str | Path | Sequence[str | Path]) -> list[Path]:
    """A path or a list of paths -> the paths, at least one, each of a file that exists."""
    paths = [value] if isinstance(value, str | Path) else value
    if not isinstance(paths, Sequence) or not all(isinstance(path, str | Path) for path in paths):
        raise TypeError(f"{argument}: expected a path or a list of paths, got {value!r}")
    if not paths:
        raise ValueError(f"{argument}: expected at least one path, got none")
    files = [Path(path) for path in paths]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(
                f"{argument}: expected an existing file, got {str(file)!r}; "
                f"the working folder is {Path.cwd()}"
            )
    return files
