"""WebDataset tar shards: an index of their samples, and a map-style source over it.

A sample is all members of a shard with the same name up to the last dot: an image, and its captions
in a .json ("captions" or "caption"), a .txt, or both. The index has one row per sample, in a table
that `datasets` caches and maps into memory. `tarfile` ends silently at a damaged header.
`index_rows` therefore checks that the rest of the file is padding, so that no sample is lost.
"""

import io
import json
import posixpath
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from datasets import Dataset, Features, List, Value
from datasets.exceptions import DatasetGenerationError

from elip_models.images import MAX_IMAGE_BYTES, SampleError, decode_image
from elip_models.pretraining.data.data_spec import path_list
from elip_models.pretraining.data.samples import Sample, check_index, clean_captions
from elip_models.pretraining.data.tar_members import members_of, open_tar

FORMAT = 5  # version of the rows
_EXAMPLES = 5
_IMAGES = ("jpeg", "jpg", "png", "webp")
_EXTENSIONS = (*_IMAGES, "json", "txt")
_MAX_PADDING = tarfile.RECORDSIZE + tarfile.BLOCKSIZE  # zeros that end a tar: filled to a record
_COLUMNS = {name: Value("string") for name in ("key", "problem")}
_COLUMNS |= {name: Value("int64") for name in ("shard", "offset", "size")}
_COLUMNS |= {"captions": List(Value("string"))}
_EMPTY = {"key": "", "offset": 0, "size": 0, "captions": [], "problem": ""}


class ShardSource:
    """A `Source` over uncompressed WebDataset shards. Its ids are "shard:key".

    A sample without an image, with a damaged image, or without a caption raises SampleError when it
    is read. The index is built once for these shards, and again if the path, size or time of one
    changes. The source works in forked and spawned worker processes.

    Raises:
        OSError: A shard is missing or cannot be read, or the index cannot be written.
        ValueError: A shard is damaged, not an uncompressed tar, or has no sample.
    """

    def __init__(self, paths: str | Path | Sequence[str | Path]) -> None:
        self._shards = path_list(paths)
        self._index = _read_index(self._shards)

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


def _read_index(shards: Sequence[Path]) -> Dataset:
    """Return the rows of all shards in order; their "shard" is the place in `shards`."""
    stats = [shard.stat() for shard in shards]
    # `datasets` finds the cached table by these values.
    states = [
        (number, str(shard.resolve()), FORMAT, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        for number, (shard, stat) in enumerate(zip(shards, stats, strict=True))
    ]
    try:
        index = Dataset.from_generator(
            _rows, features=Features(_COLUMNS), gen_kwargs={"shards": states}
        )
    except (DatasetGenerationError, OSError) as error:
        raise OSError(
            f"paths: the index of tar shards cannot be made: {error.__cause__ or error}; make the "
            "shards readable, or set HF_DATASETS_CACHE to a folder with space that can be written"
        ) from error
    damaged = np.flatnonzero(index.data.column("shard").to_numpy() < 0)
    if damaged.size:
        more = f" ({damaged.size} shards in all)" if damaged.size > _EXAMPLES else ""
        raise ValueError("; ".join(index[damaged[:_EXAMPLES]]["problem"]) + more)
    return index


def _rows(shards: Sequence[tuple[int, str, *tuple[int, ...]]]) -> Iterator[dict[str, Any]]:
    """Yield the rows of shards; a damaged one has a single row, with -1 in "shard"."""
    for number, path, *_ in shards:
        try:
            with open(path, "rb") as file:
                for row in index_rows(file, path):
                    yield row | {"shard": number}
        except ValueError as error:
            yield _EMPTY | {"problem": str(error), "shard": -1}


def index_rows(file: BinaryIO, name: str) -> Iterator[dict[str, Any]]:
    """Yield a row for each sample of an open tar, in order of first appearance.

    A row has the key of the sample, the offset and size of its image, its captions, and the
    problem: why the sample cannot be read, or "".

    Raises:
        ValueError: The tar is damaged or compressed, or has no sample. The message begins with
            `name`.
    """
    for key, members in _samples(file, name).items():
        row = _EMPTY | {"key": key}
        try:
            row["captions"] = _captions(members, file)
        except (ValueError, RecursionError) as error:
            row["problem"] = f"captions not readable: {error}"
        if "image" not in members:
            yield row | {"problem": "no image member"}
            continue
        image = members["image"][0]
        row |= {"offset": image.offset_data, "size": image.size}
        if any(len(copies) > 1 for copies in members.values()):
            row["problem"] = f"several images or captions are named {key}; rename all but one"
        elif not row["captions"] and not row["problem"]:
            row["problem"] = "no caption"
        yield row


def _samples(file: BinaryIO, name: str) -> dict[str, dict[str, list[tarfile.TarInfo]]]:
    """Return the members of each sample by key and kind: "image", "json" or "txt"."""
    samples: dict = defaultdict(lambda: defaultdict(list))
    end = file.seek(0)
    try:
        with open_tar(file, errors="backslashreplace") as tar:
            for member in members_of(tar):
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                key, _, extension = member.name.rpartition(".")
                extension = extension.lower()
                is_hidden = posixpath.basename(key)[:1] in ("", ".")
                if member.isfile() and extension in _EXTENSIONS and not is_hidden:
                    samples[key]["image" if extension in _IMAGES else extension].append(member)
        file.seek(end)
        padding = file.read(_MAX_PADDING + 1)
        if not tarfile.BLOCKSIZE <= len(padding) <= _MAX_PADDING or padding.strip(b"\0"):
            raise tarfile.ReadError(f"neither a header nor the end of a tar at byte {end}")
    except tarfile.TarError as error:
        raise ValueError(
            f"{name}: expected a complete, uncompressed tar, got a damaged or another file "
            f"({error}); remove it, or download or pack it again"
        ) from error
    if not samples:
        raise ValueError(f"{name}: expected members that end in {', '.join(_EXTENSIONS)}, got none")
    return samples


def _captions(members: Mapping[str, list[tarfile.TarInfo]], file: BinaryIO) -> list[str]:
    """Return the distinct captions of the .json, then of the .txt."""
    captions = []
    for kind in ("json", "txt"):
        for member in members.get(kind, []):
            file.seek(member.offset_data)
            content: Any = file.read(member.size)
            padding = file.read(-member.size % tarfile.BLOCKSIZE)
            if b"\0" in content or padding.strip(b"\0"):  # a block of the tar is lost
                raise ValueError(f"expected a text of {member.size} bytes, got other bytes")
            if kind == "json":
                content = json.loads(content)
                if not isinstance(content, dict):
                    raise ValueError(f"json: expected an object, got {content!r:.100}")
                content = content.get("captions") or content.get("caption")
            else:
                content = content.decode("utf-8-sig")
            captions += clean_captions(content)
    "".join(captions).encode()  # raises for an unpaired surrogate, which JSON can hold
    return list(dict.fromkeys(captions))


def read_sample(file: BinaryIO, shard: str, row: Mapping[str, Any]) -> Sample:
    """Read and decode the sample of a row of `index_rows` from its open tar.

    Raises:
        SampleError: The sample cannot be read.
    """
    sample_id = f"{shard}:{row['key']}"
    if row["problem"]:
        raise SampleError(sample_id, row["problem"])
    if row["size"] > MAX_IMAGE_BYTES:
        reason = f"expected an image of at most {MAX_IMAGE_BYTES} bytes, got {row['size']}"
        raise SampleError(sample_id, reason)
    file.seek(row["offset"])
    image = decode_image(io.BytesIO(file.read(row["size"])), sample_id)
    return Sample(image, tuple(row["captions"]), sample_id)
