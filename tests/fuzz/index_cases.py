"""Cached tables of tar shards that are damaged, exchanged, or older than their shard."""

import os
import warnings

import pyarrow

from elip_models.pretraining.data import ShardSource, shard_index
from tests.fuzz.harness import Loss, kind
from tests.helpers.damage import picture, shard


def flipped(table, others, rng):
    content = bytearray(table.read_bytes())
    for _ in range(rng.randint(1, 8)):
        content[rng.randrange(len(content))] ^= rng.randint(1, 255)
    table.write_bytes(content)


def truncated(table, others, rng):
    os.truncate(table, rng.randrange(table.stat().st_size))


def longer(table, others, rng):
    with table.open("ab") as file:
        file.write(rng.choice((rng.randbytes(rng.randint(1, 600)), bytes(8), table.read_bytes())))


def overwritten(table, others, rng):
    size = rng.randint(0, 2 * table.stat().st_size)
    table.write_bytes(rng.choice((bytes(size), rng.randbytes(size), b"\xff" * size)))


def moved_bytes(table, others, rng):
    content = table.read_bytes()
    at, to = sorted(rng.randrange(len(content)) for _ in range(2))
    table.write_bytes(content[:at] + content[to:] + content[at:to])


def without_rows(table, others, rng):
    with pyarrow.memory_map(str(table)) as file, pyarrow.ipc.open_stream(file) as stream:
        schema, batches = stream.schema, list(stream)
    schema = rng.choice((schema, pyarrow.schema({"key": pyarrow.string()}), pyarrow.schema({})))
    table.unlink()  # it is still mapped
    with table.open("wb") as file, pyarrow.ipc.new_stream(file, schema) as writer:
        if schema == batches[0].schema and rng.random() < 0.5:
            writer.write_batch(batches[0].slice(0, rng.randrange(len(batches[0]))))
    if rng.random() < 0.5:
        with table.open("ab") as file:
            file.write(rng.randbytes(8))


def exchanged(table, others, rng):
    other = rng.choice([*others, table])
    content = other.read_bytes()
    other.write_bytes(table.read_bytes())
    table.write_bytes(content)


def of_another_kind(table, others, rng):
    table.unlink()
    target = rng.choice([table.parent / "missing", "/dev/zero", table.parent, table, *others])
    rng.choice((table.mkdir, lambda: os.mkfifo(table), lambda: table.symlink_to(target)))()


def locked(table, others, rng):
    table.unlink()
    lock = table.with_suffix(".lock")
    rng.choice((lock.mkdir, lock.touch, lambda: os.mkfifo(lock), lambda: lock.symlink_to(lock)))()


def old_shard(paths, rng):
    """Replace a shard by one of equal size and time, in place or by another file."""
    path, new = rng.choice(paths), paths[0].with_name("new.tar")
    before = path.stat()
    content = path.read_bytes().replace(b"caption", rng.choice((b"Caption", b"picture")))
    if rng.random() < 0.5:
        new.write_bytes(content)
        new.replace(path)
    else:
        path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def exchanged_shards(paths, rng):
    first, second = rng.sample(paths, 2)
    times = [each.stat().st_mtime_ns for each in (first, second)]
    new = first.with_name("new.tar")
    first.rename(new), second.rename(first), new.rename(second)
    for path, time in zip((first, second), times, strict=True):
        os.utime(path, ns=(time, time))


TABLES = (flipped, flipped, truncated, longer, overwritten, moved_bytes, without_rows)
TABLES += (exchanged, of_another_kind, locked)
SHARDS = (old_shard, exchanged_shards)


def pairs(source):
    return [(sample.id, sample.captions, sample.image.tobytes()) for sample in source]


@kind()
def index_cache(folder, rng):
    shard_index.MIN_CACHED_BYTES = 1
    os.environ["ELIP_CACHE"] = str(folder / "cache")
    paths = []
    for number in range(rng.randint(2, 4)):
        members = []
        for i in range(rng.randint(1, 5)):
            texts = [(f"k{i}.txt", b"caption %d" % rng.randrange(100))]
            members += [(f"k{i}.png", picture(rng.randrange(1000))), *texts]
        paths.append(shard(folder / f"{number}.tar", members))
    ShardSource(paths)
    tables = sorted((folder / "cache").rglob("*.arrow"))
    if len(tables) != len(paths):
        raise Loss(f"{len(tables)} tables of {len(paths)} shards are cached")
    damaged = rng.random() < 0.8
    if damaged:
        table = tables.pop(rng.randrange(len(tables)))
        rng.choice(TABLES)(table, tables, rng)
    else:
        rng.choice(SHARDS)(paths, rng)
    with warnings.catch_warnings(record=True) as said:
        warnings.filterwarnings("always", "the (cached )?index")
        found = [pairs(ShardSource(paths)) for _ in range(2)]
    os.environ["ELIP_CACHE"] = ""
    expected = pairs(ShardSource(paths))
    if found != [expected, expected]:
        raise Loss("the pairs read with a cached table are not those of the shard")
    return "reported" if said else "read"
