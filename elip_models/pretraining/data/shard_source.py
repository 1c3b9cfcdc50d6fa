"""WebDataset tar shards as a map-style source, which reads images by their offset."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from elip_models.images import SampleError, decode_image
from elip_models.pretraining.data.checks import check_index, existing_files
from elip_models.pretraining.data.sample import Sample
from elip_models.pretraining.data.shard_index import read_index


class ShardSource:
    """A `Source` over uncompressed WebDataset shards, see `shard_index`. Its ids are "shard:key".

    A sample without an image, with a damaged image, or without a caption raises SampleError when it
    is read. The source works in forked and spawned worker processes.

    Raises:
        FileNotFoundError: A shard is missing.
        ValueError: A shard is damaged, not an uncompressed tar, or has no sample.
    """

    def __init__(self, paths: str | Path | Sequence[str | Path]) -> None:
        self._shards = existing_files("paths", paths)
        self._index = read_index(self._shards)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Sample:
        check_index(index, len(self))
        row = self._index[index]
        shard = self._shards[row["shard"]]
        try:
            with shard.open("rb") as file:
                return read_sample(file, shard.name, row)
        except OSError as error:
            raise SampleError(f"{shard.name}:{row['key']}", f"cannot read it: {error}") from error

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the captions without decoding the image; empty if the sample has none."""
        check_index(index, len(self))
        return tuple(self._index[index]["captions"])


def read_sample(file: BinaryIO, shard: str, row: Mapping[str, Any]) -> Sample:
    """Read and decode the sample of a row of `index_rows` from its open tar.

    Raises:
        SampleError: The sample cannot be read.
    """
    sample_id = f"{shard}:{row['key']}"
    if row["problem"]:
        raise SampleError(sample_id, row["problem"])
    file.seek(row["offset"])
    image = decode_image(io.BytesIO(file.read(row["size"])), sample_id)
    return Sample(image, tuple(row["captions"]), sample_id)
