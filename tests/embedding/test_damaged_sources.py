"""Of damaged images and archives every one is embedded or listed, whatever the damage."""

import random
import warnings

import pytest
from pyarrow import parquet

import elip_models
from elip_models.embedding.encoder import open_encoder
from elip_models.validation import ConfigError
from tests.helpers.damage import damaged, picture, shard
from tests.helpers.tiny_run import own_process

OPTIONS = {"workers": 0, "batch_size": 4, "shard_size": 5}
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


@pytest.fixture(scope="module")
def encoder(model):
    return open_encoder(model)


def damaged_folder(folder, rng):
    for i in range(12):
        content = picture(i, format=rng.choice(FORMATS), size=(30, 20))
        for _ in range(rng.randrange(4)):
            content = damaged(content, rng) or b"\0"
        (folder / f"{i}.png").write_bytes(content)
    return folder


def damaged_tar(folder, rng):
    path = shard(folder / "images.tar")
    content = path.read_bytes()
    for _ in range(1 + rng.randrange(3)):
        content = damaged(content, rng)
    path.write_bytes(content)
    return path


def check(encoder, kind, seed, tmp_path):
    (tmp_path / "in").mkdir()
    source = kind(tmp_path / "in", random.Random(seed))
    with own_process(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = elip_models.embed(encoder, source, tmp_path / "out", **OPTIONS)
        except ConfigError as error:
            assert kind is damaged_tar and str(error).startswith("source: ")
            return 0
    tables = [parquet.read_table(tmp_path / "out" / name) for name in ("images", "skipped.parquet")]
    assert found.embedded + found.skipped == found.found == sum(map(len, tables))
    keys = [key for table in tables for key in table["key"].to_pylist()]
    assert kind is damaged_tar or len(set(keys)) == found.found == 12
    assert all(tables[1]["reason"].to_pylist())
    return found.skipped


def test_a_damaged_source_adds_up(encoder, tmp_path):
    assert check(encoder, damaged_folder, 3, tmp_path) > 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 125))
@pytest.mark.parametrize("kind", [damaged_folder, damaged_tar])
def test_fifty_damaged_sources_add_up(encoder, kind, seed, tmp_path):
    check(encoder, kind, seed, tmp_path)
