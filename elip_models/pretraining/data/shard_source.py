"""WebDataset tar shards as a map-style source, which reads images by their offset."""

import io
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from elip_models.images import SampleError, decode_image
from elip_models.pretraining.data.checks import check_index, existing_files
from elip_models.pretraining.data.sample import Sample
from elip_models.pretraining.data.shard_index import read_index
from elip_models.pretraining.data.tar_samples import size_problem

_MAX_OPEN_SHARDS = 64


class ShardSource:
    """A `Source` over uncompressed WebDataset shards.

    Members with the same name up to the dot form one sample. It has an image (png, jpg, jpeg
    or webp), and captions in a .json ("captions" or "caption"), a .txt, or both. Its id is
    "shard:key".

    A sample without an image, with a damaged image, or without a caption raises SampleError when it
    is read. Each lost part of a damaged shard has an index of its own and raises SampleError too.
    The index of a large shard is built once, see `shard_index`. The source works in forked and
    spawned worker processes.

    Raises:
        FileNotFoundError: A shard is missing.
        ValueError: A file is not a tar file.
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
        if problem := size_problem("the image", data):
            raise SampleError(sample_id, problem)
        image = decode_image(io.BytesIO(data), sample_id)
        return Sample(image, tuple(row["captions"]), sample_id)

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the captions without decoding the image; empty if the sample has none."""
        check_index(index, len(self))
        return tuple(self._index[index]["captions"])


class _OpenFiles:
    """Open shards of this process; the least recently used file is closed first.

    A forked child shares file positions with its parent. A file is therefore used only in the
    process that opened it, and a pickled copy starts empty.
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
