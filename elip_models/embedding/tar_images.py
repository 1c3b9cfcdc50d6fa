"""Images in tar files, as WebDataset has them: members with one name up to the dot."""

import posixpath
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow
from fsspec import AbstractFileSystem

from elip_models.embedding.image_source import (
    ImageSource,
    SourceOptions,
    as_key,
    check_columns,
    different_keys,
)
from elip_models.embedding.stored import Payload, Stored, Unavailable, local_or_none
from elip_models.pretraining.data.shard_index import index_rows, read_index
from elip_models.pretraining.data.streams import redacted
from elip_models.validation import ConfigError

NO_CAPTION = "no caption"
"""The problem of a sample that an embedding does not need."""
COLUMNS = ("captions",)


def tar_source(
    files: AbstractFileSystem, paths: Sequence[str], shown: str, options: SourceOptions
) -> ImageSource:
    """Return the images of tar files; each lost part of a damaged file is one that is skipped."""
    for argument in ("image_column", "key_column"):
        if getattr(options, argument) is not None:
            raise ConfigError(f"{argument}: expected none for tar files, got one")
    check_columns(options.keep_columns, COLUMNS, "keep_columns")
    table, ends = _index(files, paths)
    names, problems = table["key"].to_pylist(), table["problem"].to_pylist()
    problems = ["" if each == NO_CAPTION else each for each in problems]
    places = list(zip(table["offset"].to_pylist(), table["size"].to_pylist(), strict=True))
    archive = [path for path, start, end in _spans(paths, ends) for _ in range(start, end)]
    keys = [
        as_key(f"{posixpath.basename(path)}:{name}")
        for path, name in zip(archive, names, strict=True)
    ]
    readable = [i for i, problem in enumerate(problems) if not problem]
    different = different_keys([keys[i] for i in readable], options.on_duplicate)
    for i, key in zip(readable, different, strict=True):
        keys[i] = key
    own = local_or_none(files)

    def payloads(start: int, stop: int) -> Iterator[Payload]:
        for i in range(start, stop):
            yield Unavailable(problems[i]) if problems[i] else Stored(archive[i], own, *places[i])

    columns = table.select(options.keep_columns) if options.keep_columns else None
    return ImageSource("tar", shown, keys, payloads, columns, content=places)


def _spans(paths: Sequence[str], ends: Sequence[int]) -> Iterator[tuple[str, int, int]]:
    """Yield each archive, with its first row and the row behind its last one."""
    return zip(paths, (0, *ends[:-1]), ends, strict=True)


def _index(files: AbstractFileSystem, paths: Sequence[str]) -> tuple[pyarrow.Table, list[int]]:
    """Return the rows of all archives, and the end row of each."""
    if local_or_none(files) is None:
        rows, ends = read_index([Path(path) for path in paths])
        return rows.with_format("arrow")[:], ends
    rows, ends = [], []
    for path in paths:
        with files.open(path, "rb") as file:
            rows += index_rows(file, files.size(path), redacted(path))
        ends.append(len(rows))
    text, whole = pyarrow.string(), pyarrow.int64()
    kinds = {"key": text, "offset": whole, "size": whole}
    kinds |= {"captions": pyarrow.list_(text), "problem": text}
    return pyarrow.Table.from_pylist(rows, schema=pyarrow.schema(kinds)), ends
