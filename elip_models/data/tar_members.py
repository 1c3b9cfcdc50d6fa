"""Members of a tar file that may be damaged.

A tar file is a sequence of 512-byte headers, each with a checksum and followed by its data. It ends
with two blocks of zeros. Python's `tarfile` stops at the first invalid header. This reader
continues at the next block, so one damaged header loses one member. It only moves forward, so it
reads streams as well as files.
"""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

BLOCK = tarfile.BLOCKSIZE
CHUNK = 64 * BLOCK
_MAGIC = slice(257, 262), b"ustar"


class Member(NamedTuple):
    """A file in the archive, completely present, with `size` bytes of data at byte `offset`."""

    name: str
    offset: int
    size: int


class Damage(NamedTuple):
    """A lost part of the archive that begins at byte `offset`; `what` describes it."""

    offset: int
    what: str


class Tar(Protocol):
    """Random access to the bytes of an archive."""

    @property
    def size(self) -> int:
        """Number of bytes; for a stream, unlimited until its end is reached."""

    def tell(self) -> int:
        """Return the position."""

    def seek(self, offset: int) -> object:
        """Set the position."""

    def read(self, count: int) -> bytes:
        """Read up to `count` bytes; a limit on memory applies, whatever a header claims."""

    def contains(self, offset: int, size: int) -> bool:
        """Return whether all `size` bytes at `offset` exist. Earlier bytes are not read again."""

    def discard_before(self, offset: int) -> None:
        """Free the bytes before `offset`, which are not read again."""


class _StoredTar:
    """A file as a `Tar`."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self.size = file, size
        self.seek, self.tell = file.seek, file.tell

    def read(self, count: int) -> bytes:
        return self._file.read(min(count, max(0, self.size - self._file.tell())))

    def contains(self, offset: int, size: int) -> bool:
        return offset + size <= self.size

    def discard_before(self, offset: int) -> None:
        """Do nothing, since a file is not kept in memory."""


def read_members(path: Path) -> Iterator[Member | Damage]:
    """Yield the members of a file, see `members_of`."""
    with path.open("rb") as file:
        yield from members_of(_StoredTar(file, path.stat().st_size), str(path))


def members_of(tar: Tar, name: str) -> Iterator[Member | Damage]:
    """Yield the members in order, and the damage between and after them.

    The data of a member can be read until the next member is requested. `name` is the name of the
    archive in errors. Raises ValueError if it is compressed or not a tar file.
    """
    tar.seek(0)
    _check_first(name, tar.read(BLOCK))
    reader = tarfile.TarFile(fileobj=io.BytesIO(bytes(2 * BLOCK)))  # empty: it only parses headers
    reader.fileobj = tar
    end = data_end = 0  # end of the last member, with and without padding
    at, is_lost = 0, False
    while (at := _next_content(tar, at)) < tar.size:
        info = _header(reader, at)
        if info is None:
            at, is_lost = at + BLOCK, True
            continue
        if is_lost:
            yield _no_member(end, at)
        yield from _member(info, tar)
        at = end = reader.offset
        data_end, is_lost = info.offset_data + info.size, False
    if data_end > tar.size:
        return  # the truncated last member was already reported
    if is_lost:
        yield _no_member(end, tar.size)
    elif tar.size - end < BLOCK:
        yield Damage(end, "the end marker of the tar is missing: more may be lost")


def _check_first(name: str, block: bytes) -> None:
    """Raise ValueError if the first block has neither a valid header nor the tar magic."""
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.EOFHeaderError:
        return
    except tarfile.HeaderError as error:
        where, magic = _MAGIC
        if block[where] != magic:
            raise ValueError(
                f"{name}: expected a complete, uncompressed tar, got another format "
                f"({error}); decompress it or build it again"
            ) from error


def _header(reader: tarfile.TarFile, at: int) -> tarfile.TarInfo | None:
    """Return the header at byte `at`, or None if invalid. Set `reader.offset` to its end."""
    reader.fileobj.seek(at)
    reader.offset = at
    try:
        info = tarfile.TarInfo.fromtarfile(reader)
    except (tarfile.TarError, ValueError, OverflowError, RecursionError):
        return None
    return None if info.size < 0 or reader.offset <= at else info


def _member(info: tarfile.TarInfo, tar: Tar) -> Iterator[Member | Damage]:
    """Yield a regular file, or its damage. Folders and links yield nothing."""
    if not info.isfile():
        return
    name = info.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    if not name:
        yield Damage(info.offset, "member without a name")
    elif info.issparse():
        yield Damage(info.offset, f"{name} is stored as a sparse file, which is not supported")
    elif not tar.contains(info.offset_data, info.size):
        there = max(0, tar.size - info.offset_data)
        yield Damage(info.offset, f"{name} is truncated: {there} of {info.size} bytes exist")
    else:
        yield Member(name, info.offset_data, info.size)


def _no_member(start: int, end: int) -> Damage:
    return Damage(start, f"{end - start} bytes from byte {start} on belong to no member")


def _next_content(tar: Tar, at: int) -> int:
    """Return the first block from `at` on that is not all zeros, or an offset past the end.

    Zeros mark the end of an archive, after which another archive may be appended.
    """
    while at < tar.size:
        tar.discard_before(at)
        tar.seek(at)
        chunk = tar.read(CHUNK)
        rest = chunk.lstrip(b"\0")
        if rest:
            return at + (len(chunk) - len(rest)) // BLOCK * BLOCK
        at += max(BLOCK, len(chunk))  # past the end of a stream, the chunk is empty
    return at
