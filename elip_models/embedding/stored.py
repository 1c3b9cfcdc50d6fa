"""Where the bytes of an image are: a file, a part of a file, or a file system of fsspec."""

import os
from pathlib import Path
from typing import NamedTuple

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from elip_models.images import MAX_IMAGE_BYTES, SampleError


class Stored(NamedTuple):
    """The bytes of an image in a file.

    Attributes:
        path: path in the file system.
        files: a file system of fsspec, or None for the local one.
        offset: where the bytes begin.
        size: their number, or None for the whole file.
    """

    path: str
    files: AbstractFileSystem | None = None
    offset: int = 0
    size: int | None = None


class Unavailable(NamedTuple):
    """An image that cannot be read, for a reason that the list of images shows."""

    reason: str


Payload = bytes | Stored | Unavailable
"""The bytes of an image, where they are, or why there are none."""


def local_or_none(files: AbstractFileSystem) -> AbstractFileSystem | None:
    """Return the file system, or None for the local one, as `Stored` has it."""
    return None if isinstance(files, LocalFileSystem) else files


def read(payload: Payload) -> bytes:
    """Return the bytes of an image; raise SampleError with the reason if there are none."""
    if isinstance(payload, Unavailable):
        raise SampleError("", payload.reason)
    try:
        content = payload if isinstance(payload, bytes) else _read_file(payload)
    except SampleError:
        raise
    except Exception as error:  # libraries of file systems raise errors of any type
        what = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise SampleError("", f"cannot be read: {what or type(error).__name__:.300}") from error
    if not content:
        raise SampleError("", "empty file")
    if len(content) > MAX_IMAGE_BYTES:
        raise SampleError("", f"expected at most {MAX_IMAGE_BYTES} bytes, got more")
    return content


def _read_file(stored: Stored) -> bytes:
    path, files, offset, size = stored
    if files is None:
        if not os.path.isfile(path):  # also false for a path that no file can have
            raise SampleError("", "not a file" if os.path.exists(path) else "no such file")
        with Path(path).open("rb") as file:
            file.seek(offset)
            content = file.read(MAX_IMAGE_BYTES + 1 if size is None else size)
    elif size is None:
        with files.open(path, "rb") as file:
            content = file.read(MAX_IMAGE_BYTES + 1)
    else:
        content = files.cat_file(path, start=offset, end=offset + size)
    if size is not None and len(content) != size:  # a server may send the whole file
        what = f"expected {size} bytes of a part of a file, got {len(content)}"
        raise SampleError("", what)
    return content
