"""The members of a tar that may be damaged: all that can be found, and where something is lost.

A tar is a row of 512-byte headers, each with a checksum and followed by its data, and ends in two
blocks of zeros. Where a header does not hold, Python's `tarfile` stops as if the archive ended
there. Here the search goes on at the next block, so that one damaged header loses one member. It
only goes forward, so that a stream is read as a file is.
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
    """A file of the archive: its data are `size` bytes from `offset` on, all of them there.

    name: as UTF-8; bytes that are none are escaped.
    """

    name: str
    offset: int
    size: int


class Damage(NamedTuple):
    """Something that is lost, at byte `offset` of the archive; `what` says it in words."""

    offset: int
    what: str


class Tar(Protocol):
    """The bytes of an archive; `size` of a stream is beyond all offsets until its end is met."""

    @property
    def size(self) -> int: ...

    def tell(self) -> int: ...

    def seek(self, offset: int) -> object: ...

    def read(self, count: int) -> bytes:
        """At most what there is, and what a process may hold, whatever a header claims."""
        ...

    def has(self, offset: int, size: int) -> bool:
        """Whether there are `size` bytes from `offset` on; what lies before is not read again."""
        ...

    def release(self, offset: int) -> None:
        """What lies before is not read again."""
        ...


class StoredTar:
    """A file as a `Tar`."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self.size = file, size
        self.seek, self.tell = file.seek, file.tell

    def read(self, count: int) -> bytes:
        """Of a header that claims gigabytes, no more is read than the file has."""
        return self._file.read(min(count, max(0, self.size - self._file.tell())))

    def has(self, offset: int, size: int) -> bool:
        return offset + size <= self.size

    def release(self, offset: int) -> None:
        pass


def read_members(path: Path) -> Iterator[Member | Damage]:
    """Those of a file, see `members_of`."""
    with path.open("rb") as file:
        yield from members_of(StoredTar(file, path.stat().st_size), str(path))


def members_of(tar: Tar, name: str) -> Iterator[Member | Damage]:
    """Members in their order, and what is lost between and behind them. The data of a member may be
    read until the next one is asked for.

    Raises:
        ValueError: `tar`, which is called `name`, is none, or a compressed one.
    """
    tar.seek(0)
    _check_first(name, tar.read(BLOCK))
    reader = tarfile.TarFile(
        fileobj=io.BytesIO(bytes(2 * BLOCK))
    )  # what reads a header, of nothing
    reader.fileobj = tar
    end = data_end = 0  # of the last member
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
        return  # the last one is cut short, and said so
    if is_lost:
        yield _no_member(end, tar.size)
    elif tar.size - end < BLOCK:
        yield Damage(end, "it does not end as a tar ends: more may be lost")


def _check_first(name: str, block: bytes) -> None:
    """Where neither the first header holds nor its magic, the file was never a tar; zeros are the
    end of one that is empty.
    """
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.EOFHeaderError:
        return
    except tarfile.HeaderError as error:
        where, magic = _MAGIC
        if block[where] != magic:
            raise ValueError(
                f"{name}: expected a whole, uncompressed tar, got a file that does not read as one "
                f"({error}); decompress it or build it again"
            ) from error


def _header(reader: tarfile.TarFile, at: int) -> tarfile.TarInfo | None:
    """The header at byte `at`, `reader.offset` then being that behind its data; None where none
    holds.
    """
    reader.fileobj.seek(at)
    reader.offset = at
    try:
        info = tarfile.TarInfo.fromtarfile(reader)
    except (tarfile.TarError, ValueError, OverflowError, RecursionError):
        return None
    return None if info.size < 0 or reader.offset <= at else info


def _member(info: tarfile.TarInfo, tar: Tar) -> Iterator[Member | Damage]:
    """A regular file; folders and links are none, and nothing is lost with them."""
    if not info.isfile():
        return
    name = info.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    if not name:
        yield Damage(info.offset, "a member without a name")
    elif info.issparse():
        yield Damage(info.offset, f"{name} is stored sparse, which is not read")
    elif not tar.has(info.offset_data, info.size):
        there = max(0, tar.size - info.offset_data)
        yield Damage(info.offset, f"{name} is cut short: {there} of {info.size} bytes are there")
    else:
        yield Member(name, info.offset_data, info.size)


def _no_member(start: int, end: int) -> Damage:
    return Damage(start, f"{end - start} bytes from byte {start} on belong to no member")


def _next_content(tar: Tar, at: int) -> int:
    """The first block from `at` on that is not all zeros, which are an archive's end, to which
    another may be appended; beyond the last byte where there is none.
    """
    while at < tar.size:
        tar.release(at)
        tar.seek(at)
        chunk = tar.read(CHUNK)
        rest = chunk.lstrip(b"\0")
        if rest:
            return at + (len(chunk) - len(rest)) // BLOCK * BLOCK
        at += max(BLOCK, len(chunk))  # nothing is read behind the end of a stream
    return at
