"""Index of tar shards: an Arrow table with one row per sample.

The table of a shard of at least `MIN_CACHED_BYTES` is stored in the cache folder. All ranks and
workers map it into memory. Its file name depends on the path, size, inode and times of the shard;
the table of a changed shard replaces the old one. The file ends with a checksum of the table and of
the file name. It is compared before the table is read, and a damaged table is built again. When
several tables are missing, several processes build them, each table once.

The cache folder is $ELIP_CACHE, or `elip` in $XDG_CACHE_HOME or ~/.cache. Nothing is cached if
$ELIP_CACHE is empty or the folder is not writable.
"""

import hashlib
import itertools
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
from typing import TYPE_CHECKING, Any, BinaryIO

from elip_models.pretraining.data.checks import expand_user
from elip_models.pretraining.data.tar_members import Damage, Member, StoredTar, members_of
from elip_models.pretraining.data.tar_samples import EXTENSIONS, SampleMembers, sample_name
from elip_models.validation import require_extra

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset
    from datasets.table import Table

MIN_CACHED_BYTES = 2**24  # bytes of a shard; reading a smaller one is fast enough without a cache
MIN_SHARED_BYTES = 2**30  # total bytes of missing shards from which on several processes build them
FORMAT = 4  # version of the cached tables
_DIGEST_BYTES = 8


def read_index(shards: Sequence[Path]) -> tuple["Dataset", list[int]]:
    """Return the rows of all shards in order, and the end row of each shard.

    A row has the key, the offset and size of the image, the captions, and the problem: why the
    sample cannot be read, or "".
    """
    with require_extra("ShardSource"):
        from datasets import Dataset
        from datasets.table import InMemoryTable, concat_tables

    paths = {shard: path for shard in shards if (path := _cache_path(shard)) is not None}
    tables = {shard: _load_cached(path) for shard, path in paths.items()}
    missing = {shard: paths[shard] for shard, table in tables.items() if table is None}
    damaged = [shard for shard, path in missing.items() if path.exists()]
    if damaged:
        warnings.warn(
            f"the cached index of {len(damaged)} of {len(paths)} tar shards is damaged, such as "
            f"that of {damaged[0]}; it is built again",
            stacklevel=2,
        )
    _build_missing(missing)
    tables |= {shard: _load_cached(path) for shard, path in missing.items()}
    parts = [tables.get(shard) or InMemoryTable(_shard_table(shard)) for shard in shards]
    # `datasets` would compute a fingerprint, which nothing uses, from all rows.
    rows = Dataset(concat_tables(parts), fingerprint="shards")
    return rows, list(itertools.accumulate(map(len, parts)))


def _load_cached(path: Path) -> "Table | None":
    """Return a cached table, or None if it is missing or damaged."""
    import pyarrow
    from datasets.table import MemoryMappedTable

    if not path.is_file() or path.stat().st_size <= _DIGEST_BYTES:
        return None
    try:
        content = pyarrow.memory_map(str(path)).read_buffer()
    except OSError:
        return None
    stored = content.slice(0, content.size - _DIGEST_BYTES)
    if content.slice(stored.size).to_pybytes() != _checksum(path, stored):
        return None  # Arrow itself reads any bytes, and may end the process
    return MemoryMappedTable(pyarrow.ipc.open_stream(stored).read_all(), str(path))


def _checksum(path: Path, table: "pyarrow.Buffer") -> bytes:
    import xxhash  # a requirement of `datasets`

    digest = xxhash.xxh3_64(path.name.encode())
    digest.update(table)
    return digest.digest()


def _cache_path(shard: Path) -> Path | None:
    stat = shard.stat()
    root = _cache_folder()
    if stat.st_size < MIN_CACHED_BYTES or root is None:
        return None
    state = (FORMAT, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
    name = f"{_digest(os.fsencode(shard.resolve()))}-{_digest(repr(state).encode())}.arrow"
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
        _warn_not_cached(error)
        return None
    return folder


def _warn_not_cached(error: OSError) -> None:
    warnings.warn(
        f"the index of tar shards is not cached: {error}; set ELIP_CACHE to a writable folder",
        stacklevel=3,
    )


def _build_missing(tables: dict[Path, Path]) -> None:
    if not tables:
        return
    from rich.console import Console
    from rich.progress import Progress

    processes = []
    if sum(shard.stat().st_size for shard in tables) >= MIN_SHARED_BYTES:
        command = [sys.executable, "-m", "elip_models.pretraining.data.shard_index"]
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
                    if _load_cached(path) is None:
                        _write_table(_shard_table(shard), path)
                path.with_suffix(".lock").unlink(missing_ok=True)
            except Timeout:
                continue  # another process builds it
            except OSError as error:  # such as a full disk
                _warn_not_cached(error)
            del left[shard]
            yield shard
        if len(left) == before:
            time.sleep(0.1)


def _write_table(table: "pyarrow.Table", path: Path) -> None:
    """Write a table atomically, and remove the tables of earlier versions of the shard."""
    import pyarrow

    unfinished = path.with_suffix(f".{os.getpid()}")
    memory = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(memory, table.schema) as writer:
        writer.write_table(table)
    content = memory.getvalue()
    try:
        with unfinished.open("wb") as file:
            file.write(content)
            file.write(_checksum(path, content))
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
    with shard.open("rb") as file:
        yield from index_rows(file, shard.stat().st_size, str(shard))


def index_rows(file: BinaryIO, size: int, archive: str) -> Iterator[dict[str, Any]]:
    """Yield one row per key, in order of first appearance, then one per lost part.

    `file` is the open tar of `size` bytes, `archive` its name in warnings and errors.
    """
    samples: dict[str, SampleMembers] = {}
    lost: list[tuple[str, str]] = []
    for member in members_of(StoredTar(file, size), archive):
        if isinstance(member, Damage):
            lost.append((f"byte {member.offset}", member.what))
        elif name := sample_name(member.name):
            key, extension = name
            samples.setdefault(key, SampleMembers(key)).add(extension, member)

    def read(member: Member) -> bytes:
        file.seek(member.offset)
        return file.read(member.size)

    for sample in samples.values():
        image, captions, problem = sample.read(read)
        yield {
            "key": sample.key,
            "offset": image.offset if image else 0,
            "size": image.size if image else 0,
            "captions": captions,
            "problem": problem,
        }
        lost += [(sample.key, problem)] * (sample.copies - 1)
    if not samples and not lost:
        lost.append(("byte 0", f"no member ends in {', '.join(EXTENSIONS)}"))
    if lost:
        examples = "; ".join(what for _, what in lost[:3]) + ("; .." if len(lost) > 3 else "")
        warnings.warn(
            f"{archive} is damaged: {examples}; each counts as an unreadable sample", stacklevel=2
        )
    for key, problem in lost:
        yield {"key": key, "offset": 0, "size": 0, "captions": [], "problem": problem}


if __name__ == "__main__":  # a process that `_build_missing` started
    request = json.load(sys.stdin)
    with suppress(ValueError, OSError):  # the parent process reads the same shard and raises
        for _ in _build_unlocked({Path(shard): Path(path) for shard, path in request}):
            pass
