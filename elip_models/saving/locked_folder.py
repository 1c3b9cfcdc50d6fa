"""A folder that one run at a time writes, and that has no files of something else."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from elip_models.validation import ConfigError, require_extra

with require_extra("elip_models.saving"):
    from filelock import FileLock, Timeout

LOCK = ".lock"


@contextmanager
def locked_folder(
    path: Path,
    argument: str,
    *,
    marker: str,
    leftovers: str = r"(?!)",
    error: type[Exception] = ConfigError,
) -> Iterator[None]:
    """Create the folder of a run and lock it; without `marker` at the end, undo both.

    Args:
        path: the folder.
        argument: its name in errors.
        marker: a file that the folder has from the start of a run on.
        leftovers: a regular expression of the names that a start that was killed may leave.
        error: the type of the errors.

    Raises:
        error: another run uses the folder, it cannot be written, or it has files without `marker`.
    """
    created = [folder for folder in (path, *path.parents) if not os.path.exists(folder)]
    lock = FileLock(path / LOCK, timeout=0)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise error(
            f"{argument}: expected a folder that no other run uses, got {path}, in use by another "
            "run: wait until it ends, or set another folder"
        ) from None
    except (OSError, ValueError) as cause:  # ValueError: a null byte
        raise error(
            f"{argument}: expected a folder that can be written, got {str(path)!r:.300}: "
            f"{getattr(cause, 'strerror', None) or cause}; change its permissions, or set "
            "another folder"
        ) from cause
    try:
        own = re.compile(rf"{re.escape(LOCK)}|{leftovers}")
        names = sorted(name for name in os.listdir(path) if not own.fullmatch(name))
        if names and marker not in names:
            raise error(
                f"{argument}: expected a new or empty folder, or one with a {marker} of a run, got "
                f"{path} with {', '.join(names[:3])}; set another folder"
            )
        yield
    finally:
        if not (path / marker).is_file():
            with suppress(OSError):  # other files are there, or Windows keeps the lock
                (path / LOCK).unlink()
                for folder in created:
                    folder.rmdir()
        lock.release()
