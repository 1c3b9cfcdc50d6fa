"""The cached index of large tar shards."""

import os
import pickle
import subprocess
import sys

import numpy as np
import pyarrow
import pytest

from elip_models.pretraining.data import ShardSource, shard_index
from tests.helpers.damage import picture, shard


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Cache shards of any size in a folder of the test."""
    monkeypatch.setenv("ELIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shard_index, "MIN_CACHED_BYTES", 1)
    return tmp_path / "cache" / "shards"


def counted(monkeypatch):
    """Return a list to which every shard is added whose table is built."""
    built, table = [], shard_index._shard_table

    def counting(path):
        built.append(path.name)
        return table(path)

    monkeypatch.setattr(shard_index, "_shard_table", counting)
    return built


def three(folder):
    return [
        shard(folder / f"{n}.tar", [(f"{n}{i}.{end}", picture() if end == "png" else b"a caption")
                                    for i in range(n + 1) for end in ("png", "txt")])
        for n in range(3)
    ]  # fmt: skip


def read(source):
    return [(sample.id, sample.captions, sample.image.tobytes()) for sample in source]


def test_a_built_table_is_reused_by_every_reader(tmp_path, cache, monkeypatch):
    paths, built = three(tmp_path), counted(monkeypatch)
    first = ShardSource(paths)
    assert built == ["0.tar", "1.tar", "2.tar"] and len(list(cache.glob("*.arrow"))) == 3
    again = ShardSource(paths)
    assert built == ["0.tar", "1.tar", "2.tar"]
    monkeypatch.setenv("ELIP_CACHE", "")
    assert read(first) == read(again) == read(ShardSource(paths))
    ids = ["0.tar:00", "1.tar:10", "1.tar:11", "2.tar:20", "2.tar:21", "2.tar:22"]
    assert [sample.id for sample in first] == ids
    assert read(pickle.loads(pickle.dumps(again))) == read(first)
    assert [each.name for each in cache.iterdir() if each.suffix != ".arrow"] == []


def test_a_changed_shard_is_indexed_again(tmp_path, cache, monkeypatch):
    path, built = three(tmp_path)[0], counted(monkeypatch)
    assert len(ShardSource(path)) == 1
    shard(path)
    os.utime(path, ns=(1, 1))
    (old,) = cache.iterdir()
    assert len(ShardSource(path)) == 6 and built == ["0.tar", "0.tar"]
    (new,) = cache.iterdir()
    assert new != old


def warm(tmp_path, cache):
    """Return a shard, what is read from it, and its cached table."""
    path = three(tmp_path)[2]
    expected = read(ShardSource(path))
    (table,) = cache.glob("*.arrow")
    return path, expected, table


@pytest.mark.parametrize("seed", range(20))
def test_a_table_with_wrong_bytes_is_built_again_and_warns(seed, tmp_path, cache):
    path, expected, table = warm(tmp_path, cache)
    content, random = bytearray(table.read_bytes()), np.random.default_rng(seed)
    for at in random.choice(len(content), 1 + seed % 8, replace=False):
        content[at] ^= 1 << random.integers(8)
    table.write_bytes(content)
    with pytest.warns(
        UserWarning, match=r"index of 1 of 1 tar shards is damaged, such as that of .*2\.tar; it is"
    ):
        source = ShardSource(path)
    assert read(source) == expected
    assert read(ShardSource(path)) == expected


def without_rows(content):
    with pyarrow.ipc.open_stream(content) as stream:
        schema = stream.schema
    sink = pyarrow.BufferOutputStream()
    pyarrow.ipc.new_stream(sink, schema).close()
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    "damaged",
    [lambda c: c[:100], lambda c: b"", without_rows, lambda c: c + b"\0", lambda c: c[:-8]],
    ids=["truncated", "empty", "no-rows", "longer", "no-checksum"],
)
def test_a_table_that_is_not_whole_is_built_again(damaged, tmp_path, cache):
    path, expected, table = warm(tmp_path, cache)
    whole = table.read_bytes()
    table.write_bytes(damaged(whole))
    with pytest.warns(UserWarning, match="is damaged, such as that of .*; it is built again"):
        assert read(ShardSource(path)) == expected
    assert table.read_bytes() == whole


def test_the_table_of_another_shard_is_not_used(tmp_path, cache):
    paths = three(tmp_path)[1:]
    expected = read(ShardSource(paths))
    first, second = cache.glob("*.arrow")
    first.write_bytes(second.read_bytes())
    with pytest.warns(UserWarning, match="is damaged, such as that of .*; it is built again"):
        assert read(ShardSource(paths)) == expected


@pytest.mark.parametrize("replace", ["renamed", "in-place"])
def test_a_shard_replaced_with_equal_size_and_time_is_indexed_again(replace, tmp_path, cache):
    path = three(tmp_path)[2]
    ShardSource(path)
    before = path.stat()
    content = path.read_bytes().replace(b"a caption", b"another c")
    other = path if replace == "in-place" else tmp_path / "other.tar"
    other.write_bytes(content)
    other.replace(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert {sample.captions for sample in ShardSource(path)} == {("another c",)}


@pytest.mark.parametrize("blocked", [".arrow", ".lock"])
def test_a_table_that_cannot_be_written_warns_and_is_not_cached(blocked, tmp_path, cache):
    path, expected, table = warm(tmp_path, cache)
    table.unlink()
    table.with_suffix(blocked).mkdir()
    with pytest.warns(UserWarning, match="the index of tar shards is not cached"):
        assert read(ShardSource(path)) == expected


def test_small_shards_are_not_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("ELIP_CACHE", str(tmp_path / "cache"))
    assert len(ShardSource(three(tmp_path))) == 6
    assert not list((tmp_path / "cache").rglob("*.arrow"))


def test_an_unwritable_cache_folder_warns_and_is_not_used(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ELIP_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(shard_index, "MIN_CACHED_BYTES", 1)
    with pytest.warns(UserWarning, match="the index of tar shards is not cached"):
        assert len(ShardSource(three(tmp_path))) == 6


@pytest.mark.slow
def test_several_processes_build_each_shard_once(tmp_path, cache):
    paths = [shard(tmp_path / f"{n}.tar") for n in range(8)]
    code = (
        "import sys; from pathlib import Path\n"
        "from elip_models.pretraining.data import shard_index as s\n"
        "s.MIN_CACHED_BYTES = 1; table = s._shard_table\n"
        "def loud(path): print(path.name); return table(path)\n"
        "s._shard_table = loud; s.read_index([Path(each) for each in sys.argv[1:]])"
    )
    command = [sys.executable, "-c", code, *map(str, paths)]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [line for run in runs for line in run.communicate(timeout=120)[0].splitlines()]
    assert [run.returncode for run in runs] == [0, 0]
    assert sorted(said) == sorted(path.name for path in paths)


@pytest.mark.slow
def test_large_shards_are_indexed_by_several_processes(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(shard_index, "MIN_SHARED_BYTES", 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    started, popen = [], subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1]
    )
    assert len(ShardSource(three(tmp_path))) == 6
    assert [helper.returncode for helper in started] == [0, 0]
