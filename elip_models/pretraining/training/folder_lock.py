"""An exclusive lock of the operating system on a folder.

The lock is on a file in the folder. A file that was removed or replaced no longer locks the folder
for others, so the file behind the lock is compared with the one that has the name.
"""

import os
import socket
import sys
from pathlib import Path

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

SIGNATURE = "elip run: "
"""The beginning of the file, which marks a folder in which a run has started."""
UNREAD = 1 << 30
"""The byte that is locked on Windows, behind the end of the file."""


class FolderLock:
    """The lock on the folder of `path`, the file that is locked. It ends with the process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Create and lock the file, and write this process into it.

        A file that another process has locked raises BlockingIOError.
        """
        while self._descriptor is None:
            follow_no_link = getattr(os, "O_NOFOLLOW", 0)  # Windows has none
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | follow_no_link, 0o666)
            try:
                _lock(descriptor)
                if self._is_named(descriptor):  # else it was removed before it was locked
                    owner = f"{SIGNATURE}process {os.getpid()} on {socket.gethostname()}\n"
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, owner.encode())
                    self._descriptor, descriptor = descriptor, -1
            finally:
                if descriptor >= 0:
                    os.close(descriptor)

    def is_held(self) -> bool:
        """Return whether this object has the lock, and the file is still the one with the name."""
        return self._descriptor is not None and self._is_named(self._descriptor)

    def is_signed(self) -> bool:
        """Return whether the file was written by `acquire`, now or before."""
        return self._content().startswith(SIGNATURE)

    def owner(self) -> str:
        """Return the process that acquired the lock last."""
        return self._content().removeprefix(SIGNATURE).strip() or "another run"

    def release(self) -> None:
        """Release the lock; the file stays."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _content(self) -> str:
        try:
            with self.path.open("rb") as file:
                return file.read(200).decode(errors="replace")
        except OSError:
            return ""

    def _is_named(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.lstat(self.path))
        except FileNotFoundError:
            return False


def _lock(descriptor: int) -> None:
    """Lock an open file, or raise BlockingIOError if another process has locked it."""
    if sys.platform != "win32":
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    os.lseek(descriptor, UNREAD, os.SEEK_SET)  # nobody can read bytes that are locked
    try:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    except PermissionError as error:
        raise BlockingIOError(str(error)) from error
    os.lseek(descriptor, 0, os.SEEK_SET)
