"""What a tar is streamed from: `https://..`, `pipe:COMMAND`, and every other URL that fsspec opens.

A stream is read forwards, once. Where `https://` breaks off, as a server does that waits for a slow
reader, it is asked for the rest. What cannot be had is no exception: it ends the archive, and
`StreamTar.problem` says why.
"""

import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from http.client import HTTPException, HTTPResponse
from typing import Protocol, Self
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import fsspec

from elip_models.data.tar_samples import MAX_IMAGE_BYTES

PIPE = "pipe:"
WEB = ("http", "https")
_TIMEOUT = 60.0  # seconds without a byte
_WAITS = (1.0, 5.0)  # seconds before a server is asked again
_ASK_AGAIN = (408, 425, 429)
_CHUNK = 2**20
_MAX_HELD = MAX_IMAGE_BYTES


class Stream(Protocol):
    """Bytes that come one after the other."""

    def read(self, count: int) -> bytes:
        """At most `count`; none at the end. Raises where there should be more."""
        ...

    def close(self) -> None: ...


def open_url(url: str) -> Stream:
    """Raises whatever the library that reads such a URL does."""
    if url.startswith(PIPE):
        return _Pipe(url.removeprefix(PIPE))
    if scheme_of(url) in WEB:
        return _Web(url)
    try:
        return fsspec.open(url, "rb").open()
    except FileNotFoundError as error:  # which says the path alone
        raise FileNotFoundError(f"no such file: {error}") from error


def scheme_of(url: str) -> str:
    return url.partition("://")[0]


class _Web:
    """The body of a page, asked for again from where it broke off."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._at = 0
        self._response: HTTPResponse | None = None

    def read(self, count: int) -> bytes:
        for wait in (*_WAITS, None):
            try:
                data = self._read(count)
                self._at += len(data)
                return data
            except (OSError, HTTPException) as error:
                self.close()
                if wait is None or _is_final(error):
                    raise
                time.sleep(wait)
        raise AssertionError("the last try returns or raises")

    def _read(self, count: int) -> bytes:
        if self._response is None:
            self._response = self._ask()
        data = self._response.read(count)
        if not data and self._response.length:
            raise OSError(f"{self._response.length} bytes more were said to come")
        return data

    def _ask(self) -> HTTPResponse:
        headers = {"Range": f"bytes={self._at}-"} if self._at else {}
        response = urlopen(Request(self._url, headers=headers), timeout=_TIMEOUT)
        if self._at and response.status != 206:
            response.close()
            raise OSError("it broke off, and the server does not send the rest alone")
        return response

    def close(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None


def _is_final(error: Exception) -> bool:
    """Whether a server would say the same again."""
    return isinstance(error, HTTPError) and error.code < 500 and error.code not in _ASK_AGAIN


class _Pipe:
    """What a command of the shell writes; it has to end with exit status 0."""

    def __init__(self, command: str) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115, closed with the rest
        self._process = subprocess.Popen(
            command,
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._said,
            bufsize=0,
            start_new_session=True,  # ended as a whole
        )
        self._ready = selectors.DefaultSelector()
        self._ready.register(self._process.stdout, selectors.EVENT_READ)

    def read(self, count: int) -> bytes:
        if not self._ready.select(_TIMEOUT):
            raise TimeoutError(f"no byte came for {_TIMEOUT:g} seconds")
        data = self._process.stdout.read(count)
        if not data and (status := self._process.wait(_TIMEOUT)):
            self._said.seek(0)
            said = self._said.read(_CHUNK).decode(errors="replace").strip()
            raise OSError(f"exit status {status}{': ' * bool(said)}{said[-200:]}")
        return data

    def close(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdout.close()
        self._ready.close()
        self._said.close()


class StreamTar:
    """A stream as a `Tar`: what is read and not yet forgotten is held, at most 256 MiB of it.

    The first read opens it. `problem` says why it ended too early, or could not be opened; "" where
    all of it came.
    """

    def __init__(self, url: str) -> None:
        self.size = sys.maxsize
        self.problem = ""
        self._url = url
        self._stream: Stream | None = None
        self._held = bytearray()
        self._start = self._at = 0  # of what is held; of the next read

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            with suppress(Exception):  # nothing more is asked of it
                self._stream.close()

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int) -> None:
        self._at = offset

    def read(self, count: int) -> bytes:
        first = self._at - self._start
        end = first + min(count, _MAX_HELD)
        while len(self._held) < end and self._more():
            pass
        data = bytes(memoryview(self._held)[first:end])
        self._at += len(data)
        return data

    def has(self, offset: int, size: int) -> bool:
        """More than may be held is read and not kept."""
        self.release(offset if size <= _MAX_HELD else offset + size)
        while self._end < offset + size and self._more():
            pass
        return self._end >= offset + size

    def release(self, offset: int) -> None:
        """Reads on to there, where that has not come yet."""
        while True:
            dropped = min(offset, self._end) - self._start
            del self._held[:dropped]
            self._start += dropped
            if self._start == offset or not self._more():
                return

    @property
    def _end(self) -> int:
        return self._start + len(self._held)

    def _more(self) -> bool:
        """Reads on; False where the stream has ended."""
        if self._end == self.size:
            return False
        data = b""
        try:
            if self._stream is None:
                self._stream = open_url(self._url)
            data = self._stream.read(_CHUNK)
        except Exception as error:  # libraries of file systems raise whatever they meet
            what = str(error) or type(error).__name__
            self.problem = f"broke off at byte {self._end}: {what}" if self._end else what
        self._held += data
        if not data:
            self.size = self._end
        return bool(data)
