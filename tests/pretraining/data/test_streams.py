"""Streams of tar shards that are not on disk, their errors, and the secrets in their URLs."""

import fsspec
import pytest

from elip_models.images import SampleError
from elip_models.pretraining.data import DataError, ShardSource, open_stream, streams
from elip_models.pretraining.data.streams import DownloadedShard
from tests.helpers.damage import headers, overwrite, shard
from tests.helpers.streaming import served


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(streams, "_RETRY_DELAYS", (0.0, 0.0))


def contents(source):
    """Return the samples of a source or a shard, and the reasons of those that are lost."""
    samples, lost = {}, {}
    for index in range(len(source)):
        try:
            sample = source[index]
            samples[sample.id] = (sample.captions, sample.image.tobytes())
        except SampleError as error:
            lost[error.id] = error.reason
    return samples, lost


@pytest.mark.parametrize(
    "url", ["{web}/a.tar?token=1", "file://{folder}/a.tar", "memory://b/a.tar"]
)
def test_a_stream_gives_the_same_samples_as_the_file(tmp_path, url):
    path = shard(tmp_path / "a.tar")
    overwrite(path, headers(path)[2] + 512, bytes(range(256)))  # the image k1
    fsspec.filesystem("memory").pipe("/b/a.tar", path.read_bytes())
    with served(tmp_path) as web:
        downloaded = DownloadedShard(url.format(web=web, folder=tmp_path))
    samples, lost = contents(downloaded)
    assert (samples, lost) == contents(ShardSource(path))
    assert downloaded.problem == "" and len(samples) == 5 and lost.keys() == {"a.tar:k1"}


@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_download_is_tried_again(tmp_path, ranges):
    expected = contents(ShardSource(shard(tmp_path / "a.tar")))
    with served(tmp_path, ranges=ranges, breaks=2) as web:
        assert contents(DownloadedShard(f"{web}/a.tar")) == expected
    with served(tmp_path, ranges=ranges, breaks=99) as web:
        broken = DownloadedShard(f"{web}/a.tar")
    assert len(broken) == 0 and broken.problem


def test_a_shard_that_cannot_be_read_has_a_reason(tmp_path):
    (tmp_path / "page.tar").write_text("<html>" + "not here " * 100)
    shard(tmp_path / "none.tar", [("a.mp4", b"no image")])
    cut = shard(tmp_path / "cut.tar")
    cut.write_bytes(cut.read_bytes()[:5000])
    with served(tmp_path) as web:
        problems = {
            name: DownloadedShard(f"{web}/{name}.tar").problem
            for name in ("a", "page", "none", "cut")
        }
    assert problems["a"].startswith("ClientResponseError: 404, message='Not Found', url='http://")
    assert "another file (invalid header)" in problems["page"]
    assert problems["none"].startswith("expected members that end in jpeg, jpg, png")
    assert "another file (unexpected end of data)" in problems["cut"]
    assert "Cannot connect to host" in DownloadedShard(f"{web}/a.tar").problem


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("https://host/a.tar", "expected samples, the number in an epoch"),
        ({"stream": [], "samples": 5}, "at least one URL"),
        ({"stream": "a.tar", "samples": 5}, "expected URLs such as https://.*got 'a.tar'"),
        ({"stream": "pipe:cat a.tar", "samples": 5}, "expected URLs such as https://"),
        ({"stream": "https://host/a.tar", "samples": 0}, "samples: expected an integer at least 1"),
        ({"stream": "https://host/a.tar", "sample": 5}, "did you mean 'samples'"),
        ("nothing://host/a.tar,samples=5", "cannot be opened: Protocol not known: nothing"),
        ("https://h/{0..9999}/{0..999}.tar,samples=5", "at most 1000000 names"),
        ("https://h/{a,b}.tar,samples=5", "braces other than"),
    ],
)
def test_bad_specs(spec, message):
    with pytest.raises(ValueError, match=message):
        open_stream(spec)


SECRET = "hunter-2/x"


@pytest.mark.parametrize(
    "url",
    [
        f"https://user:{SECRET}@127.0.0.1:1/a.tar",
        f"https://user:p@127.0.0.1:1/a.tar?X-Amz-Signature={SECRET}",
        f"memory://bucket/none.tar?{SECRET}",
    ],
)
def test_secrets_are_in_no_message(url):
    source = open_stream({"stream": url, "samples": 5})
    report, _ = source.check()
    assert report.reasons and "hunter" not in report.summary()
    with pytest.raises(DataError) as error:
        list(source.first_captions(1))
    assert "hunter" not in str(error.value)
    for wrong in ({"stream": url}, {"stream": url, "sample": 5}, {"stream": url + "{9..1}"}):
        with pytest.raises(ValueError, match=r"^spec: ") as error:
            open_stream(wrong)
        assert "hunter" not in str(error.value)
