"""Streams of tar shards that are not on disk, and their errors."""

import os
import re
import time
import warnings

import fsspec
import pytest

from elip_models.images import SampleError
from elip_models.pretraining.data import (
    DataError,
    ShardSource,
    open_source,
    open_stream,
    streams,
    tar_members,
)
from elip_models.pretraining.data.stream_source import ShardEnd, decode_stored
from elip_models.pretraining.data.tar_members import BLOCK
from tests.helpers.damage import SIX_GIGABYTES, header, headers, overwrite, picture, shard
from tests.helpers.streaming import served

ADDRESS = re.compile("0x[0-9a-f]+")
NO_HEADER = bytes(range(256)) * 2
LOST = "connection lost, and the server does not support range requests"


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(streams, "_RETRY_DELAYS", (0.0, 0.0))


def read(*urls):
    """Return the samples by key, the reasons of lost samples by key, and the ends of shards."""
    source, samples, lost, ends = open_stream({"stream": urls, "samples": 9}), {}, {}, []
    for number in range(len(source.shards)):
        for each in source.read(number):
            if isinstance(each, ShardEnd):
                ends.append(tuple(each))
                continue
            try:
                sample = decode_stored(each)
                samples[sample.id] = (sample.captions, sample.image.tobytes())
            except SampleError as error:
                lost[error.id] = ADDRESS.sub("", error.reason)
    return samples, lost, ends


def stored(path):
    """Return the samples and the reasons of lost samples of a tar on disk."""
    samples, lost = {}, {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is damaged
        source = ShardSource(path)
    for index in range(len(source)):
        try:
            sample = source[index]
            samples[sample.id] = (sample.captions, sample.image.tobytes())
        except SampleError as error:
            lost[error.id] = ADDRESS.sub("", error.reason)
    return samples, lost


def whole(path):
    shard(path)


def damaged_header(path):
    shard(path)
    overwrite(path, headers(path)[4], NO_HEADER)


def damaged_image(path):
    shard(path)
    overwrite(path, headers(path)[2] + BLOCK, NO_HEADER)


def cut(path):
    shard(path)
    os.truncate(path, headers(path)[6] + BLOCK + 20)


def doubled(path):
    shard(path, [("a.png", picture()), ("a.jpg", picture(1)), ("a.txt", b"one")])


def appended(path):
    shard(path)
    path.write_bytes(
        path.read_bytes() + shard(path, [("z.png", picture()), ("z.json", b"[")]).read_bytes()
    )


def claims_gigabytes(path):
    shard(path)
    path.write_bytes(
        path.read_bytes()[: headers(path)[2]] + header("big.png", SIX_GIGABYTES) + b"few"
    )


def claims_a_long_name(path):
    shard(path)
    name = header("././@LongLink", SIX_GIGABYTES, b"L")
    path.write_bytes(path.read_bytes()[: headers(path)[2]] + name + path.read_bytes()[:BLOCK])


@pytest.mark.parametrize(
    "make",
    [
        whole,
        damaged_header,
        damaged_image,
        cut,
        doubled,
        appended,
        claims_gigabytes,
        claims_a_long_name,
    ],
)
def test_a_stream_gives_the_same_samples_as_the_file(tmp_path, make):
    path = tmp_path / "a.tar"
    make(path)
    with served(tmp_path) as url:
        samples, lost, ends = read(f"{url}/a.tar?token=1")
    assert (samples, lost) == stored(path)
    assert samples or lost
    assert ends == [("a.tar", "")]


def test_every_kind_of_url(tmp_path):
    path = shard(tmp_path / "a.tar")
    fsspec.filesystem("memory").pipe("/bucket/a.tar", path.read_bytes())
    expected, _ = stored(path)
    assert read("memory://bucket/a.tar") == (expected, {}, [("a.tar", "")])
    command = f"pipe:cat {path}"
    samples, lost, ends = read(command)
    name = "pipe:cat *** [0]"
    assert {key.replace(name, "a.tar"): value for key, value in samples.items()} == expected
    assert (lost, ends) == ({}, [(name, "")])


def test_hub_urls_are_supported():
    source = open_stream("hf://datasets/someone/pairs/train-{00..02}.tar,samples=5,shuffle=7")
    assert source.shards[2] == "hf://datasets/someone/pairs/train-02.tar"
    assert (len(source), source.spec.shuffle, source.spec.resample) == (5, 7, False)


def test_an_interrupted_download_is_resumed(tmp_path):
    expected, _ = stored(shard(tmp_path / "a.tar"))
    with served(tmp_path, breaks_after=3000) as url:
        assert read(f"{url}/a.tar") == (expected, {}, [("a.tar", "")])


def test_samples_before_an_unrecoverable_interruption_are_kept(tmp_path):
    path = shard(tmp_path / "a.tar")
    end = headers(path)[4]
    with served(tmp_path, ranges=False, breaks_after=end) as url:
        samples, lost, ends = read(f"{url}/a.tar", f"{url}/a.tar")
    assert list(samples) == ["a.tar:k0", "a.tar:k1"]
    assert lost == {f"a.tar:byte {end}": "the end marker of the tar is missing; more may be lost"}
    problem = f"interrupted at byte {end}: {LOST}"
    assert ends == [("a.tar", problem)] * 2


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("cat {}; ls // >&2; exit 3", "interrupted at byte {size}: exit status 3: "),
        ("cat missing.tar", "exit status 1: cat: ***: No such file or directory"),
        ("kill -9 $$", "exit status -9"),
        ("true", "expected a complete, uncompressed tar"),
        ("seq 1000", "expected a complete, uncompressed tar, got another format"),
        ("sleep 60", "no data for 0.4 seconds"),
    ],
)
def test_a_failed_command_is_reported(tmp_path, monkeypatch, command, problem):
    path = shard(tmp_path / "a.tar")
    monkeypatch.setattr(streams, "_TIMEOUT", 0.4)
    command = "pipe:" + command.format(path)
    start = time.monotonic()
    _, _, [(name, what)] = read(command)
    assert time.monotonic() - start < 10
    program = command.partition(" ")[0]
    assert name == (program if program == command else f"{program} ***") + " [0]"
    assert problem.format(size=path.stat().st_size) in what


def test_closing_the_reader_ends_the_command(tmp_path):
    path, pid = shard(tmp_path / "a.tar"), tmp_path / "pid"
    entries = open_stream(f"pipe:echo $$ > {pid}; cat {path} /dev/zero,samples=6").read(0)
    next(entries)
    entries.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_http_errors_are_reported(tmp_path):
    (tmp_path / "page.tar").write_text("<html>" + "not here " * 100)
    shard(tmp_path / "none.tar", [("a.mp4", b"no image")])
    with served(tmp_path) as url:
        _, _, ends = read(f"{url}/a.tar", f"{url}/page.tar", f"{url}/none.tar")
    assert ends[0] == ("a.tar", "HTTP Error 404: Not Found")
    assert "got another format" in ends[1][1]
    assert ends[2] == ("none.tar", "no sample")
    _, _, [(_, what)] = read(f"{url}/a.tar")
    assert "Connection refused" in what


def test_members_that_are_not_adjacent_are_reported(tmp_path):
    members = [("a.png", picture()), ("b.png", picture()), ("a.txt", b"a"), ("b.txt", b"b")]
    _, lost, _ = read(f"pipe:cat {shard(tmp_path / 'a.tar', members)}")
    reasons = {key.rpartition(":")[2]: reason for key, reason in lost.items()}
    assert reasons == {
        "a": "no caption; the members of a sample in a stream must be adjacent",
    }


def test_too_large_members_are_skipped_without_buffering(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "_MAX_BUFFER_BYTES", 2**12)
    monkeypatch.setattr(streams, "_CHUNK", 2**10)
    held, more = [], streams.StreamTar._read_chunk
    monkeypatch.setattr(
        streams.StreamTar, "_read_chunk", lambda tar: held.append(len(tar._buffer)) or more(tar)
    )
    members = [("a.mp4", bytes(2**20)), ("a.png", picture()), ("a.txt", b"a")]
    content = shard(tmp_path / "a.tar", members).read_bytes()
    fsspec.filesystem("memory").pipe("/bucket/a.tar", content)
    assert read("memory://bucket/a.tar")[0].keys() == {"a.tar:a"}
    assert max(held) < 2**15 + 2**12  # what is looked through for a header, and what may be held


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("https://host/a.tar", "expected samples, the number in an epoch"),
        ({"stream": [], "samples": 5}, "at least one URL"),
        ({"stream": "a.tar", "samples": 5}, "expected https://.*got 'a.tar'"),
        ({"stream": "https://host/a.tar", "samples": 0}, "samples: expected an integer at least 1"),
        ({"stream": "https://host/a.tar", "sample": 5}, "did you mean 'samples'"),
        ("nothing://host/a.tar,samples=5", "cannot be opened: Protocol not known: nothing"),
        ("https://host/{3..1}.tar,samples=5", "expected a rising range"),
        ("https://h/{0..99999999999}.tar,samples=5", r"at most 1000000 names .* got 1e\+11 names"),
        ("https://h/" + "{0..9}" * 5000 + ".tar,samples=5", "got inf names"),
        ("https://h/{0..9999}/{0..999}.tar,samples=5", "at most 1000000 names"),
        ("https://h/{{0..9}..{0..9}}.tar,samples=5", "not one in another"),
        ("https://h/{a,b}.tar,samples=5", "expected ranges such as"),
        ("https://h/a.tar,samples=5,samples=6", "expected samples once"),
        ("https://h[/a.tar,samples=5", "cannot be opened: Invalid IPv6 URL"),
    ],
)
def test_bad_specs(spec, message):
    with pytest.raises(ValueError, match=message):
        open_stream(spec)


def test_ranges_without_end_are_not_recursive():
    source = open_stream("https://h/" + "{0..0}" * 5000 + "{08..10}.tar,samples=5")
    assert [url[-6:] for url in source.shards] == ["08.tar", "09.tar", "10.tar"]


SECRET = "hunter-2/x"
WITH_SECRET = (
    f"https://user:{SECRET}@127.0.0.1:1/a.tar",
    f"https://user:p@127.0.0.1:1/a.tar?X-Amz-Signature={SECRET}",
    f"memory://bucket/none.tar?{SECRET}",
    f"pipe:echo '{SECRET}' >&2; false",
    f"pipe:TOKEN={SECRET} sh -c 'echo $TOKEN >&2; exit 3'",
)


@pytest.mark.parametrize("url", WITH_SECRET)
def test_secrets_are_in_no_message(url):
    source = open_stream({"stream": url, "samples": 5})
    report, _ = source.check()
    assert report.reasons and SECRET not in report.summary() and "hunter" not in report.summary()
    with pytest.raises(DataError) as error:
        list(source.first_captions(1))
    assert "hunter" not in str(error.value)
    for wrong in ({"stream": url}, {"stream": url, "sample": 5}, {"stream": url + "{9..1}"}):
        with pytest.raises(ValueError, match=r"^spec: ") as error:
            open_stream(wrong)
        assert "hunter" not in str(error.value)


@pytest.mark.parametrize("tail", ["cat /dev/zero", "yes", "cat /dev/urandom"])
def test_a_stream_that_never_ends_is_ended_as_damaged(tmp_path, monkeypatch, tail):
    monkeypatch.setattr(tar_members, "_MAX_GAP", 2**22)
    path = shard(tmp_path / "a.tar")
    samples, lost, _ = read(f"pipe:cat {path}; {tail}")
    assert len(samples) == 6
    assert [reason.endswith("is not read; more may be lost") for reason in lost.values()] == [True]


@pytest.mark.parametrize("option", ["resample=2", "shuffle=few", "samples=true"])
def test_options_of_another_type(option):
    with pytest.raises(TypeError, match=f"{option.partition('=')[0]}: expected"):
        open_stream(f"https://host/a.tar,{option}", samples=5)


def test_open_source_refuses_a_stream():
    with pytest.raises(ValueError, match=r"whose samples can be counted, got 'pipe:cat \*\*\*'"):
        open_source("pipe:cat a.tar", image_size=8)


def test_first_captions(tmp_path):
    path = shard(tmp_path / "a.tar")
    source = open_stream({"stream": ["pipe:false", f"pipe:cat {path}"], "samples": 6})
    assert list(source.first_captions(2)) == [("caption of k0",), ("caption of k1",)]
    assert len(list(source.first_captions(9))) == 6
    report, captions = source.check(limit=4)
    assert (report.seen, len(captions), list(report.reasons)) == (
        4,
        3,
        [("pipe:false [0]", "exit status 1; more may be lost")],
    )
