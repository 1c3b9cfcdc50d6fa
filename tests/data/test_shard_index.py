"""The cached index of large tar shards."""

import os
import pickle
import subprocess
import sys

import pytest

from elip_models.data import ShardSource, shard_index
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


def test_a_damaged_table_is_built_again(tmp_path, cache):
    path = three(tmp_path)[2]
    expected = read(ShardSource(path))
    (table,) = cache.glob("*.arrow")
    table.write_bytes(table.read_bytes()[:100])
    assert read(ShardSource(path)) == expected
    assert table.stat().st_size > 100


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
        "import sys; from pathlib import Path; from elip_models.data import shard_index as s\n"
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
