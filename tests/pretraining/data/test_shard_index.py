"""Tar shards on disk: a damaged shard is named, and the index is built once."""

import gzip
import os
import pickle
import tarfile
from functools import partial

import datasets
import pytest

from elip_models.pretraining.data import ShardSource
from tests.helpers.damage import BLOCK, headers, overwrite, picture, shard

DAMAGED = r"s\.tar: expected a complete, uncompressed tar, got .*; remove it, or download"


def read(source):
    return [(sample.id, sample.captions, sample.image.tobytes()) for sample in source]


def three(folder):
    """Return three shards of one, two and three samples."""
    return [
        shard(folder / f"{n}.tar", [(f"{n}{i}.{end}", picture() if end == "png" else b"a caption")
                                    for i in range(n + 1) for end in ("png", "txt")])
        for n in range(3)
    ]  # fmt: skip


def appended(path):
    other = shard(path.with_name("o.tar"), [("z.txt", b"last")])
    path.write_bytes(path.read_bytes() + other.read_bytes())


def never_written(path):
    os.truncate(path, headers(path)[6])
    os.truncate(path, 10**6)


def zeroed(path, first, last):
    at = headers(path)
    overwrite(path, at[first], bytes(at[last] - at[first]))


DAMAGES = {
    **{
        f"header {number}": lambda path, at=number: overwrite(path, headers(path)[at] + 3, b"\xff")
        for number in range(12)
    },
    "zeros first": partial(zeroed, first=0, last=4),
    "zeros within": partial(zeroed, first=4, last=6),
    "rest never written": never_written,
    "a second tar": appended,
    "a text": lambda path: path.write_bytes(b"text" * 300),
    "compressed": lambda path: path.write_bytes(gzip.compress(path.read_bytes())),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_shard_is_named(damage, tmp_path):
    path = shard(tmp_path / "s.tar")
    damage(path)
    with pytest.raises(ValueError, match=DAMAGED):
        ShardSource(path)


def test_a_truncated_shard_is_named_wherever_it_is_cut(tmp_path):
    content = shard(tmp_path / "whole.tar").read_bytes()
    end = headers(tmp_path / "whole.tar")[-1] + 2 * BLOCK
    path = tmp_path / "s.tar"
    for size in (*range(0, end, 391), end):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=DAMAGED):
            ShardSource(path)
    path.write_bytes(content[: end + BLOCK])  # some programs write one block of zeros at the end
    assert len(ShardSource(path)) == 6


def test_the_index_is_built_once_and_again_for_a_changed_shard(tmp_path, monkeypatch):
    paths = three(tmp_path)
    first = ShardSource(paths)
    ids = ["0.tar:00", "1.tar:10", "1.tar:11", "2.tar:20", "2.tar:21", "2.tar:22"]
    assert [sample.id for sample in first] == ids
    with monkeypatch.context() as no_tar:
        no_tar.setattr(tarfile, "open", None)
        again = ShardSource(paths)
    assert read(again) == read(first) == read(pickle.loads(pickle.dumps(again)))
    before = paths[2].stat()
    content = paths[2].read_bytes().replace(b"a caption", b"another c")
    paths[2].write_bytes(content)
    os.utime(paths[2], ns=(before.st_atime_ns, before.st_mtime_ns))
    assert ShardSource(paths).captions(5) == ("another c",)


def test_a_cache_that_cannot_be_written_is_named_with_its_remedy(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    with pytest.raises(OSError, match=r"^paths: the index.*Not a directory.*HF_DATASETS_CACHE"):
        ShardSource(three(tmp_path))
