"""The members of a tar file, read in one pass that ends for every file.

    with open_tar(file) as tar:
        for member in members_of(tar):
            ...

`tarfile` of some releases of Python does not end at a header of negative size (CVE-2025-8194), nor
in reasonable time at an extended header with many digits (CVE-2024-6232).
"""

import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, Self

MAX_EXTENDED = 2**20  # bytes of an extended header, which has a long name and the like
_PAX = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_EXTENDED = (*_PAX, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_TYPE = slice(156, 157)  # of a header
_RECORD = re.compile(rb"(\d{1,7}) [^=\n]{1,1000}=")
_MANY_DIGITS = re.compile(rb"\d{300}")


class _Member(tarfile.TarInfo):
    """A member whose extended headers are checked before `tarfile` reads them."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Self:
        """Read the next member, with the headers that extend it."""
        file = tar.fileobj
        start = file.tell()
        block = file.read(tarfile.BLOCKSIZE)
        if block[_TYPE] in _EXTENDED:
            header = cls.frombuf(block, tar.encoding, tar.errors)
            _check_extended(header, tar, start)
        file.seek(start)
        return super().fromtarfile(tar)


def _check_extended(header: tarfile.TarInfo, tar: tarfile.TarFile, start: int) -> None:
    """Raise ReadError for an extended header that is too long, or not what its type has."""
    is_read = 0 <= header.size <= MAX_EXTENDED
    if not is_read or (header.type in _PAX and not _is_pax(tar.fileobj.read(header.size))):
        raise tarfile.ReadError(
            f"expected an extended header of at most {MAX_EXTENDED} bytes at byte {start}, got one "
            f"of {header.size} bytes that is damaged or too long"
        )


def _is_pax(content: bytes) -> bool:
    """Return whether the content of a header is a sequence of records `LENGTH KEY=VALUE`."""
    start = 0
    while start < len(content):
        record = _RECORD.match(content, start)
        end = start + int(record[1]) if record else 0
        if record is None or record.end() >= end or content[end - 1 : end] != b"\n":
            return False
        start = end
    return not _MANY_DIGITS.search(content)


@contextmanager
def _tar_errors() -> Iterator[None]:
    """Turn the other errors of `tarfile` about damaged headers into those that it documents."""
    try:
        yield
    except (ValueError, OverflowError, IndexError, RecursionError) as error:
        raise tarfile.ReadError(f"damaged header: {error}") from error


def open_tar(file: BinaryIO, *, errors: str = "surrogateescape") -> tarfile.TarFile:
    """Open an uncompressed tar for `members_of`; raise `tarfile.TarError` for another file.

    `errors` is the handler of names that are not UTF-8.
    """
    with _tar_errors():
        return tarfile.open(fileobj=file, mode="r:", tarinfo=_Member, errors=errors)


def members_of(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the members; raise `tarfile.TarError` at a damaged header."""
    end = -1
    with _tar_errors():
        for member in tar:
            if member.size < 0 or tar.offset <= end:
                raise tarfile.ReadError(
                    f"expected a size of at least 0 in the header at byte {member.offset}, got "
                    f"{member.size}"
                )
            end = tar.offset
            yield member
