"""The members of a tar that may be damaged: all that can be found, and where something is lost.

A tar is a row of 512-byte headers, each with a checksum and followed by its data, and ends in two
blocks of zeros. Where a header does not hold, Python's `tarfile` stops as if the archive ended
there. Here the search goes on at the next block, so that one damaged header loses one member.
"""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

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


def read_members(path: Path) -> Iterator[Member | Damage]:
    """Members in their order, and what is lost between and behind them.

    Raises:
        ValueError: the file is no tar, or a compressed one.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        _check_first(path, file.read(BLOCK))
        file.seek(0)
        end, data_end = 0, 0
        for info, end_of_member in _headers(file, size):
            yield from _lost(file, end, info.offset)
            end, data_end = end_of_member, info.offset_data + info.size
            yield from _read(info, size)
        if data_end <= size:  # else the last one is cut short, and said so
            yield from _lost_at_the_end(file, end, size)


def _check_first(path: Path, block: bytes) -> None:
    """Where neither the first header holds nor its magic, the file was never a tar."""
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        where, magic = _MAGIC
        if block[where] != magic:
            raise ValueError(
                f"{path}: expected a whole, uncompressed tar, got a file that does not read as one "
                f"({error}); decompress it or build it again"
            ) from error


def _headers(file: BinaryIO, size: int) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """Headers that hold, each with the byte behind its data; they come in rising order."""
    tar = tarfile.TarFile(fileobj=io.BytesIO(bytes(2 * BLOCK)))  # what reads a header, of nothing
    tar.fileobj = _Bounded(file, size)
    at = 0
    while (at := _next_content(file, at, size)) < size:
        file.seek(at)
        tar.offset = at
        try:
            info = tarfile.TarInfo.fromtarfile(tar)
        except (tarfile.TarError, ValueError, OverflowError, RecursionError):
            at += BLOCK
            continue
        if info.size < 0 or tar.offset <= at:
            at += BLOCK
            continue
        at = tar.offset
        yield info, at


class _Bounded:
    """Of a header that claims gigabytes, no more is read than the file has."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size
        self.seek, self.tell = file.seek, file.tell

    def read(self, count: int = -1) -> bytes:
        left = max(0, self.size - self.file.tell())
        return self.file.read(left if count < 0 else min(count, left))


def _read(info: tarfile.TarInfo, size: int) -> Iterator[Member | Damage]:
    """A regular file; folders and links are none, and nothing is lost with them."""
    if not info.isfile():
        return
    name = info.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    if not name:
        yield Damage(info.offset, "a member without a name")
    elif info.issparse():
        yield Damage(info.offset, f"{name} is stored sparse, which is not read")
    elif info.offset_data + info.size > size:
        there = max(0, size - info.offset_data)
        yield Damage(info.offset, f"{name} is cut short: {there} of {info.size} bytes are there")
    else:
        yield Member(name, info.offset_data, info.size)


def _lost(file: BinaryIO, start: int, end: int) -> Iterator[Damage]:
    """What lies between two members; zeros are an archive's end, to which another was appended."""
    if not _is_zero(file, start, end):
        yield Damage(start, f"{end - start} bytes from byte {start} on belong to no member")


def _lost_at_the_end(file: BinaryIO, end: int, size: int) -> Iterator[Damage]:
    """What lies behind the last member that was found."""
    if not _is_zero(file, end, size):
        yield Damage(end, f"{size - end} bytes from byte {end} on belong to no member")
    elif size - end < BLOCK:
        yield Damage(end, "it does not end as a tar ends: more may be lost")


def _is_zero(file: BinaryIO, start: int, end: int) -> bool:
    return _next_content(file, start, end) >= end


def _next_content(file: BinaryIO, start: int, end: int) -> int:
    """The first block from `start` on, before `end`, that is not all zeros; `end` or more where
    there is none."""
    while start < end:
        file.seek(start)
        chunk = file.read(min(CHUNK, end - start))
        rest = chunk.lstrip(b"\0")
        if rest:
            return start + (len(chunk) - len(rest)) // BLOCK * BLOCK
        start += len(chunk)
    return start
