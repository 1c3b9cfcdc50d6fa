"""Errors that end a run."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from elip_models.validation import TrainingError

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
"""Errors of a file system that is full, over a quota or a limit, damaged or read-only."""
WRITER = re.compile(r"\(os error (\d+)\)|PytorchStreamWriter|inline_container")
"""Errors of Rust's and of PyTorch's writers, which are not OSError."""


@contextmanager
def as_write_error(path: Path) -> Iterator[None]:
    """Convert an error of the file system below `path`, such as a full disk, to TrainingError.

    Other errors pass.
    """
    try:
        yield
    except (TrainingError, SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:  # writers of torch and safetensors raise classes of their own
        if (problem := _write_problem(error)) is None:
            raise
        raise TrainingError(
            f"{path}: the run ended, since a file could not be written ({problem}): free or allow "
            "space, then continue from the last checkpoint with --resume"
        ) from error


def _write_problem(error: BaseException) -> str | None:
    """Return why a file could not be written; None for an error of another kind."""
    if isinstance(error, OSError):
        return error.strerror if error.errno in UNWRITABLE else None
    if found := WRITER.search(str(error)):
        number = found[1]
        return str(error).splitlines()[0] if number is None else os.strerror(int(number))
    return None
