"""Errors that end a run."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from elip_models.validation import TrainingError

UNWRITABLE = re.compile(
    r"\[Errno (5|27|28|30|122)\]|\(os error \d+\)|PytorchStreamWriter|inline_con"
)
"""Errors of a disk that is full, over a quota or a limit, damaged or read-only: of the operating
system, of writers in Rust, and of PyTorch's writer."""


@contextmanager
def as_write_error(path: Path) -> Iterator[None]:
    """Convert an error of writing below `path`, such as a full disk, to TrainingError.

    Other errors pass.
    """
    try:
        yield
    except TrainingError:
        raise
    except BaseException as error:  # that of torch.distributed.checkpoint is no Exception
        if not UNWRITABLE.search(str(error)):
            raise
        raise TrainingError(
            f"{path}: the run ended, since a file could not be written "
            f"({str(error).splitlines()[0]}): free or allow space, then continue from the last "
            "checkpoint with --resume"
        ) from error
