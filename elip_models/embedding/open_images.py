"""Opening of a collection of images: folder, tar files, list of paths, Parquet, `datasets` folder.

    photographs, s3://bucket/photographs    a folder of images
    train-{0000..0099}.tar, train-*.tar     tar files, or a folder of them
    list.json, .jsonl, .csv, .parquet       paths or URLs of images
    train-*.parquet                         bytes of images, or a folder of such files
    dataset                                 a folder that `save_to_disk` of `datasets` wrote

Every path may be a URL that fsspec opens.
"""

import glob
import os
import posixpath
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from elip_models.embedding.image_source import (
    ImageSource,
    SourceOptions,
    as_key,
    check_columns,
    different_keys,
)
from elip_models.embedding.image_tables import datasets_source, list_source, parquet_source
from elip_models.embedding.stored import Payload, Stored, local_or_none
from elip_models.embedding.tar_images import tar_source
from elip_models.images import IMAGE_ENDINGS
from elip_models.pretraining.data.checks import expand_user
from elip_models.pretraining.data.data_spec import expand_ranges
from elip_models.pretraining.data.streams import redacted
from elip_models.validation import ConfigError, shortened

LISTS = (".json", ".jsonl", ".csv")
FILES = (".tar", ".parquet", *LISTS)
DATASETS = ("dataset_info.json", "dataset_dict.json")
"""One of them is in a folder that `save_to_disk` wrote."""
EXPECTED = (
    "a folder of images, .tar files, .parquet files, a list of paths (.json, .jsonl, .csv, "
    ".parquet), or a folder of save_to_disk of datasets"
)


class Found(NamedTuple):
    """A file in a folder: its path in the file system, its name in the folder, and its bytes."""

    path: str
    name: str
    size: int | None


def open_images(source: str | os.PathLike, options: SourceOptions) -> ImageSource:
    """List the images of a source.

    Raises:
        ConfigError: there is no such source, it has no image, it cannot be listed, or an option
            does not fit it.
    """
    if not isinstance(source, str | os.PathLike):
        raise ConfigError(f"source: expected {EXPECTED}, got {shortened(source)}")
    location = os.fspath(source)
    shown = redacted(location)
    try:
        found = _open(location, shown, options)
    except ConfigError:
        raise
    except (OSError, ValueError, ImportError) as error:
        what = str(error) or type(error).__name__
        raise ConfigError(
            f"source: expected {EXPECTED}, got {shortened(shown)}: {what:.300}"
        ) from error
    if not len(found):
        raise ConfigError(f"source: expected at least one image, got none in {shortened(shown)}")
    return found


def _open(location: str, shown: str, options: SourceOptions) -> ImageSource:
    if "://" not in location and "::" not in location:
        location = str(expand_user(location))
    first = next(expand_ranges(location))
    files, _ = url_to_fs(first)
    paths = [path for name in expand_ranges(location) for path in _matches(files, name)]
    if (len(paths) == 1 and _ending(paths[0]) not in FILES) or _is_folder(files, paths[0]):
        return _open_folder(files, paths[0], shown, options)
    endings = {_ending(path) for path in paths}
    if len(endings) > 1 or not endings <= {*FILES}:
        raise ConfigError(f"source: expected {EXPECTED}, got {shortened(shown)}")
    return _open_files(files, paths, shown, options)


def _matches(files: AbstractFileSystem, location: str) -> list[str]:
    """Return the paths that a path or pattern names, at least one."""
    path = files._strip_protocol(location)
    if not glob.has_magic(path) or files.exists(path):
        return [path]
    found = sorted(files.glob(path))
    if not found:
        raise FileNotFoundError("no file matches")
    return found


def _is_folder(files: AbstractFileSystem, path: str) -> bool:
    """Return whether a path is a folder; a URL of a file is not listed to find out."""
    is_web = _ending(path) in FILES and "http" in files.protocol
    return not is_web and files.isdir(path)


def _ending(path: str) -> str:
    return posixpath.splitext(path)[1].lower()


def _open_folder(
    files: AbstractFileSystem, folder: str, shown: str, options: SourceOptions
) -> ImageSource:
    if not files.isdir(folder):
        raise FileNotFoundError(f"no such folder; the working folder is {Path.cwd()}")
    if any(files.exists(f"{folder}/{name}") for name in DATASETS):
        return datasets_source(files, folder, shown, options)
    found = _listed(files, folder)
    kinds = {
        ".tar files": [each for each in found if _ending(each.name) == ".tar"],
        ".parquet files": [each for each in found if _ending(each.name) == ".parquet"],
        "images": _images(found),
    }
    present = [kind for kind, of_kind in kinds.items() if of_kind]
    if len(present) > 1:
        pattern = f"{shown.rstrip('/')}/*{present[0].partition(' ')[0]}"
        raise ConfigError(
            f"source: expected a folder with files of one kind, got {' and '.join(present)} in "
            f"{shortened(shown)}; name the files, such as {shortened(pattern)}, or move the others"
        )
    if not kinds["images"] and present:
        return _open_files(files, [each.path for each in kinds[present[0]]], shown, options)
    return _folder_source(files, folder, kinds["images"], shown, options)


def _open_files(
    files: AbstractFileSystem, paths: Sequence[str], shown: str, options: SourceOptions
) -> ImageSource:
    ending = _ending(paths[0])
    if ending == ".tar":
        return tar_source(files, paths, shown, options)
    if ending == ".parquet":
        return parquet_source(files, paths, shown, options)
    if len(paths) > 1:
        raise ConfigError(f"source: expected one list, got {len(paths)} in {shortened(shown)}")
    return list_source(files, paths[0], shown, options)


def _listed(files: AbstractFileSystem, folder: str) -> list[Found]:
    """Return the files of a folder and its subfolders, sorted by name."""
    if local_or_none(files) is None:
        found = list(_listed_local(folder))
    else:
        details: dict[str, dict[str, Any]] = files.find(folder, detail=True)
        found = [
            Found(path, path.removeprefix(folder).lstrip("/"), each.get("size"))
            for path, each in details.items()
        ]
    return sorted(found, key=lambda each: each.name)


def _images(found: Sequence[Found]) -> list[Found]:
    return [each for each in found if _ending(each.name) in IMAGE_ENDINGS]


def _listed_local(folder: str) -> Iterator[Found]:
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            size = os.stat(path).st_size if os.path.exists(path) else None
            yield Found(path, Path(path).relative_to(folder).as_posix(), size)


def _folder_source(
    files: AbstractFileSystem,
    folder: str,
    found: Sequence[Found],
    shown: str,
    options: SourceOptions,
) -> ImageSource:
    for argument in ("image_column", "key_column"):
        if getattr(options, argument) is not None:
            check_columns([getattr(options, argument)], (), argument)
    check_columns(options.keep_columns, (), "keep_columns")
    paths, own = [each.path for each in found], local_or_none(files)

    def payloads(start: int, stop: int) -> Iterator[Payload]:
        return (Stored(path, own) for path in paths[start:stop])

    def list_again() -> list[str]:
        return [as_key(each.name) for each in _images(_listed(files, folder))]

    keys = different_keys([as_key(each.name) for each in found], options.on_duplicate)
    sizes = [each.size for each in found]
    return ImageSource("folder", shown, keys, payloads, content=sizes, list_again=list_again)
