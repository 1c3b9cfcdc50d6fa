"""Every door by which a tar comes in ends with an error that names the file and the remedy."""

import io
import signal
import tarfile
from contextlib import contextmanager

import pytest

from elip_models.embedding.source import Stored, open_images, read_payload
from elip_models.images import SampleError
from elip_models.pretraining.data import ShardSource, open_source, open_stream
from elip_models.pretraining.data.tar_members import members_of, open_tar
from elip_models.validation import ConfigError
from tests.helpers.hostile_tars import TARS, member, pax, record
from tests.helpers.tiers import slow_except
from tests.helpers.tiny_run import elip

SECONDS = 20
REMEDY = "s.tar: expected a complete, uncompressed tar, .*; remove it, or download or pack it again"


@contextmanager
def limit():
    """Raise an error in a block that takes too long."""

    def stop(number, frame):
        raise TimeoutError(f"over {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def hostile(request, tmp_path):
    path = tmp_path / "s.tar"
    path.write_bytes(TARS[request.param])
    return path


def by_index(path):
    with pytest.raises(ValueError, match=REMEDY):
        ShardSource(path)


def by_training_data(path):
    with pytest.raises(ValueError, match=REMEDY):
        open_source(str(path), image_size=32)


def by_stream(path):
    report, _ = open_stream({"stream": f"file://{path}", "samples": 5}).check()
    [(name, reason)] = report.reasons
    assert name == "s.tar" and reason.endswith("remove it, or download or pack it again")


def by_embed(path):
    """Images before the damage are read; the rest is one image that is skipped."""
    try:
        images = open_images(path)
    except ConfigError as error:
        assert "s.tar is no tar file (" in str(error)
        return
    *whole, last = images.payloads(0, len(images))
    assert isinstance(last, SampleError) and "the tar file is damaged from byte" in last.reason
    assert all(isinstance(image, Stored) and read_payload(image) for image in whole)


def by_command(path):
    assert elip("data", "check", path) == 2


DOORS = [by_index, by_training_data, by_stream, by_embed, by_command]
MAIN = ["size of a step back", "digits", "digits, first"]


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
@pytest.mark.parametrize("hostile", slow_except(MAIN, TARS), indirect=True)
def test_a_tar_that_would_not_end_is_an_error(door, hostile):
    with limit():
        door(hostile)


def test_long_names_and_comments_of_whole_tars_are_read():
    long = "a" * 200 + "/" + "b" * 150 + ".png"
    for format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=format) as tar:
            info = tarfile.TarInfo(long)
            info.pax_headers = {"comment": "é=\n" * 50, "SCHILY.xattr.user.a": "\x01"}
            tar.addfile(info)
        file.seek(0)
        with open_tar(file) as tar:
            assert [found.name for found in members_of(tar)] == [long]
    file = io.BytesIO(pax(record(b"mtime", b"1.5")) + member("a.png", b"x") + bytes(1024))
    with open_tar(file) as tar:
        assert [(found.name, found.mtime) for found in members_of(tar)] == [("a.png", 1.5)]
