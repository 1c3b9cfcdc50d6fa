"""Index of tar shards: one row per sample, in a table that `datasets` caches and maps into memory.

A sample is all members of a shard with the same name up to the last dot: an image, and its captions
in a .json ("captions" or "caption"), a .txt, or both. `tarfile` ends silently at a damaged header.
`index_rows` therefore checks that the rest of the file is padding, so that no sample is lost.
"""

import json
import os
import posixpath
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from elip_models.pretraining.data.sample import clean_captions
from elip_models.validation import check_text, require_extra

if TYPE_CHECKING:
    from datasets import Dataset

FORMAT = 5  # version of the rows
MIN_PARALLEL_BYTES = 2**30  # of all shards, from which on several processes index them
NO_CAPTION = "no caption"
"""The problem of a sample with an image that can be read."""
_EXAMPLES = 5
_IMAGES = ("jpeg", "jpg", "png", "webp")
_EXTENSIONS = (*_IMAGES, "json", "txt")
_MAX_PADDING = tarfile.RECORDSIZE + tarfile.BLOCKSIZE  # zeros that end a tar: filled to a record


def read_index(shards: Sequence[Path]) -> "Dataset":
    """Return the rows of all shards in order, see `index_rows`; "shard" is the place in `shards`.

    The table is built once for these shards, and again if the path, size or time of one changes.

    Raises:
        ValueError: Shards are damaged, not uncompressed tars, or have no sample.
        OSError: A shard cannot be read, or the table cannot be written.
    """
    with require_extra("ShardSource"):
        from datasets import Dataset, Features, List, Value
        from datasets.exceptions import DatasetGenerationError

    stats = [shard.stat() for shard in shards]
    is_large = sum(stat.st_size for stat in stats) >= MIN_PARALLEL_BYTES
    # `datasets` finds the cached table by these values.
    states = [
        (number, str(shard.resolve()), FORMAT, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        for number, (shard, stat) in enumerate(zip(shards, stats, strict=True))
    ]
    columns = {name: Value("string") for name in ("key", "problem")}
    columns |= {name: Value("int64") for name in ("shard", "offset", "size")}
    try:
        index = Dataset.from_generator(
            _rows,
            features=Features(columns | {"captions": List(Value("string"))}),
            gen_kwargs={"shards": states},
            num_proc=min(len(shards), os.cpu_count() or 1) if is_large else None,
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
            yield _row("", problem=str(error)) | {"shard": -1}


def _row(key: str, offset: int = 0, size: int = 0, problem: str = "") -> dict[str, Any]:
    return {"key": key, "offset": offset, "size": size, "captions": [], "problem": problem}


def index_rows(file: BinaryIO, name: str) -> Iterator[dict[str, Any]]:
    """Yield a row for each sample of an open tar, in order of first appearance.

    A row has the key of the sample, the offset and size of its image, its captions, and the
    problem: why the sample cannot be read, or "".

    Raises:
        ValueError: The tar is damaged or compressed, or has no sample. The message begins with
            `name`.
    """
    for key, members in _samples(file, name).items():
        image = members.get("image", [])
        row = _row(key, image[0].offset_data, image[0].size) if image else _row(key)
        try:
            row["captions"] = _captions(members, file)
        except (ValueError, RecursionError) as error:
            row["problem"] = f"captions not readable: {error}"
        if not image:
            row["problem"] = "no image member"
        elif any(len(copies) > 1 for copies in members.values()):
            row["problem"] = f"several images or captions are named {key}; rename all but one"
        elif not row["captions"] and not row["problem"]:
            row["problem"] = NO_CAPTION
        yield row


def _samples(file: BinaryIO, name: str) -> dict[str, dict[str, list[tarfile.TarInfo]]]:
    """Return the members of each sample by key and kind: "image", "json" or "txt"."""
    samples: dict = defaultdict(lambda: defaultdict(list))
    end = file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:", errors="backslashreplace") as tar:
            for member in tar:
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
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise ValueError(
            f"{name}: expected a complete, uncompressed tar, got a damaged or another file "
            f"({error}); remove it, or download or pack it again"
        ) from error
    if not samples:
        raise ValueError(f"{name}: expected members that end in {', '.join(_EXTENSIONS)}, got none")
    return samples


def _captions(members: dict[str, list[tarfile.TarInfo]], file: BinaryIO) -> list[str]:
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
    check_text("caption", *captions)
    return list(dict.fromkeys(captions))
