"""Bytes read and written, and operations, of a launch."""

from collections import Counter
from typing import NamedTuple

FP32 = INT32 = 4
INT64 = 8


class Work(NamedTuple):
    """Bytes read and written by tensor, and operations."""

    read: dict[str, int]
    written: dict[str, int]
    operations: int

    @property
    def bytes(self) -> int:
        """Return all bytes read and written."""
        return sum(self.read.values()) + sum(self.written.values())


def together(*launches: Work) -> Work:
    """Return the work of several launches in sequence."""
    read, written = Counter(), Counter()
    for work in launches:
        read.update(work.read)
        written.update(work.written)
    return Work(dict(read), dict(written), sum(work.operations for work in launches))
