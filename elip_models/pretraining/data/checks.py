"""Checks that a type hint cannot express: non-empty data, indices, existing files."""

import os
from collections.abc import Sequence, Sized
from pathlib import Path

from elip_models.validation import shortened


def check_not_empty(argument: str, value: Sized, spec: object = None) -> None:
    """Raise ValueError if `value` is empty; the message names `argument` and `spec`."""
    if len(value) == 0:
        where = "" if spec is None else f" in {shortened(spec)}"
        raise ValueError(f"{argument}: expected at least one sample, got none{where}")


def check_index(index: int, length: int) -> None:
    """Raise IndexError unless 0 <= index < length, so that a `for` over a source ends."""
    if not 0 <= index < length:
        raise IndexError(f"index: expected 0 <= index < {length}, got {index}")


def expand_user(path: str | Path) -> Path:
    """Return the path with ~ and ~user expanded. Raises FileNotFoundError for an unknown user."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise FileNotFoundError(
            f"{path}: expected ~ or the ~name of a known user; write ./{path} for a file"
        )
    return Path(expanded)


def existing_files(argument: str, value: str | Path | Sequence[str | Path]) -> list[Path]:
    """Return a path or a list of paths as a list of existing files, at least one."""
    paths = [value] if isinstance(value, str | Path) else value
    if not isinstance(paths, Sequence) or not all(isinstance(path, str | Path) for path in paths):
        raise TypeError(f"{argument}: expected a path or a list of paths, got {shortened(value)}")
    if not paths:
        raise ValueError(f"{argument}: expected at least one path, got none")
    files = [Path(path) for path in paths]
    for file in files:
        if not os.path.isfile(file):  # false too for a path that is too long
            raise FileNotFoundError(
                f"{argument}: expected an existing file, got {shortened(str(file))}; "
                f"the working folder is {Path.cwd()}"
            )
    return files
