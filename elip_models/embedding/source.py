"""The images of a collection, in a fixed order, each with a key.

    source = open_images("photographs")
    source.keys[0], read_payload(next(source.payloads(0, 1)))

    photographs, s3://bucket/photographs    a folder of images
    train-{0000..0099}.tar, train-*.tar     tar files, or a folder of them
    list.json, .jsonl, .csv                 paths or URLs of images
    train-*.parquet                         bytes or paths of images, or a folder of such files
    dataset                                 a folder that `save_to_disk` of `datasets` wrote

fsspec opens every path, so that each may be a URL. The images are listed when a source is opened,
and read later, in worker processes.
"""

import hashlib
import json
import os
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain
from typing import Any, NamedTuple

import datasets
import pyarrow
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from pyarrow import csv, parquet
from pyarrow import dataset as arrow_dataset

from elip_models.images import IMAGE_ENDINGS, MAX_IMAGE_BYTES, SampleError
from elip_models.pretraining.data.data_spec import expand_ranges
from elip_models.pretraining.data.remote_files import files_of, reason_of
from elip_models.pretraining.data.tar_members import members_of, open_tar
from elip_models.saving.meta_build import LIBRARY_ERRORS
from elip_models.validation import ConfigError

PATHS = ("image", "path", "file_name", "url")
"""Columns that may have the paths of images, the first that is there."""
KEY = "key"
OUTPUT_COLUMNS = {KEY, "embedding", "sha256"}
DATASETS = ("dataset_info.json", "dataset_dict.json")
"""One of them is in a folder that `save_to_disk` wrote."""
NO_COLUMNS = pyarrow.table({})
BATCH = 64  # images of a Parquet file in memory at a time
READ_BYTES = 1 << 20  # of a Parquet file at a time
EXPECTED = (
    "a folder of images, .tar files, .parquet files, a list of paths (.json, .jsonl, .csv), or a "
    "folder of save_to_disk of datasets"
)


class Stored(NamedTuple):
    """The bytes of an image in a file of a file system; `size` None is the whole file."""

    files: AbstractFileSystem
    path: str
    offset: int = 0
    size: int | None = None

    def read(self) -> bytes:
        """Return the bytes, at most one more than an image may have."""
        size = MAX_IMAGE_BYTES + 1 if self.size is None else self.size
        with self.files.open(self.path, "rb") as file:
            file.seek(self.offset)
            content = file.read(size)
        if self.size is not None and len(content) != size:
            raise OSError(f"expected {size} bytes, got {len(content)}")
        return content


Payload = bytes | Stored | SampleError
"""The bytes of an image, where they are, or why there are none."""


def read_payload(payload: Payload) -> bytes:
    """Return the bytes of an image; raise SampleError with the reason if there are none."""
    if isinstance(payload, SampleError):
        raise payload
    try:
        content = payload if isinstance(payload, bytes) else payload.read()
    except Exception as error:  # libraries of file systems raise errors of any type
        reason = reason_of(error)
        if isinstance(payload, Stored):  # fsspec names the URL
            reason = reason.replace(payload.path, without_secrets(payload.path))
        raise SampleError("", f"cannot be read: {reason:.300}") from error
    if not 0 < len(content) <= MAX_IMAGE_BYTES:
        reason = f"expected at most {MAX_IMAGE_BYTES} bytes, got more" if content else "empty file"
        raise SampleError("", reason)
    return content


@dataclass(frozen=True)
class ImageSource:
    """The images of a collection.

    Attributes:
        kind: 'folder', 'tar', 'list', 'parquet' or 'datasets'.
        keys: the name of each image.
        payloads: function of the first row and the row behind the last one, which yields the
            images in between.
        content: what identifies the images beside their keys, such as the sizes of files.
        columns: the columns to keep, with one row for each image.
        location: path or URL, without passwords and tokens.
    """

    kind: str
    keys: Sequence[str]
    payloads: Callable[[int, int], Iterator[Payload]]
    content: Sequence[Any] = ()
    columns: pyarrow.Table = field(default_factory=lambda: NO_COLUMNS)
    location: str = ""

    def __len__(self) -> int:
        return len(self.keys)

    def described(self) -> dict[str, Any]:
        """Return what the manifest stores, with a SHA-256 of keys, content and columns."""
        digest = hashlib.sha256(self.kind.encode())
        table = self.columns
        kept = (str(cell) for column in table.columns for cell in column)
        for text in chain(self.keys, map(str, self.content), table.column_names, kept):
            digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
        named = {"location": self.location, "kind": self.kind}
        return named | {"found": len(self), "sha256": digest.hexdigest()}

    def sample(self, count: int, parts: int = 8) -> Iterator[tuple[int, Payload]]:
        """Yield up to `count` images with their rows, in evenly spaced parts of the source."""
        count = min(count, len(self))
        for part in range(parts):
            start = part * len(self) // parts
            stop = start + (part + 1) * count // parts - part * count // parts
            yield from zip(range(start, stop), self.payloads(start, stop), strict=True)


def _has_images(kind: pyarrow.DataType) -> bool:
    """Return whether cells are bytes, or bytes and a path as `datasets` has them."""
    if pyarrow.types.is_struct(kind):
        return kind.num_fields > 0 and {field.name for field in kind} <= {"bytes", "path"}
    return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)


class Columns(NamedTuple):
    """The column of images, that of keys, and those to keep, as arguments of `open_images`."""

    image: str | None
    key: str | None
    keep: list[str]

    def image_in(self, schema: pyarrow.Schema) -> str:
        """Return the column of images: of `datasets` or bytes or, if there is none, of paths."""
        if self.image is not None:
            return self.image
        found = [column.name for column in schema if _has_images(column.type)]
        if len(found) == 1:
            return found[0]
        for name in PATHS:
            if name in (found or schema.names):
                return name
        got = ", ".join(found or schema.names)
        raise ValueError(
            f"expected one column of images, or one named {', '.join(PATHS)}, got {got}; name the "
            "column by image_column, which is --image-column"
        )

    def key_in(self, names: Sequence[str]) -> str | None:
        """Return the column of keys, if there is one."""
        return self.key or (KEY if KEY in names else None)

    def others_in(self, names: Sequence[str]) -> list[str]:
        """Return the column of keys, if there is one, and those to keep."""
        return [*dict.fromkeys(filter(None, [self.key_in(names), *self.keep]))]


def open_images(
    source: str | os.PathLike,
    *,
    image_column: str | None = None,
    key_column: str | None = None,
    keep_columns: Sequence[str] = (),
) -> ImageSource:
    """List the images of a source.

    Args:
        source: path or URL, of one of the kinds in the header of this file.
        image_column: the column of the images, or of their paths. None: by its type or name.
        key_column: the column of the keys. None: `key` if there is one.
        keep_columns: columns that are copied into the output.

    Raises:
        ConfigError: there is no such source, it has no image, it cannot be listed, or an option
            does not fit it.
    """
    columns = Columns(image_column, key_column, list(keep_columns))
    if used := sorted(OUTPUT_COLUMNS & {*keep_columns}):
        raise ConfigError(
            f"keep_columns: expected other names than those of the output, got {', '.join(used)}; "
            "rename them in the source"
        )
    location = os.path.expanduser(os.fspath(source))
    shown = without_secrets(location)
    try:
        listed = _listed(location, columns)
        keys, key = listed.keys, columns.key_in(listed.columns.column_names)
        if key is not None:
            keys = listed.columns[key].to_pylist()
        kept = listed.columns.select(columns.keep)
    except ConfigError:
        raise
    except (OSError, tarfile.TarError, *LIBRARY_ERRORS) as error:
        reason = " ".join(reason_of(error).replace(location, shown).split())
        raise ConfigError(f"source: expected {EXPECTED}, got {shown}: {reason:.300}") from error
    if not keys:
        raise ConfigError(f"source: expected at least one image, got none in {shown}")
    keys = [str(key).encode("utf-8", "backslashreplace").decode() for key in keys]
    if len(set(keys)) < len(keys):
        repeated, count = Counter(keys).most_common(1)[0]
        raise ConfigError(
            f"source: expected a different key for each image, got {repeated!r:.200} {count} "
            "times; name a column of other keys, or remove the further images"
        )
    return replace(listed, keys=keys, columns=kept, location=shown)


def _listed(location: str, columns: Columns) -> ImageSource:
    files, path = files_of(location)
    is_pattern = ("*" in path or "{" in path) and not files.exists(path)
    # a web server has no folders: `isdir` would read the file
    is_web = re.search("https?://", location) is not None
    is_folder = not (is_web or is_pattern) and files.isdir(path)
    if is_folder or not (_ending(path) in READERS or is_pattern):
        return _listed_folder(files, path, columns)
    paths: list[str] = []
    for name in expand_ranges(location) if is_pattern else [location]:
        paths += sorted(files.glob(name)) if "*" in name else [files_of(name)[1]]
    endings = {_ending(path) for path in paths}
    if len(endings) != 1 or not endings <= READERS.keys():
        raise ValueError(f"expected files with one ending, got {len(paths)} files")
    return READERS[endings.pop()](files, paths, columns)


def _listed_folder(files: AbstractFileSystem, folder: str, columns: Columns) -> ImageSource:
    if not files.isdir(folder):
        raise FileNotFoundError(f"no such folder; the working folder is {os.getcwd()}")
    if any(files.exists(f"{folder}/{name}") for name in DATASETS):
        return _datasets_folder(files, folder, columns)
    sizes = {path: info.get("size") for path, info in files.find(folder, detail=True).items()}
    kinds = {"tar files": ".tar", "Parquet files": ".parquet", "images": IMAGE_ENDINGS}
    matching = {
        kind: [path for path in sorted(sizes) if path.lower().endswith(ending)]
        for kind, ending in kinds.items()
    }
    present = [kind for kind, paths in matching.items() if paths]
    if len(present) > 1:
        raise ValueError(
            f"expected files of one kind, got {' and '.join(present)}; name the files, such as "
            f"{folder}/*{kinds[present[0]]}, or move the others"
        )
    if present and present != ["images"]:
        return READERS[kinds[present[0]]](files, matching[present[0]], columns)
    paths = matching["images"]
    names = [path.removeprefix(folder).lstrip("/") for path in paths]
    payloads = [Stored(files, path) for path in paths]
    return ImageSource("folder", names, _in_memory(payloads), [sizes[path] for path in paths])


def _in_memory(payloads: Sequence[Payload]) -> Callable[[int, int], Iterator[Payload]]:
    return lambda start, stop: iter(payloads[start:stop])


def _tars(files: AbstractFileSystem, paths: Sequence[str], _: Columns) -> ImageSource:
    images: list[tuple[str, Payload]] = []
    for path in paths:
        try:
            images += _images_in_tar(files, path)
        except tarfile.TarError as error:
            raise ValueError(
                f"{without_secrets(path)} is no tar file ({error}); remove it, or download or pack "
                "it again"
            ) from error
    keys, payloads = zip(*images, strict=True) if images else ((), ())
    places = [payload[2:] for payload in payloads if isinstance(payload, Stored)]
    return ImageSource("tar", keys, _in_memory(payloads), places)


def _images_in_tar(files: AbstractFileSystem, path: str) -> Iterator[tuple[str, Payload]]:
    """Yield key and place of an image for each name up to the dot, as WebDataset has them.

    The part behind a damaged byte is one image that cannot be read. `tarfile` itself ends without
    an error at a damaged header; therefore what follows its last member has to be zeros.
    """
    archive, last = posixpath.basename(without_secrets(path)), None
    end, problem = 0, ""
    with files.open(path, "rb") as file, open_tar(file) as tar:
        try:
            for member in members_of(tar):
                end = tar.offset
                folder, name = posixpath.split(member.name)
                sample = posixpath.join(folder, name.partition(".")[0])
                if member.isfile() and _ending(name) in IMAGE_ENDINGS and sample != last:
                    last = sample
                    place = Stored(files, path, member.offset_data, member.size)
                    yield f"{archive}:{sample}", place
        except tarfile.TarError as error:
            problem = str(error)
        file.seek(end)
        if not problem and file.read(tarfile.BLOCKSIZE).strip(b"\0"):
            problem = "expected a header or zeros"
        if problem:
            reason = f"the tar file is damaged from byte {end}: {problem}"
            yield f"{archive}:byte {end}", SampleError("", reason)


def _list(files: AbstractFileSystem, paths: Sequence[str], columns: Columns) -> ImageSource:
    if len(paths) > 1:
        raise ValueError(f"expected one list, got {len(paths)}")
    content, ending = files.cat_file(paths[0]), _ending(paths[0])
    if ending == ".csv":
        keys = dict.fromkeys((KEY, columns.key or KEY), pyarrow.string())  # 007 stays 007
        options = csv.ConvertOptions(column_types=keys)
        table = csv.read_csv(pyarrow.BufferReader(content), convert_options=options)
    else:
        lines = filter(None, map(bytes.strip, content.splitlines()))
        entries = (
            [json.loads(line) for line in lines] if ending == ".jsonl" else json.loads(content)
        )
        if not (entries and isinstance(entries, list) and {*map(type, entries)} <= {str, dict}):
            raise ValueError("expected a list of paths, or of objects with a path")
        rows = [{PATHS[0]: entry} if isinstance(entry, str) else entry for entry in entries]
        table = pyarrow.Table.from_struct_array(pyarrow.array(rows))
    values = table[columns.image_in(table.schema)].to_pylist()
    payloads = [_payload(files, posixpath.dirname(paths[0]), value) for value in values]
    names = [without_secrets(str(value)) for value in values]
    kept = table.select(columns.others_in(table.column_names))
    has_key = columns.key_in(table.column_names) is not None
    content = [*(names if has_key else values), *map(_local_size, payloads)]
    return ImageSource("list", names, _in_memory(payloads), content, kept)


def _parquet(files: AbstractFileSystem, paths: Sequence[str], columns: Columns) -> ImageSource:
    whole = arrow_dataset.dataset(paths, filesystem=files, format="parquet")
    column = columns.image_in(whole.schema)
    groups = [
        (file.path, group.id, group.num_rows)
        for file in whole.get_fragments()
        for group in file.row_groups
    ]
    counts = [count for _, _, count in groups]
    ends = [*accumulate(counts)]

    def payloads(start: int, stop: int) -> Iterator[Payload]:
        for (path, group, count), end in zip(groups, ends, strict=True):
            row, folder = end - count, posixpath.dirname(path)
            if row >= stop or end <= start:
                continue
            try:
                for values in _batches(files, path, group, column):
                    for value in values[max(0, start - row) : max(0, stop - row)]:
                        yield _payload(files, folder, value.as_py())
                    row += len(values)
                    if row >= stop:
                        break
            except (pyarrow.ArrowException, KeyError, OSError) as error:
                shown = without_secrets(path)
                reason = str(error).replace(path, shown)
                raise ConfigError(
                    f"source: expected whole Parquet files, got {shown}: {reason:.300}"
                ) from error

    names: Sequence[Any] = range(ends[-1] if ends else 0)
    content = [*counts, *map(files.size, paths)]
    kind = whole.schema.field(column).type
    if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind):
        values = whole.to_table([column])[column].to_pylist()
        names = [without_secrets(str(value)) for value in values]
        has_key = columns.key_in(whole.schema.names) is not None
        content = [*(names if has_key else values), *map(_local_size, payloads(0, len(values)))]
    kept = whole.to_table(columns.others_in(whole.schema.names))
    return ImageSource("parquet", names, payloads, content, kept)


def _batches(
    files: AbstractFileSystem, path: str, group: int, column: str
) -> Iterator[pyarrow.Array]:
    """Yield the cells of a column in a row group, `BATCH` at a time; no more of it is read."""
    with files.open(path, "rb") as opened:
        file = parquet.ParquetFile(opened, pre_buffer=False, buffer_size=READ_BYTES)
        batches = file.iter_batches(BATCH, row_groups=[group], columns=[column], use_threads=False)
        for batch in batches:
            yield batch.column(column)


def _datasets_folder(files: AbstractFileSystem, folder: str, columns: Columns) -> ImageSource:
    dataset = datasets.load_from_disk(files.unstrip_protocol(folder))
    if isinstance(dataset, datasets.DatasetDict):
        raise ValueError(f"expected one split, {', '.join(f'{folder}/{name}' for name in dataset)}")
    column = columns.image_in(dataset.features.arrow_schema)
    stored = dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False))

    def payloads(start: int, stop: int) -> Iterator[Payload]:
        return (_payload(files, folder, stored[row][column]) for row in range(start, stop))

    others = columns.others_in(dataset.column_names)
    kept = dataset.select_columns(others).with_format("arrow")[:] if others else NO_COLUMNS
    state = files.cat_file(f"{folder}/state.json").decode()  # its fingerprint differs by content
    return ImageSource("datasets", range(len(dataset)), payloads, [state], kept)


def _payload(files: AbstractFileSystem, folder: str, value: Any) -> Payload:
    """Return the image of a cell: its bytes, a path or URL, or both as `datasets` has them."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not value or not isinstance(value, str):
        return SampleError("", "no image in the row")
    if "://" not in value:
        return Stored(files, posixpath.join(folder, value))
    try:
        return Stored(*files_of(value))
    except OSError as error:
        return SampleError("", f"cannot be opened: {error!s:.300}")


def _local_size(payload: Payload) -> int | None:
    """Return the size of a file of this machine, so that a later run notices another image."""
    if not (isinstance(payload, Stored) and isinstance(payload.files, LocalFileSystem)):
        return None
    try:
        return os.path.getsize(payload.path)
    except (OSError, ValueError):  # no such file; a name that no file can have
        return None


READERS = {".tar": _tars, ".parquet": _parquet, ".json": _list, ".jsonl": _list, ".csv": _list}
"""The function that lists the images of files with an ending."""


def without_secrets(location: str) -> str:
    """Return a path, or a URL without users, passwords and query, which may be a token."""
    if "://" not in location:
        return location
    return re.sub("://[^/]*@", "://", re.split("[?#]", location, maxsplit=1)[0])


def _ending(path: str) -> str:
    return posixpath.splitext(without_secrets(path))[1].lower()
