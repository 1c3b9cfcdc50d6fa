"""Byte streams of tar shards: `https://..`, `pipe:COMMAND`, and every URL that fsspec opens.

A stream is read once, forwards. If an `https://` connection breaks off, the rest is requested
again. A failure raises nothing: it ends the archive, and `StreamTar.problem` holds the reason.
"""

import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from http.client import HTTPException, HTTPResponse
from typing import Any, Protocol, Self
from urllib.error import HTTPError
from urllib.parse import unquote
from urllib.request import Request, urlopen

import fsspec

from elip_models.images import MAX_IMAGE_BYTES

PIPE = "pipe:"
WEB = ("http", "https")
_TIMEOUT = 60.0  # seconds without a byte
_RETRY_DELAYS = (1.0, 5.0)  # seconds before a request is repeated
_RETRYABLE_STATUS = (408, 425, 429)
_CHUNK = 2**20
_MAX_BUFFER_BYTES = MAX_IMAGE_BYTES
_HIDDEN = "***"
_PROGRAM = re.compile(r"\s*[\w./+-]+(?=\s|$)|")  # nothing if it is quoted or set by a variable
_WORD = re.compile(r"[^\s'\"=:@&?#;,|<>()]{4,}")  # a shorter one is also part of other words
_USER = re.compile(r"\A(?:[^/?#:]*:.*@|[^/?#]*@)", re.DOTALL)  # any character in a password


class Stream(Protocol):
    """Bytes that can be read once, in order."""

    def read(self, count: int) -> bytes:
        """Read up to `count` bytes; b"" at the end. Raises an error if bytes are missing."""

    def close(self) -> None:
        """Release the connection or process."""


def open_url(url: str) -> Stream:
    """Open a URL. Errors of the library that reads it are passed on."""
    if url.startswith(PIPE):
        return _Pipe(url.removeprefix(PIPE))
    if scheme_of(url) in WEB:
        return _Web(url)
    try:
        return fsspec.open(url, "rb").open()
    except FileNotFoundError as error:  # its message is only the path
        raise FileNotFoundError(f"no such file: {error}") from error


def redacted(spec: Any) -> Any:
    """Return a specification of data without what may be secret, for messages and reports.

    Hidden are the arguments of a `pipe:` command, and of a URL the user, the query and what
    follows it. `spec` is a text that may contain these, or a mapping or list of such texts.
    """
    if isinstance(spec, Mapping):
        return {name: redacted(value) for name, value in spec.items()}
    if isinstance(spec, list | tuple):
        return [redacted(each) for each in spec]
    if not isinstance(spec, str):
        return spec
    before, pipe, command = spec.partition(PIPE)
    program = _PROGRAM.match(command)[0]
    hidden = _HIDDEN if command != program else ""
    return _redacted_url(before) + pipe + program + (" " if program and hidden else "") + hidden


def _redacted_url(text: str) -> str:
    before, *urls = text.split("://")
    shown = "://".join([before, *(_USER.sub(f"{_HIDDEN}@", url) for url in urls)])
    start = len(before) + 3
    query = re.search("[?#]", shown[start:])
    return shown[: start + query.end()] + _HIDDEN if query else shown


def _without_secrets(message: str, url: str) -> str:
    """Return a message without the words of a URL or command that `redacted` hides."""
    words = {word for text in (url, unquote(url)) for word in _words(text)}
    hidden = words.difference(_words(redacted(url)))
    for word in sorted(hidden, key=len, reverse=True):
        message = message.replace(word, _HIDDEN)
    return message


def _words(text: str) -> list[str]:
    """Return the words, also those between slashes, which a parser of URLs may have parted."""
    return _WORD.findall(text) + _WORD.findall(text.replace("/", " "))


def scheme_of(url: str) -> str:
    """Return the part of a URL before "://"."""
    return url.partition("://")[0]


class _Web:
    """Body of an HTTP response; after an interruption, the rest is requested again."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._position = 0
        self._response: HTTPResponse | None = None

    def read(self, count: int) -> bytes:
        for wait in [*_RETRY_DELAYS, None]:
            try:
                data = self._read(count)
                self._position += len(data)
                return data
            except (OSError, HTTPException) as error:
                self.close()
                if wait is None or _is_final(error):
                    raise
                time.sleep(wait)
        raise AssertionError("the last try returns or raises")

    def _read(self, count: int) -> bytes:
        if self._response is None:
            self._response = self._request()
        data = self._response.read(count)
        if not data and self._response.length:
            raise OSError(f"{self._response.length} of the announced bytes are missing")
        return data

    def _request(self) -> HTTPResponse:
        headers = {"Range": f"bytes={self._position}-"} if self._position else {}
        response = urlopen(Request(self._url, headers=headers), timeout=_TIMEOUT)
        if self._position and response.status != 206:
            response.close()
            raise OSError("connection lost, and the server does not support range requests")
        return response

    def close(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None


def _is_final(error: Exception) -> bool:
    """Return whether a repeated request would fail in the same way."""
    return isinstance(error, HTTPError) and error.code < 500 and error.code not in _RETRYABLE_STATUS


class _Pipe:
    """Output of a shell command, which must end with exit status 0."""

    def __init__(self, command: str) -> None:
        self._command = command
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115, closed with the rest
        self._process = subprocess.Popen(
            command,
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            bufsize=0,
            start_new_session=True,  # `close` kills the whole process group
        )
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._process.stdout, selectors.EVENT_READ)

    def read(self, count: int) -> bytes:
        if not self._selector.select(_TIMEOUT):
            raise TimeoutError(f"no data for {_TIMEOUT:g} seconds")
        data = self._process.stdout.read(count)
        if not data and (status := self._process.wait(_TIMEOUT)):
            self._stderr.seek(0)
            message = self._stderr.read(_CHUNK).decode(errors="replace").strip()
            message = _without_secrets(message, PIPE + self._command)
            raise OSError(f"exit status {status}" + (f": {message[-200:]}" if message else ""))
        return data

    def close(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdout.close()
        self._selector.close()
        self._stderr.close()


class StreamTar:
    """A stream as a `Tar`, which buffers at most 256 MiB.

    The first read opens the stream. `problem` is why it could not be opened or ended early, or "".
    """

    def __init__(self, url: str) -> None:
        self.size = sys.maxsize
        self.problem = ""
        self._url = url
        self._stream: Stream | None = None
        self._buffer = bytearray()
        self._start = self._position = 0  # offsets of the buffer and of the next read

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            with suppress(Exception):  # the stream is not used again
                self._stream.close()

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def seek(self, offset: int) -> None:
        """Set the position."""
        self._position = offset

    def read(self, count: int) -> bytes:
        """Read up to `count` bytes, at most as many as the buffer holds."""
        first = self._position - self._start
        end = first + min(count, _MAX_BUFFER_BYTES)
        while len(self._buffer) < end and self._read_chunk():
            pass
        data = bytes(memoryview(self._buffer)[first:end])
        self._position += len(data)
        return data

    def contains(self, offset: int, size: int) -> bool:
        """Return whether `size` bytes at `offset` exist; more than the buffer holds is skipped."""
        self.discard_before(offset if size <= _MAX_BUFFER_BYTES else offset + size)
        while self._end < offset + size and self._read_chunk():
            pass
        return self._end >= offset + size

    def discard_before(self, offset: int) -> None:
        """Drop the bytes before `offset`, reading on to it if necessary."""
        while True:
            dropped = min(offset, self._end) - self._start
            del self._buffer[:dropped]
            self._start += dropped
            if self._start == offset or not self._read_chunk():
                return

    @property
    def _end(self) -> int:
        return self._start + len(self._buffer)

    def _read_chunk(self) -> bool:
        """Read one chunk. Return False at the end of the stream."""
        if self._end == self.size:
            return False
        data = b""
        try:
            if self._stream is None:
                self._stream = open_url(self._url)
            data = self._stream.read(_CHUNK)
        except Exception as error:  # file system libraries raise errors of any type
            what = str(error) or type(error).__name__
            if not self._url.startswith(PIPE):  # a command hides those of its standard error
                what = _without_secrets(what, self._url)
            self.problem = f"interrupted at byte {self._end}: {what}" if self._end else what
        self._buffer += data
        if not data:
            self.size = self._end
        return bool(data)
