"""Bytes read and written, and operations: what the analytic model says of a launch."""

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
        """All bytes that cross the memory, read and written."""
        return sum(self.read.values()) + sum(self.written.values())


def together(*launches: Work) -> Work:
    """The work of launches that follow one another."""
    read, written = Counter(), Counter()
    for work in launches:
        read.update(work.read)
        written.update(work.written)
    return Work(dict(read), dict(written), sum(work.operations for work in launches))
