"""Errors that end a run."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from elip_models.validation import TrainingError

_CODES = "|".join(
    str(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
)
UNWRITABLE = re.compile(
    rf"\[Errno ({_CODES})\]|\(os error ({_CODES}|112)\)|\[WinError 112\]"
    "|PytorchStreamWriter|inline_con"
)
"""Errors of a disk that is full (112 on Windows), over a quota or a limit, damaged or read-only: of
the operating system, of writers in Rust, and of PyTorch's writer."""


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
