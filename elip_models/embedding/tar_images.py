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
from elip_models.pretraining.data.shard_index import NO_CAPTION, index_rows, read_index
from elip_models.pretraining.data.streams import redacted
from elip_models.validation import ConfigError, as_config_error

COLUMNS = ("captions",)


def tar_source(
    files: AbstractFileSystem, paths: Sequence[str], shown: str, options: SourceOptions
) -> ImageSource:
    """Return the images of tar files. Raises ConfigError if one is damaged."""
    for argument in ("image_column", "key_column"):
        if getattr(options, argument) is not None:
            raise ConfigError(f"{argument}: expected none for tar files, got one")
    check_columns(options.keep_columns, COLUMNS, "keep_columns")
    with as_config_error("source"):
        table = _index(files, paths)
    names, problems = table["key"].to_pylist(), table["problem"].to_pylist()
    problems = ["" if each == NO_CAPTION else each for each in problems]
    places = list(zip(table["offset"].to_pylist(), table["size"].to_pylist(), strict=True))
    archive = [paths[number] for number in table["shard"].to_pylist()]
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


def _index(files: AbstractFileSystem, paths: Sequence[str]) -> pyarrow.Table:
    """Return the rows of all archives; "shard" is the place of the archive in `paths`."""
    if local_or_none(files) is None:
        return read_index([Path(path) for path in paths]).with_format("arrow")[:]
    rows = []
    for number, path in enumerate(paths):
        with files.open(path, "rb") as file:
            rows += [row | {"shard": number} for row in index_rows(file, redacted(path))]
    text, whole = pyarrow.string(), pyarrow.int64()
    kinds = {"key": text, "shard": whole, "offset": whole, "size": whole}
    kinds |= {"captions": pyarrow.list_(text), "problem": text}
    return pyarrow.Table.from_pylist(rows, schema=pyarrow.schema(kinds))
