"""Tar shards that are not on disk: https://, hf://, s3:// and every other URL that fsspec opens.

{stream: "https://host/cc12m-{0000..1242}.tar", samples: 10000000}
https://host/cc12m-{0000..1242}.tar,samples=10000000

A shard is downloaded to a temporary file and then read like one on disk: a shard that is incomplete
is named, and all samples of a shard can be permuted. A download leaves no file behind.
"""

import errno
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import fsspec

from elip_models.pretraining.data.data_spec import expand_ranges
from elip_models.pretraining.data.read_errors import DataError, SkipReport, check_source
from elip_models.pretraining.data.remote_files import files_of
from elip_models.pretraining.data.samples import Sample
from elip_models.pretraining.data.shard_source import index_rows, read_sample
from elip_models.validation import PositiveInt, check_fields, did_you_mean

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://")
_OPTION = re.compile(r",(samples|resample)=(\w+)$")
_USER = re.compile(r"\A(?:[^/?#:]*:.*@|[^/?#]*@)", re.DOTALL)  # any character in a password
_FORM = "{stream: 'https://host/train-{0000..0099}.tar', samples: 1000000}"
_RETRY_DELAYS = (1.0, 5.0)  # seconds before a download is tried again
_CHUNK = 2**24

MAX_LOST_SHARDS = 20
"""Consecutive shards without a readable sample that stop a reader."""


def is_stream(spec: Any) -> bool:
    """Return whether a specification names shards that are not on disk."""
    if isinstance(spec, Mapping):
        return "stream" in spec
    return isinstance(spec, str) and _SCHEME.match(spec) is not None


def open_stream(spec: str | Mapping[str, Any]) -> "StreamSource":
    """Return the shards that `spec` names, without opening any of them.

    Args:
        spec: One line, or a mapping with the fields of `StreamSource`.

    Raises:
        TypeError, ValueError: The specification is malformed, or no library opens such a URL.
    """
    options = _parse(spec) if isinstance(spec, str) else dict(spec)
    known = [field.name for field in fields(StreamSource)]
    if unknown := [name for name in options if name not in known]:
        raise ValueError(
            f"spec: expected {', '.join(known)}, got {unknown[0]!r} in {redacted(spec)!r}"
            f"{did_you_mean(unknown[0], known)}"
        )
    if "samples" not in options:
        raise ValueError(
            f"spec: expected samples, the number in an epoch, got {redacted(spec)!r}; "
            f"write {_FORM}, or append ,samples=1000000"
        )
    if isinstance(urls := options["stream"], str | list):
        options["stream"] = (urls,) if isinstance(urls, str) else tuple(urls)
    return StreamSource(**options)


def _parse(spec: str) -> dict[str, Any]:
    """Split the options off the end of a line, so that a URL may contain commas."""
    options: dict[str, Any] = {}
    while option := _OPTION.search(spec):
        name, value = option.groups()
        number = int(value) if value.isdecimal() and len(value) < 20 else value
        options[name] = {"true": True, "false": False}.get(value, number)
        spec = spec[: option.start()]
    return {"stream": spec, **options}


@dataclass(frozen=True)
class StreamSource:
    """Shards at URLs. Its length is the number of samples in an epoch.

    Args:
        stream: URLs that fsspec opens, with ranges such as {0000..0012}.
        samples: Number of samples in an epoch, which sets the steps of `optim.epochs`. The stream
            is not counted, and reading never ends.
        resample: True: each reader draws its shards with replacement. False: all shards are read
            before one is read again, and there must be at least one for each reader.
    """

    stream: tuple[str, ...]
    samples: PositiveInt
    resample: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.shards:
            raise ValueError(f"stream: expected at least one URL, such as {_FORM}, got none")
        for shard in self.shards:
            _check_url(shard)

    @cached_property
    def shards(self) -> list[str]:
        """The URL of each shard."""
        return [shard for url in self.stream for shard in expand_ranges(url)]

    def __len__(self) -> int:
        return self.samples

    def first_captions(self, count: int) -> Iterator[tuple[str, ...]]:
        """Yield the captions of the first `count` samples that have any; no image is decoded.

        Raises DataError if the first shards have none.
        """
        left = count
        for number, url in enumerate(self.shards, 1):
            shard = DownloadedShard(url)
            for row in shard.rows:
                if row["captions"]:
                    yield tuple(row["captions"])
                    left -= 1
                if not left:
                    return
            if left == count and number in (MAX_LOST_SHARDS, len(self.shards)):
                problem = shard.problem or "no captions"
                raise DataError(f"no readable sample up to {shard.name}: {problem}")

    def check(self, limit: int | None = None) -> tuple[SkipReport, list[str]]:
        """Read every shard once, or the first `limit` samples.

        Returns the report of unreadable samples and shards, and the captions of the samples.
        """
        report, captions = SkipReport(), []
        for url in self.shards:
            shard = DownloadedShard(url)
            if shard.problem:
                report.record([(shard.name, shard.problem)], 1)
            rows = shard.rows if limit is None else shard.rows[: limit - report.seen]
            captions += [caption for row in rows for caption in row["captions"]]
            if rows:
                samples = check_source(shard, len(rows))
                report.record(samples.reasons, samples.seen)
            if report.seen == limit:
                break
        return report, captions


class DownloadedShard:
    """A shard in a temporary file without a name, which is freed with this object.

    A failure to download or read it is not raised, but its `problem`. Only a full disk raises
    DataError: it is no damage of the shard, which must not be left out.

    Attributes:
        name: File name of the shard.
        problem: Why the shard cannot be read, or "". It then has no sample.
        rows: Rows of its index, see `index_rows`.
    """

    def __init__(self, url: str) -> None:
        self.name = PurePosixPath(urlsplit(url).path).name or redacted(url)
        self.problem, self.rows = "", []
        try:
            self._file = _download(url)
            self.rows = list(index_rows(self._file, self.name))
        except DataError:
            raise
        except Exception as error:  # file system libraries raise errors of any type
            self.problem = str(error).removeprefix(f"{self.name}: ") or type(error).__name__

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        return read_sample(self._file, self.name, self.rows[index])


def _download(url: str) -> BinaryIO:
    """Return the content of a URL.

    Raises OSError, without the secrets of the URL, or DataError if the temporary folder is full.
    """
    waits = [*_RETRY_DELAYS, None]
    while True:
        file = tempfile.TemporaryFile()  # noqa: SIM115, it is returned
        try:
            system, path = files_of(url)
            with system.open(path, "rb", block_size=_CHUNK) as remote:
                shutil.copyfileobj(remote, file, _CHUNK)
            file.flush()
            return file
        except Exception as error:  # file system libraries raise errors of any type
            with suppress(OSError):  # on a full disk
                file.close()
            if (wait := waits.pop(0)) is None:
                if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                    raise DataError(
                        "TMPDIR: expected space for two shards of each reader, got a full disk at "
                        f"{tempfile.gettempdir()}: set TMPDIR to a folder with more space, or "
                        "lower data.num_workers"
                    ) from error
                raise OSError(_reason(error.__cause__ or error, url)) from error
            time.sleep(wait)


def _reason(error: BaseException, url: str) -> str:
    """Return the type and message of an error; only the type if the rest may contain a secret."""
    name, message = type(error).__name__, str(error)
    if redacted(url) != url and "://" not in message:
        return name
    return f"{name}: {redacted(message)}"


def redacted(spec: Any) -> Any:
    """Return a specification of data without what may be secret, for messages and reports.

    Of a URL, the user, the query and what follows it are hidden. `spec` is a text that may contain
    URLs, or a mapping or list of such texts.
    """
    if isinstance(spec, Mapping):
        return {name: redacted(value) for name, value in spec.items()}
    if isinstance(spec, list | tuple):
        return [redacted(part) for part in spec]
    if not isinstance(spec, str):
        return spec
    before, *urls = spec.split("://")
    shown = "://".join([before, *(_USER.sub("***@", url) for url in urls)])
    query = re.compile("[?#]").search(shown, len(before) + 3)
    return shown[: query.end()] + "***" if query else shown


def _check_url(url: str) -> None:
    """Raise ValueError unless fsspec can open such a URL."""
    try:
        if not is_stream(url) or "{" in url or "}" in url:
            raise ValueError("it is not a URL, or has braces other than {0000..0099}")
        urlsplit(url)
        fsspec.get_filesystem_class(url.partition("://")[0])
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"stream: expected URLs such as https://host/train-{{0000..0099}}.tar, got "
            f"{redacted(url)!r:.200}, which cannot be opened: {error}"
        ) from error
