"""Members of a tar file that may be damaged.

A tar file is a sequence of 512-byte headers, each with a checksum and followed by its data. It ends
with two blocks of zeros. Python's `tarfile` stops at the first invalid header. This reader
continues at the next block, so one damaged header loses one member. It only moves forward, so it
reads streams as well as files. The time is linear in the size, whatever the headers hold.
"""

import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

BLOCK = tarfile.BLOCKSIZE
CHUNK = 64 * BLOCK
MORE_LOST = "more may be lost"
"""End of the reason of a loss whose number of samples is not known."""
_MAGIC = slice(257, 262), b"ustar"
_CHECKSUM = re.compile(rb"[0-7 \0]{8}")
_CHECKSUM_OFFSET = 148
_PADDING = tarfile.RECORDSIZE + BLOCK  # most zeros that end a tar: two blocks, filled to a record
_MAX_GAP = 2**26  # bytes without a member after which the rest is not read
_MAX_SIZE = 2**40
_MAX_EXTENDED = 2**16  # bytes of the extended headers of a member
_LONG = "././@LongLink"  # the name of each header that holds a long name
_LONG_NAME, _LONG_LINK, _GLOBAL = tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, b"g"
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, _GLOBAL)
_KINDS = {
    tarfile.LNKTYPE: "is a hard link",
    tarfile.SYMTYPE: "is a symbolic link",
    tarfile.CHRTYPE: "is a device",
    tarfile.BLKTYPE: "is a device",
    tarfile.FIFOTYPE: "is a named pipe",
}


class Member(NamedTuple):
    """A file in the archive with `size` bytes of data at byte `offset`.

    `problem` is why it cannot be read, or "". The data of a readable one is completely present.
    """

    name: str
    offset: int
    size: int
    problem: str = ""


class Damage(NamedTuple):
    """A lost part of the archive that begins at byte `offset`; `what` ends in `MORE_LOST`."""

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


class StoredTar:
    """A file as a `Tar`."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self.size = file, size
        self.seek, self.tell = file.seek, file.tell

    def read(self, count: int) -> bytes:
        """Read up to `count` bytes."""
        return self._file.read(min(count, max(0, self.size - self._file.tell())))

    def contains(self, offset: int, size: int) -> bool:
        """Return whether the file has `size` bytes at `offset`."""
        return offset + size <= self.size

    def discard_before(self, offset: int) -> None:
        """Do nothing, since a file is not kept in memory."""


def read_members(path: Path) -> Iterator[Member | Damage]:
    """Yield the members of a file, see `members_of`."""
    with path.open("rb") as file:
        yield from members_of(StoredTar(file, path.stat().st_size), str(path))


def members_of(tar: Tar, name: str) -> Iterator[Member | Damage]:
    """Yield the members in order, and the damage between and after them.

    The data of a member can be read until the next member is requested. Folders yield nothing.
    `name` is the name of the archive in errors. Raises ValueError if it is compressed or not a tar
    file.
    """
    tar.seek(0)
    _check_first(name, tar.read(BLOCK))
    archive = at = 0  # where the archive begins, of several that are appended to each other
    while True:
        end, header, is_zero = _next_header(tar, at)
        what = _loss(archive, at, end, is_zero=is_zero, is_last=header is None)
        if what:
            yield Damage(at, f"{what}; {MORE_LOST}")
        if header is None:
            return
        if end > at and is_zero:
            archive = end
        is_folder = not (header.is_file or header.problem)
        if header.is_short and not is_zero:
            yield Damage(end, f"a member behind lost bytes may be without its name; {MORE_LOST}")
        elif not header.name and not is_folder:
            yield Damage(end, f"member without a name; {MORE_LOST}")
        elif header.problem:
            yield Member(header.name, header.offset, 0, header.problem)
        elif header.is_file:
            if not tar.contains(header.offset, header.size):
                there = max(0, tar.size - header.offset)
                what = f"is truncated: {there} of {header.size} bytes exist"
                yield Member(header.name, header.offset, 0, what)
                yield Damage(tar.size, f"the tar is truncated; {MORE_LOST}")
                return
            yield Member(header.name, header.offset, header.size)
        at = header.end


def holds_header(content: bytes) -> bool:
    """Return whether the data of a member holds another member, so that its size is wrong."""
    where, magic = _MAGIC
    for at in range(0, len(content), BLOCK):
        if content[at + where.start : at + where.stop] == magic and _info(content[at : at + BLOCK]):
            return True
    return False


def padded(size: int) -> int:
    """Return the size in whole blocks."""
    return -(-size // BLOCK) * BLOCK


def _check_first(name: str, block: bytes) -> None:
    """Raise ValueError if the first block has neither a valid header nor the tar magic."""
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.EOFHeaderError:
        return
    except (tarfile.HeaderError, ValueError) as error:
        where, magic = _MAGIC
        if block[where] != magic:
            raise ValueError(
                f"{name}: expected a complete, uncompressed tar, got another format "
                f"({error}); decompress it or build it again"
            ) from error


class _Header(NamedTuple):
    """Headers of a member: its data begins at `offset`, the next member at `end`."""

    name: str
    offset: int
    size: int
    end: int
    is_file: bool
    is_short: bool  # the name may be the short form of one in an extended header
    problem: str


def _next_header(tar: Tar, at: int) -> tuple[int, _Header | None, bool]:
    """Return where the next valid header is, the header, and whether all bytes before are zero.

    At the end of the archive, and after `_MAX_GAP` bytes, the header is None.
    """
    start, is_zero, count = at, True, BLOCK
    while at < tar.size and at - start < _MAX_GAP:
        tar.discard_before(at)
        tar.seek(at)
        chunk = tar.read(count)
        if not chunk:
            break
        end = at + len(chunk)
        blocks = range(0, len(chunk), BLOCK) if chunk.strip(b"\0") else ()
        for first in blocks:
            block = chunk[first : first + BLOCK]
            if not block.strip(b"\0"):
                continue
            if _CHECKSUM.match(block, _CHECKSUM_OFFSET):
                header, behind = _read_header(tar, at + first)
                if header is not None:
                    return at + first, header, is_zero
                if behind > at + first + BLOCK:
                    is_zero, end = False, behind
                    break
            is_zero = False
        at, count = end, CHUNK
    return max(start, min(at, tar.size)), None, is_zero


def _loss(archive: int, at: int, end: int, *, is_zero: bool, is_last: bool) -> str:
    """Return what is wrong with the bytes from `at` to `end`, which hold no header, or ""."""
    count = end - at
    if count >= _MAX_GAP:
        return f"{count} bytes from byte {at} on belong to no member, and the rest is not read"
    if not is_zero:
        return f"{count} bytes from byte {at} on belong to no member"
    if is_last and count < BLOCK:
        return "the end marker of the tar is missing"
    is_marker = count == 2 * BLOCK or (end - archive) % tarfile.RECORDSIZE == 0
    if count > _PADDING or (count and not is_last and not (count >= 2 * BLOCK and is_marker)):
        return f"{count} bytes from byte {at} on are zero, which is not the padding of a tar"
    return ""


def _info(block: bytes) -> tarfile.TarInfo | None:
    """Return what a header says, or None if it is invalid."""
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError, OverflowError):
        return None
    return info if 0 <= info.size <= _MAX_SIZE else None


def _read_header(tar: Tar, at: int) -> tuple[_Header | None, int]:
    """Return the header of the member at byte `at` with its extended headers, and their end.

    An invalid one is None, with the offset to continue at. `tarfile` is not used for extended
    headers: its time is quadratic in their size, and it calls itself for each of them.
    """
    start, extended = at, {}
    while True:
        tar.seek(at)
        block = tar.read(BLOCK)
        info = _info(block)
        if info is None:
            return None, max(at, start + BLOCK)
        at += BLOCK
        if info.type not in (_LONG_NAME, _LONG_LINK, *_PAX):
            break
        is_long = info.type in (_LONG_NAME, _LONG_LINK)
        if at + info.size - start > _MAX_EXTENDED or (is_long and info.name != _LONG):
            return None, at
        records = _records(info.type, tar.read(info.size), info.size)
        at += padded(info.size)
        if records is None:
            return None, at
        extended |= records
    is_extended = info.type == tarfile.GNUTYPE_SPARSE and block[482]
    while is_extended:
        tar.seek(at)
        block = tar.read(BLOCK)
        at += BLOCK
        if len(block) < BLOCK or at - start > _MAX_EXTENDED:
            return None, at
        is_extended = block[504]
    return _header(info, extended, at)


def _header(
    info: tarfile.TarInfo, extended: dict[str, bytes], offset: int
) -> tuple[_Header | None, int]:
    size = int(extended.get("size", info.size))
    if size > _MAX_SIZE:
        return None, offset
    short = info.name
    name = extended["path"].decode("utf-8", "surrogateescape") if "path" in extended else short
    has_data = info.isreg() or info.type not in tarfile.SUPPORTED_TYPES
    problem = _KINDS.get(info.type, "")
    if info.type == tarfile.GNUTYPE_SPARSE or "sparse" in extended:
        problem = "is stored as a sparse file, which is not supported"
    elif info.type not in tarfile.SUPPORTED_TYPES:
        problem = f"has the type {info.type!r}, which is not supported"
    end = offset + padded(size) if has_data else offset
    is_short = "path" not in extended and (
        "?" in short or len(short.encode("utf-8", "surrogateescape")) >= 99
    )
    return _Header(
        _shown(name.rstrip("/")), offset, size, end, info.isreg(), is_short, problem
    ), end


def _records(kind: bytes, content: bytes, size: int) -> dict[str, bytes] | None:
    """Return the path, the size and "sparse" as far as an extended header has them, or None.

    None stands for a malformed header, and for a global one that changes each member behind it.
    """
    if len(content) < size:
        return None
    if kind == _LONG_LINK:
        return {}
    if kind == _LONG_NAME:
        return {"path": content.partition(b"\0")[0]}
    records, at = {}, 0
    while at < size:
        length, _, _ = content[at : at + 20].partition(b" ")
        end = at + int(length) if length.isdigit() else size + 1
        key, equals, value = content[at + len(length) + 1 : end - 1].partition(b"=")
        if not equals or content[end - 1 : end] != b"\n":
            return None
        at = end
        if key == b"size" and not (value.isdigit() and len(value) < 20):
            return None
        if key in (b"path", b"size"):
            records[key.decode()] = value
        elif key.startswith(b"GNU.sparse."):
            records["sparse"] = value
            if key == b"GNU.sparse.name":
                records["path"] = value
    return None if kind == _GLOBAL and records else records


def _shown(name: str) -> str:
    """Return a name as printable Unicode, different for each name."""
    raw = name.replace("\\", "\\\\").encode("utf-8", "surrogateescape")
    text = raw.decode("utf-8", "backslashreplace")
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
