"""Tar shards that are not on disk: their specification, and their samples in order.

{stream: "https://host/cc12m-{0000..1242}.tar", samples: 10000000}
https://host/cc12m-{0000..1242}.tar,samples=10000000
"""

import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import fsspec

from elip_models.images import SampleError, decode_image
from elip_models.pretraining.data.data_spec import expand_ranges
from elip_models.pretraining.data.read_errors import DataError, SkipReport
from elip_models.pretraining.data.sample import Sample
from elip_models.pretraining.data.streams import PIPE, WEB, StreamTar, redacted, scheme_of
from elip_models.pretraining.data.tar_members import MORE_LOST
from elip_models.pretraining.data.tar_samples import TarSample, read_samples
from elip_models.validation import PositiveInt, Size, check_fields, did_you_mean

_URL = re.compile(rf"{PIPE}|[a-z][a-z0-9+.-]*://")
_OPTIONS = re.compile(r",(samples|resample|shuffle)=(\w+)$")
_VALUES = {"true": True, "false": False}
_FORM = "{stream: 'https://host/train-{0000..0099}.tar', samples: 1000000}"

MAX_IN_A_ROW = 1000
"""Consecutive unreadable samples that stop a run."""
LOST_SHARD = 50
"""Number of unreadable samples that a completely unreadable shard counts as."""


@dataclass(frozen=True)
class StreamSpec:
    """URLs of shards and how they are read.

    Args:
        stream: URLs, with ranges such as {0000..0012}: https://, hf://, any other that fsspec
            opens, or "pipe:" and a shell command that writes a tar.
        samples: Number of samples in an epoch, which sets the steps of `optim.epochs`. The stream
            is not counted, and reading never ends.
        resample: True: each reader draws its shards with replacement. False: all shards are read
            before one is read again, and there must be at least one for each reader.
        shuffle: Size of the shuffle buffer of a reader, in samples; 1 keeps the order.
    """

    stream: tuple[str, ...]
    samples: PositiveInt
    resample: bool = False
    shuffle: Size = 1000

    def __post_init__(self) -> None:
        check_fields(self)


def is_stream(spec: Any) -> bool:
    """Return whether a specification names shards that are not on disk."""
    if isinstance(spec, Mapping):
        return "stream" in spec
    return isinstance(spec, str) and _URL.match(spec) is not None


def open_stream(spec: str | Mapping[str, Any], *, samples: int | None = None) -> "StreamSource":
    """Return the shards that `spec` names, without opening any of them.

    Args:
        spec: One line or a mapping, see `StreamSpec`.
        samples: Number of samples in an epoch if `spec` does not set it.

    Raises:
        TypeError, ValueError: The specification is malformed, or no library opens such a URL.
    """
    given: dict[str, Any] = {} if samples is None else {"samples": samples}
    given |= _parts(spec) if isinstance(spec, str) else spec
    known = [field.name for field in fields(StreamSpec)]
    for name in given:
        if name not in known:
            raise ValueError(
                f"spec: expected {', '.join(known)}, got {name!r} in {redacted(spec)!r}"
                f"{did_you_mean(name, known)}"
            )
    if "samples" not in given:
        raise ValueError(
            f"spec: expected samples, the number in an epoch, got {redacted(spec)!r}; "
            f"write {_FORM}, or append ,samples=1000000"
        )
    urls = given.pop("stream")
    urls = (urls,) if isinstance(urls, str) else urls
    stream = tuple(urls) if isinstance(urls, list | tuple) else urls
    return StreamSource(StreamSpec(stream, **given))


def _parts(spec: str) -> dict[str, Any]:
    """Split options off the end, so that a URL or a command may contain commas."""
    found: dict[str, Any] = {}
    while option := _OPTIONS.search(spec):
        name, value = option.groups()
        if name in found:
            raise ValueError(f"spec: expected {name} once, got it again in {redacted(spec)!r:.200}")
        number = int(value) if value.isdecimal() and len(value) < 20 else value
        found[name] = _VALUES.get(value, number)
        spec = spec[: option.start()]
    return {"stream": spec, **found}


class ShardEnd(NamedTuple):
    """End of a shard; `problem` is why it is incomplete, or ""."""

    key: str
    problem: str

    def check(self) -> None:
        """Raise SampleError if the shard is incomplete."""
        if self.problem:
            raise SampleError(self.key, f"{self.problem}; {MORE_LOST}")


class StreamSource:
    """Shards of a `StreamSpec`. Its length is the number of samples in an epoch."""

    def __init__(self, spec: StreamSpec) -> None:
        self.spec = spec
        self.shards = [shard for url in spec.stream for shard in expand_ranges(url)]
        if not self.shards:
            raise ValueError(f"stream: expected at least one URL, such as {_FORM}, got none")
        for shard in self.shards:
            _check_url(shard)

    def __len__(self) -> int:
        return self.spec.samples

    def read(self, number: int) -> Iterator[TarSample | ShardEnd]:
        """Yield the stored samples of a shard, what is lost, and a ShardEnd."""
        url = self.shards[number]
        name, problem, is_empty = _shard_name(url, number), "", True
        with StreamTar(url) as tar:
            try:
                for sample in read_samples(tar, name):
                    is_empty = False
                    yield sample._replace(key=f"{name}:{sample.key}")
            except ValueError as error:
                problem = str(error)
            yield ShardEnd(name, tar.problem or problem or ("no sample" if is_empty else ""))

    def first_captions(self, count: int) -> Iterator[tuple[str, ...]]:
        """Yield the captions of the first `count` readable samples; no image is decoded.

        Raises DataError if none of the first thousand can be read.
        """
        found, skipped = 0, []
        for number in range(len(self.shards)):
            for each in self.read(number):
                if each.problem:
                    skipped.append((each.key, each.problem))
                elif isinstance(each, TarSample):
                    yield each.captions
                    found += 1
                    if found == count:
                        return
            if not found and len(skipped) + LOST_SHARD * (number + 1) >= MAX_IN_A_ROW:
                break
        if not found:
            raise DataError(f"no readable sample: {SkipReport.from_skipped(skipped).summary()}")

    def check(self, limit: int | None = None) -> tuple[SkipReport, list[str]]:
        """Read every shard once, or the first `limit` samples.

        Returns the report of unreadable samples and incomplete shards, and all other captions.
        """
        report = SkipReport()
        captions: list[str] = []
        everything = (each for number in range(len(self.shards)) for each in self.read(number))
        for each in everything:
            try:
                if isinstance(each, ShardEnd):
                    each.check()
                    continue
                captions += decode_stored(each).captions
                report.record([], 1)
            except SampleError as error:
                report.record([(error.id, error.reason)], 1)
            if report.seen == limit:
                break
        return report, captions


def decode_stored(stored: TarSample) -> Sample:
    """Decode a stored sample. Raises SampleError if it cannot be read."""
    if stored.problem:
        raise SampleError(stored.key, stored.problem)
    image = decode_image(io.BytesIO(stored.image), stored.key)
    return Sample(image, stored.captions, stored.key)


def _shard_name(url: str, number: int) -> str:
    """Return the file name of a shard, or its command and number, for the ids of its samples."""
    if url.startswith(PIPE):
        return f"{redacted(url)} [{number}]"
    return PurePosixPath(urlsplit(url).path).name or redacted(url)


def _check_url(url: str) -> None:
    if url.startswith(PIPE):
        return
    if not is_stream(url):
        raise ValueError(
            f"stream: expected https://, hf:// or pipe:COMMAND, got {redacted(url)!r:.200}"
        )
    if "{" in url or "}" in url:
        raise ValueError(
            f"stream: expected ranges such as {{0000..0012}}, not one in another, got "
            f"{redacted(url)!r:.200}"
        )
    try:
        urlsplit(url)
        if scheme_of(url) not in WEB:
            fsspec.get_filesystem_class(scheme_of(url))
    except (ImportError, ValueError) as error:
        raise ValueError(f"stream: {redacted(url)!r:.200} cannot be opened: {error}") from error
