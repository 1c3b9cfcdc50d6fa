"""Files of a path or URL, by fsspec, with one limit of time for all web servers."""

from aiohttp import ClientTimeout
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

SECONDS = 60
"""How long a web server may send nothing; other file systems have limits of their own."""


def files_of(location: str) -> tuple[AbstractFileSystem, str]:
    """Return the file system of a path or URL, and the path in it.

    Reading raises TimeoutError if a web server sends nothing for `SECONDS`.

    Raises:
        OSError: there is no such file system, or it cannot be opened, as an archive that is none.
    """
    timeout = ClientTimeout(total=None, sock_connect=SECONDS, sock_read=SECONDS)
    chain = [part.partition("://")[0] for part in location.split("::")]
    options = {"client_kwargs": {"timeout": timeout}}
    options_of = {name: options for name in ("http", "https") if name in chain}
    try:
        return url_to_fs(location, **options_of)
    except Exception as error:  # file systems raise errors of any type
        raise OSError(reason_of(error)) from error


def reason_of(error: BaseException) -> str:
    """Return in words why a file cannot be read; the text of a library may have the URL."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, TimeoutError):
            return "the server did not answer in time"
        cause = cause.__cause__
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
