"""Checks of this package's public functions: an error says argument, expected, got."""

from collections.abc import Iterator, Sequence, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def extra(name: str, user: str) -> Iterator[None]:
    """Around imports: an ImportError becomes one sentence that names the extra to install."""
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f"{user} needs the package {error.name}: pip install 'elip-kernels[{name}]'",
            name=error.name,
        ) from error


def check_int(argument: str, value: Any, least: int) -> None:
    """An int, not a bool, of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{argument}: expected an int, got {value!r}")
    if value < least:
        raise ValueError(f"{argument}: expected at least {least}, got {value}")


def check_share(argument: str, value: Any) -> None:
    """A number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{argument}: expected a number in [0, 1], got {value!r}")
    if not 0 <= value <= 1:
        raise ValueError(f"{argument}: expected a number in [0, 1], got {value}")


def check_callable(argument: str, value: Any) -> None:
    """Something to call."""
    if not callable(value):
        raise TypeError(f"{argument}: expected a function, got {value!r}")


def check_not_empty(argument: str, value: Sized) -> None:
    """At least one sample."""
    if len(value) == 0:
        raise ValueError(f"{argument}: expected at least one sample, got none")


def check_index(index: int, length: int) -> None:
    """Raise IndexError unless 0 <= index < length, so that a `for` over a source ends."""
    if not 0 <= index < length:
        raise IndexError(f"index: expected 0 <= index < {length}, got {index}")


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
