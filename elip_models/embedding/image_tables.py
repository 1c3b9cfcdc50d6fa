"""Images in tables: lists of paths, Parquet files with image bytes, folders of `datasets`."""

import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import UnionType
from typing import Any

import pyarrow
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from pyarrow import csv, parquet

from elip_models.embedding.image_source import (
    ImageSource,
    SourceOptions,
    as_key,
    check_columns,
    different_keys,
)
from elip_models.embedding.stored import Payload, Stored, Unavailable, local_or_none
from elip_models.pretraining.data.json_files import parse_entries
from elip_models.pretraining.data.streams import redacted
from elip_models.validation import ConfigError, require_extra, shortened

PATHS = ("image", "path", "file_name", "url")
"""Columns of a list that may have the paths, the first that is there."""
KEY = "key"
ROWS = 64  # of a Parquet file in memory at a time
ENTRIES = "a list of paths, or of objects with a path"


def list_source(
    files: AbstractFileSystem, path: str, shown: str, options: SourceOptions
) -> ImageSource:
    """Return the images of a list of paths, in JSON or CSV."""
    content = files.cat_file(path)
    if path.lower().endswith(".csv"):
        table = _read_csv(content, options)
    else:
        table = _table_of(parse_entries(content, shown, ENTRIES), shown)
    return _paths_source(files, [path], table, shown, options)


def _read_csv(content: bytes, options: SourceOptions) -> pyarrow.Table:
    """Return a table whose keys are texts, so that the key 007 does not become 7."""
    texts = {KEY, options.key_column or KEY}
    return csv.read_csv(
        pyarrow.BufferReader(content),
        parse_options=csv.ParseOptions(newlines_in_values=True),
        convert_options=csv.ConvertOptions(column_types=dict.fromkeys(texts, pyarrow.string())),
    )


def _table_of(entries: list[Any], shown: str) -> pyarrow.Table:
    """Return a table of the entries of a JSON list."""
    if all(isinstance(each, str) for each in entries):
        entries = [{PATHS[0]: each} for each in entries]
    for number, each in enumerate(entries):
        if not isinstance(each, dict):
            raise ValueError(f"{shown}[{number}]: expected {ENTRIES}, got {shortened(each)}")
    names = dict.fromkeys(name for each in entries for name in each)
    columns = {}
    for name in names:
        values = [each.get(name) for each in entries]
        if all(isinstance(each, str | None) for each in values):
            values = [None if each is None else as_key(each) for each in values]
        try:
            columns[as_key(name)] = pyarrow.array(values)
        except (pyarrow.ArrowException, OverflowError):  # a column of several types is not offered
            continue
    return pyarrow.table(columns)


def _paths_source(
    files: AbstractFileSystem,
    lists: Sequence[str],
    table: pyarrow.Table,
    shown: str,
    options: SourceOptions,
) -> ImageSource:
    """Return the images whose paths a table has; relative ones begin at the folder of the list."""
    column = options.image_column or next(
        (each for each in PATHS if each in table.schema.names), ""
    )
    check_columns([column or PATHS[0]], table.schema.names, "image_column")
    values = table[column].to_pylist()
    _check_values(values, str | None, f"image_column: expected paths in {column!r}")
    keys = _keys(table, options, ["" if each is None else each for each in values])
    folder = posixpath.dirname(lists[0])

    def payloads(start: int, stop: int) -> Iterator[Payload]:
        return (_stored(files, folder, value) for value in values[start:stop])

    kept = _kept(table, options)
    return ImageSource("list", shown, keys, payloads, kept, content=values)


def _stored(files: AbstractFileSystem, folder: str, path: str | None) -> Payload:
    if not path:
        return Unavailable("no path in the list")
    if "://" in path:
        try:
            other, path = url_to_fs(path)
        except (ImportError, ValueError) as error:
            return Unavailable(f"cannot be opened: {error!s:.300}")
        return Stored(path, local_or_none(other))
    return Stored(posixpath.join(folder, path), local_or_none(files))


def _keys(table: pyarrow.Table, options: SourceOptions, otherwise: Sequence[str]) -> Sequence[str]:
    """Return the key of each row: of the column of the options or KEY, or else the given ones."""
    column = options.key_column or (KEY if KEY in table.schema.names else None)
    if column is None:
        return different_keys([as_key(each) for each in otherwise], options.on_duplicate)
    check_columns([column], table.schema.names, "key_column")
    values = table[column].to_pylist()
    _check_values(values, str | int, f"key_column: expected texts or integers in {column!r}")
    return different_keys([as_key(each) for each in values], options.on_duplicate)


def _check_values(values: Sequence[Any], kind: UnionType, expected: str) -> None:
    for number, value in enumerate(values):
        if not isinstance(value, kind):
            raise ConfigError(f"{expected}, got {shortened(value)} in row {number}")


def _kept(table: pyarrow.Table, options: SourceOptions) -> pyarrow.Table | None:
    check_columns(options.keep_columns, table.schema.names, "keep_columns")
    return table.select(options.keep_columns) if options.keep_columns else None


def parquet_source(
    files: AbstractFileSystem, paths: Sequence[str], shown: str, options: SourceOptions
) -> ImageSource:
    """Return the images of Parquet files, which have their bytes or their paths."""
    with files.open(paths[0], "rb") as file:
        schema = parquet.ParquetFile(file).schema_arrow
    column = options.image_column or _image_column(schema)
    check_columns([column], schema.names, "image_column")
    _check_others(options, schema.names)
    is_list = _is_text(schema.field(column).type)
    wanted = {options.key_column, *options.keep_columns, KEY, *([column] if is_list else ())}
    names = [name for name in schema.names if name in wanted]
    table = pyarrow.concat_tables(_read(files, path, names) for path in paths)
    if is_list:
        found = replace(options, image_column=column)
        return _paths_source(files, paths, table, shown, found)
    counts = [_rows(files, path, column) for path in paths]
    keys = _keys(table, options, [str(i) for i in range(sum(counts))])

    def payloads(start: int, stop: int) -> Iterator[Payload]:
        first = 0
        for path, count in zip(paths, counts, strict=True):
            yield from _payloads(files, path, column, start - first, stop - first, count)
            first += count

    kept = _kept(table, options)
    sizes = [*counts, *map(files.size, paths)]
    return ImageSource("parquet", shown, keys, payloads, kept, sizes, random_access=False)


def _check_others(options: SourceOptions, names: Sequence[str]) -> None:
    """Raise ConfigError if the columns of keys, or those to keep, are not among the names."""
    if options.key_column is not None:
        check_columns([options.key_column], names, "key_column")
    check_columns(options.keep_columns, names, "keep_columns")


def _image_column(schema: pyarrow.Schema) -> str:
    """Return the column of image bytes or, if there is none, that of paths."""
    for kind in (_has_bytes, lambda each: _is_bytes(each.type)):
        for each in schema:
            if kind(each):
                return each.name
    return next((name for name in PATHS if name in schema.names), PATHS[0])


def _has_bytes(each: pyarrow.Field) -> bool:
    """Return whether a column is of the type `Image` of `datasets`."""
    kind = each.type
    return pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0


def _is_bytes(kind: pyarrow.DataType) -> bool:
    return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)


def _is_text(kind: pyarrow.DataType) -> bool:
    return pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)


def _read(files: AbstractFileSystem, path: str, names: Sequence[str]) -> pyarrow.Table:
    with files.open(path, "rb") as file:
        return parquet.read_table(file, columns=list(names))


def _rows(files: AbstractFileSystem, path: str, column: str) -> int:
    """Return the number of rows of a file; raise ValueError if it lacks the column of images."""
    with files.open(path, "rb") as file:
        opened = parquet.ParquetFile(file)
        if column not in opened.schema_arrow.names:
            names = ", ".join(opened.schema_arrow.names)
            raise ValueError(f"{redacted(path)}: expected a column {column!r}, got {names}")
        return opened.metadata.num_rows


def _payloads(
    files: AbstractFileSystem, path: str, column: str, start: int, stop: int, count: int
) -> Iterator[Payload]:
    """Yield the images of rows of one file; row groups before the first one are not read."""
    if start >= count or stop <= 0:
        return
    try:
        with files.open(path, "rb") as file:
            opened = parquet.ParquetFile(file)
            groups, row = _row_groups(opened.metadata, start, stop)
            for batch in opened.iter_batches(ROWS, row_groups=groups, columns=[column]):
                for value in batch.column(0):
                    if start <= row < stop:
                        yield _payload(files, path, value.as_py())
                    row += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(
            f"source: expected whole Parquet files, got {shortened(redacted(path))}: {error!s:.300}"
        ) from error


def _row_groups(metadata: parquet.FileMetaData, start: int, stop: int) -> tuple[list[int], int]:
    """Return the row groups with rows from `start` to `stop`, and the first row of the first."""
    groups, first, row = [], 0, 0
    for group in range(metadata.num_row_groups):
        end = row + metadata.row_group(group).num_rows
        if end > start and row < stop:
            first = first if groups else row
            groups.append(group)
        row = end
    return groups, first


def _payload(files: AbstractFileSystem, path: str, value: Any) -> Payload:
    """Return the image of a cell: bytes, or the bytes or the path of `datasets`."""
    if isinstance(value, dict):
        if value.get("bytes") is None and value.get("path"):
            return _stored(files, posixpath.dirname(path), value["path"])
        value = value.get("bytes")
    return Unavailable("no image in the row") if value is None else value


def datasets_source(
    files: AbstractFileSystem, folder: str, shown: str, options: SourceOptions
) -> ImageSource:
    """Return the images of a folder that `save_to_disk` of `datasets` wrote."""
    with require_extra("embed"):
        import datasets

    url = folder if local_or_none(files) is None else files.unstrip_protocol(folder)
    dataset = datasets.load_from_disk(url)
    if isinstance(dataset, datasets.DatasetDict):
        splits = ", ".join(f"{shown}/{name}" for name in dataset)
        raise ConfigError(f"source: expected one split, {splits}, got {shortened(shown)}")
    features = dataset.features
    images = [name for name, each in features.items() if isinstance(each, datasets.Image)]
    column = options.image_column or next(iter(images), "")
    if column not in images:
        raise ConfigError(
            f"image_column: expected a column of type Image, one of {', '.join(images) or 'none'}, "
            f"got {shortened(column or ', '.join(features))}"
        )
    others = [name for name in features if name != column]
    _check_others(options, others)
    wanted = {options.key_column, KEY, *options.keep_columns}
    names = [name for name in others if name in wanted]
    table = dataset.select_columns(names).with_format("arrow")[:] if names else pyarrow.table({})
    keys = _keys(table, options, [str(i) for i in range(len(dataset))])
    stored = dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False))

    def payloads(start: int, stop: int) -> Iterator[Payload]:
        return (_payload(files, f"{folder}/", stored[i][column]) for i in range(start, stop))

    state = files.cat_file(f"{folder}/state.json").decode()  # its fingerprint differs by content
    return ImageSource("datasets", shown, keys, payloads, _kept(table, options), [state])
