"""Index of tar shards: an Arrow table with one row per sample.

The table of a shard of at least `MIN_CACHED_BYTES` is stored in the cache folder. All ranks and
workers map it into memory. Its file name depends on the path, size and modification time of the
shard; the table of a changed shard replaces the old one. When several tables are missing, several
processes build them, each table once.

The cache folder is $ELIP_CACHE, or `elip` in $XDG_CACHE_HOME or ~/.cache. Nothing is cached if
$ELIP_CACHE is empty or the folder is not writable.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elip_models.data.checks import expand_user
from elip_models.data.tar_members import Damage, Member, read_members
from elip_models.data.tar_samples import (
    IMAGE_EXTENSIONS,
    TEXT_EXTENSIONS,
    image_problem,
    read_captions,
    split_name,
)
from elip_models.validation import require_extra

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

MIN_CACHED_BYTES = 2**24  # bytes of a shard; reading a smaller one is fast enough without a cache
MIN_SHARED_BYTES = 2**30  # total bytes of missing shards from which on several processes build them
FORMAT = 2  # version of the cached tables


def read_index(shards: Sequence[Path]) -> tuple["Dataset", list[int]]:
    """Return the rows of all shards in order, and the end row of each shard.

    A row has the key, the offset and size of the image, the captions, and the problem: why the
    sample cannot be read, or "".
    """
    with require_extra("ShardSource"):
        from datasets import Dataset, concatenate_datasets
        from datasets.table import InMemoryTable

    cached = {shard: path for shard in shards if (path := _cache_path(shard)) is not None}
    _build_missing({shard: path for shard, path in cached.items() if not path.is_file()})
    parts = []
    for shard in shards:
        path = cached.get(shard)
        if path is None:
            parts.append(Dataset(InMemoryTable(_shard_table(shard))))
        else:
            parts.append(_load_cached(shard, path))
    ends, end = [], 0
    for part in parts:
        end += len(part)
        ends.append(end)
    return concatenate_datasets(parts), ends


def _load_cached(shard: Path, path: Path) -> "Dataset":
    from datasets import Dataset
    from pyarrow import ArrowInvalid

    try:
        return Dataset.from_file(str(path))
    except (ArrowInvalid, OSError):
        _write_table(_shard_table(shard), path)
        return Dataset.from_file(str(path))


def _cache_path(shard: Path) -> Path | None:
    stat = shard.stat()
    root = _cache_folder()
    if stat.st_size < MIN_CACHED_BYTES or root is None:
        return None
    state = f"{FORMAT}\n{stat.st_size}\n{stat.st_mtime_ns}"
    name = f"{_digest(os.fsencode(shard.resolve()))}-{_digest(state.encode())}.arrow"
    return root / "shards" / name


def _digest(value: bytes) -> str:
    return hashlib.sha256(value).hexdigest()[:32]


def _cache_folder() -> Path | None:
    configured = os.environ.get("ELIP_CACHE")
    if configured == "":
        return None
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return _writable(expand_user(configured) if configured else root / "elip")


@cache
def _writable(folder: Path) -> Path | None:
    """Create the folder and return it; warn and return None if it is not writable."""
    try:
        (folder / "shards").mkdir(parents=True, exist_ok=True)
        if not os.access(folder / "shards", os.W_OK):
            raise PermissionError(f"{folder} is not writable")
    except OSError as error:
        warnings.warn(
            f"the index of tar shards is not cached: {error}; set ELIP_CACHE to a writable folder",
            stacklevel=2,
        )
        return None
    return folder


def _build_missing(tables: dict[Path, Path]) -> None:
    if not tables:
        return
    from rich.console import Console
    from rich.progress import Progress

    processes = []
    if sum(shard.stat().st_size for shard in tables) >= MIN_SHARED_BYTES:
        command = [sys.executable, "-m", "elip_models.data.shard_index"]
        request = json.dumps([[str(shard), str(path)] for shard, path in tables.items()])
        for _ in range(min(len(tables), os.cpu_count() or 1) - 1):
            process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)
            process.stdin.write(request)
            process.stdin.close()
            processes.append(process)
    console = Console(stderr=True)
    try:
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            for _ in progress.track(
                _build_unlocked(tables), len(tables), description="index of tar shards"
            ):
                pass
    finally:
        for process in processes:
            process.wait()


def _build_unlocked(tables: dict[Path, Path]) -> Iterator[Path]:
    """Build the tables that no other process builds; yield each shard whose table exists."""
    from filelock import FileLock, Timeout

    left = dict(tables)
    while left:
        before = len(left)
        for shard, path in list(left.items()):
            try:
                with FileLock(path.with_suffix(".lock"), timeout=0):
                    if not path.is_file():
                        _write_table(_shard_table(shard), path)
            except Timeout:
                continue  # another process builds it
            del left[shard]
            path.with_suffix(".lock").unlink(missing_ok=True)
            yield shard
        if len(left) == before:
            time.sleep(0.1)


def _write_table(table: "pyarrow.Table", path: Path) -> None:
    """Write a table atomically, and remove the tables of earlier versions of the shard."""
    import pyarrow

    unfinished = path.with_suffix(f".{os.getpid()}")
    try:
        with (
            pyarrow.OSFile(str(unfinished), "wb") as file,
            pyarrow.ipc.new_stream(file, table.schema) as writer,
        ):
            writer.write_table(table)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    for older in path.parent.glob(f"{path.stem.partition('-')[0]}-*.arrow"):
        if older != path:
            older.unlink(missing_ok=True)


def _shard_table(shard: Path) -> "pyarrow.Table":
    import pyarrow

    text = pyarrow.string()
    schema = pyarrow.schema(
        {
            "key": text,
            "offset": pyarrow.int64(),
            "size": pyarrow.int64(),
            "captions": pyarrow.list_(text),
            "problem": text,
        }
    )
    return pyarrow.Table.from_pylist(list(_rows(shard)), schema=schema)


def _rows(shard: Path) -> Iterator[dict[str, Any]]:
    """Yield one row per key, in order of first appearance, then one per lost part."""
    images: dict[str, Member] = {}
    texts: dict[str, dict[str, Member]] = {}
    lost: list[tuple[str, str]] = []
    for member in read_members(shard):
        if isinstance(member, Damage):
            lost.append((f"byte {member.offset}", member.what))
            continue
        key, extension = split_name(member.name)
        if extension not in IMAGE_EXTENSIONS + TEXT_EXTENSIONS:
            continue
        of_key = texts.setdefault(key, {})
        if extension in of_key or (extension in IMAGE_EXTENSIONS and key in images):
            lost.append((member.name, f"{key} already has a {extension} or an image"))
        elif extension in IMAGE_EXTENSIONS:
            images[key] = member
        else:
            of_key[extension] = member
    with shard.open("rb") as file:

        def read(member: Member) -> bytes:
            file.seek(member.offset)
            return file.read(member.size)

        for key, members in texts.items():
            captions, problem = read_captions(members, read)
            image = images.get(key)
            yield {
                "key": key,
                "offset": image.offset if image else 0,
                "size": image.size if image else 0,
                "captions": captions,
                "problem": image_problem(image) or problem,
            }
    if not texts and not lost:
        lost.append(
            ("byte 0", f"no member ends in {', '.join(IMAGE_EXTENSIONS + TEXT_EXTENSIONS)}")
        )
    if lost:
        examples = "; ".join(what for _, what in lost[:3]) + ("; .." if len(lost) > 3 else "")
        warnings.warn(
            f"{shard} is damaged: {examples}; each counts as an unreadable sample", stacklevel=2
        )
    for key, problem in lost:
        yield {"key": key, "offset": 0, "size": 0, "captions": [], "problem": problem}


if __name__ == "__main__":  # a process that `_build_missing` started
    request = json.load(sys.stdin)
    with suppress(ValueError, OSError):  # the parent process reads the same shard and raises
        for _ in _build_unlocked({Path(shard): Path(path) for shard, path in request}):
            pass
