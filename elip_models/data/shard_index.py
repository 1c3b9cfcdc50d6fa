"""What is in tar shards, read once: an Arrow table with a row a sample.

The table of a shard of at least `CACHED_FROM` bytes is kept in the cache folder, under a name made
of the shard's path, size and time of change, and mapped into memory by every rank and worker that
reads it; that of a shard that has changed takes the old one's place. Where several are missing,
several processes build them, and no two the same one.

The cache folder is $ELIP_CACHE, or `elip` in $XDG_CACHE_HOME or ~/.cache. Nothing is kept where
$ELIP_CACHE is empty, or where the folder cannot be written.
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

from elip_models.data.checks import expanded
from elip_models.data.tar_members import Damage, Member, read_members
from elip_models.data.tar_samples import (
    IMAGE_EXTENSIONS,
    TEXT_EXTENSIONS,
    problem_of,
    read_captions,
    split_name,
)
from elip_models.validation import require_extra

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

CACHED_FROM = 2**24  # bytes of a shard; a smaller one is read in less time than it is worth
SHARED_FROM = 2**30  # bytes of all that are missing, from which on several processes build them
FORMAT = 2  # of the cached tables


def read_index(shards: Sequence[Path]) -> tuple["Dataset", list[int]]:
    """Rows of all shards in their order, and behind which row each ends.

    A row has key, offset and size of the image, captions, and problem: why it cannot be read, or
    an empty text.

    Raises:
        ValueError: a shard that is no tar.
    """
    with require_extra("ShardSource"):
        from datasets import Dataset, concatenate_datasets
        from datasets.table import InMemoryTable

    cached = {shard: path for shard in shards if (path := _cached(shard)) is not None}
    _build({shard: path for shard, path in cached.items() if not path.is_file()})
    parts = []
    for shard in shards:
        path = cached.get(shard)
        if path is None:
            parts.append(Dataset(InMemoryTable(_table(shard))))
        else:
            parts.append(_mapped(shard, path))
    ends, end = [], 0
    for part in parts:
        end += len(part)
        ends.append(end)
    return concatenate_datasets(parts), ends


def _mapped(shard: Path, path: Path) -> "Dataset":
    """The table in the cache; built again where a disk has damaged it."""
    from datasets import Dataset
    from pyarrow import ArrowInvalid

    try:
        return Dataset.from_file(str(path))
    except (ArrowInvalid, OSError):
        _write(_table(shard), path)
        return Dataset.from_file(str(path))


def _cached(shard: Path) -> Path | None:
    """Where the table of a shard is kept; None of one that is not."""
    stat = shard.stat()
    root = _cache_folder()
    if stat.st_size < CACHED_FROM or root is None:
        return None
    state = f"{FORMAT}\n{stat.st_size}\n{stat.st_mtime_ns}"
    name = f"{_digest(os.fsencode(shard.resolve()))}-{_digest(state.encode())}.arrow"
    return root / "shards" / name


def _digest(value: bytes) -> str:
    return hashlib.sha256(value).hexdigest()[:32]


def _cache_folder() -> Path | None:
    said = os.environ.get("ELIP_CACHE")
    if said == "":
        return None
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return _writable(expanded(said) if said else root / "elip")


@cache
def _writable(folder: Path) -> Path | None:
    """The folder, made where it is not there; None, with a warning, where that cannot be."""
    try:
        (folder / "shards").mkdir(parents=True, exist_ok=True)
        if not os.access(folder / "shards", os.W_OK):
            raise PermissionError(f"{folder} may not be written")
    except OSError as error:
        warnings.warn(
            f"the index of tar shards is not kept: {error}; set ELIP_CACHE to a folder",
            stacklevel=2,
        )
        return None
    return folder


def _build(tables: dict[Path, Path]) -> None:
    """Builds the table of each shard, in this process or in several, with a progress bar."""
    if not tables:
        return
    from rich.console import Console
    from rich.progress import Progress

    helpers = []
    if sum(shard.stat().st_size for shard in tables) >= SHARED_FROM:
        command = [sys.executable, "-m", "elip_models.data.shard_index"]
        asked = json.dumps([[str(shard), str(path)] for shard, path in tables.items()])
        for _ in range(min(len(tables), os.cpu_count() or 1) - 1):
            helper = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)
            helper.stdin.write(asked)
            helper.stdin.close()
            helpers.append(helper)
    console = Console(stderr=True)
    try:
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            for _ in progress.track(_built(tables), len(tables), description="index of tar shards"):
                pass
    finally:
        for helper in helpers:
            helper.wait()


def _built(tables: dict[Path, Path]) -> Iterator[Path]:
    """Builds what no other process builds, waits for the rest, and yields each that is there."""
    from filelock import FileLock, Timeout

    left = dict(tables)
    while left:
        before = len(left)
        for shard, path in list(left.items()):
            try:
                with FileLock(path.with_suffix(".lock"), timeout=0):
                    if not path.is_file():
                        _write(_table(shard), path)
            except Timeout:
                continue  # another process is at it
            del left[shard]
            path.with_suffix(".lock").unlink(missing_ok=True)
            yield shard
        if len(left) == before:
            time.sleep(0.1)


def _write(table: "pyarrow.Table", path: Path) -> None:
    """Whole or not at all, in place of what the shard was before."""
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


def _table(shard: Path) -> "pyarrow.Table":
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
    """One row a key, in the order of first appearance, and one for everything that is lost."""
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
            lost.append((member.name, f"{key} has another {extension} or image before it"))
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
                "problem": problem_of(image) or problem,
            }
    if not texts and not lost:
        lost.append(
            ("byte 0", f"no member ends in {', '.join(IMAGE_EXTENSIONS + TEXT_EXTENSIONS)}")
        )
    if lost:
        warnings.warn(
            f"{shard} is damaged: {'; '.join(what for _, what in lost[:3])}"
            f"{'; ..' * (len(lost) > 3)}; each counts as an unreadable sample",
            stacklevel=2,
        )
    for key, problem in lost:
        yield {"key": key, "offset": 0, "size": 0, "captions": [], "problem": problem}


if __name__ == "__main__":  # a helper of `_build`, which is asked for tables of shards
    asked = json.load(sys.stdin)
    with suppress(ValueError, OSError):  # who asked meets the same shard, and says what is wrong
        for _ in _built({Path(shard): Path(path) for shard, path in asked}):
            pass
