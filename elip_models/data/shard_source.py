"""WebDataset tar shards, read as a map-style index: image members by offset."""

import io
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from elip_models.data.checks import check_index, existing_files
from elip_models.data.sample import Sample, SampleError, decode_image
from elip_models.data.shard_index import read_index

_MAX_OPEN_SHARDS = 64


class ShardSource:
    """A `Source` over uncompressed WebDataset shards.

    Members with one name up to the first dot are one sample: an image (png, jpg, jpeg or webp),
    and its captions in a .json ("captions" or "caption"), a .txt, or both. A sample's id is
    "shard:key". A sample without an image, with a damaged one, or without a caption is a
    SampleError when read, and so is everything that a damaged shard has lost: it has an index of
    its own, and is counted. The index of a large shard is built once, see `shard_index`. Safe in
    forked and spawned workers. Raises FileNotFoundError for a missing shard, ValueError for a file
    that is no tar.
    """

    def __init__(self, paths: str | Path | Sequence[str | Path]) -> None:
        self._shards = existing_files("paths", paths)
        self._index, self._ends = read_index(self._shards)
        self._files = _OpenFiles()

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Sample:
        check_index(index, len(self))
        row = self._index[index]
        shard = self._shards[bisect_right(self._ends, index)]
        sample_id = f"{shard.name}:{row['key']}"
        problem = row["problem"] or ("" if row["captions"] else "no caption")
        if problem:
            raise SampleError(sample_id, problem)
        try:
            data = self._files.read(shard, row["offset"], row["size"])
        except OSError as error:
            raise SampleError(sample_id, f"cannot read {shard}: {error}") from error
        image = decode_image(io.BytesIO(data), sample_id)
        return Sample(image, tuple(row["captions"]), sample_id)

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions alone, no image decoded. Empty where the sample has none."""
        check_index(index, len(self))
        return tuple(self._index[index]["captions"])


class _OpenFiles:
    """Read-only handles of this process, the least recently used closed first.

    A forked child shares file positions with its parent, so a handle is used only in the process
    that opened it; a pickled copy starts with none.
    """

    def __init__(self) -> None:
        self._handles: OrderedDict[tuple[int, Path], BinaryIO] = OrderedDict()

    def __reduce__(self) -> tuple[type["_OpenFiles"], tuple[()]]:
        return _OpenFiles, ()

    def read(self, path: Path, offset: int, size: int) -> bytes:
        key = (os.getpid(), path)
        handle = self._handles.pop(key, None) or path.open("rb")
        self._handles[key] = handle
        if len(self._handles) > _MAX_OPEN_SHARDS:
            self._handles.popitem(last=False)[1].close()
        handle.seek(offset)
        return handle.read(size)
