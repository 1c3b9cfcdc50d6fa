"""A server for a Gradio page, for the browsers of this machine.

    with upload_folder() as uploads:
        PageServer(build_page(..), uploads, port=7860, on_start=print).run()

A request must name this server as its host. Gradio opens any path or URL that a client sends as a
file; here a client can name only the files that it uploaded, or that the page showed.
"""

import json
import logging
import os
import re
import socket
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

from elip_models.images import MAX_IMAGE_BYTES
from elip_models.validation import ConfigError, require_extra

with require_extra("elip demo"):
    import gradio
    import uvicorn
    from fastapi import FastAPI, Request, Response
    from fastapi.responses import PlainTextResponse
    from starlette.middleware.trustedhost import TrustedHostMiddleware

ADDRESS = "127.0.0.1"
MAX_REQUEST_BYTES = 2**16  # without an upload
MAX_UPLOAD_BYTES = MAX_IMAGE_BYTES + MAX_REQUEST_BYTES
MAX_WAITING, MAX_CONNECTIONS = 32, 64
"""Limits of requests that wait for the model, and of open connections, over all browsers."""


@contextmanager
def upload_folder() -> Iterator[Path]:
    """Make the folder for the files of a page that is built inside, and delete it at the end.

    The process has one such page: Gradio reads the folder from the environment.
    """
    with tempfile.TemporaryDirectory(prefix="elip-demo-") as folder:
        uploads = Path(folder).resolve()
        os.environ["GRADIO_TEMP_DIR"] = str(uploads)
        yield uploads


class PageServer(uvicorn.Server):
    """Serve a page to programs of this machine.

    Args:
        page: built inside `upload_folder`.
        uploads: that folder.
        port: of 127.0.0.1.
        allowed_hosts: other names than 127.0.0.1 and localhost that a request may have as `Host`.
        css: of the page.
        on_start: called with the URL once the server answers.
    """

    def __init__(
        self,
        page: gradio.Blocks,
        uploads: Path,
        *,
        port: int,
        allowed_hosts: Sequence[str] = (),
        css: str = "",
        on_start: Callable[[str], object],
    ) -> None:
        for name in allowed_hosts:
            if not re.fullmatch(r"(\*\.)?[\w.-]+", name):
                raise ConfigError(
                    "--allowed-host: expected a name without scheme and port, such as "
                    f"demo.example.org or *.example.org, got {name!r}"
                )
        app = _application(page, css, uploads, [ADDRESS, "localhost", *allowed_hosts])
        settings = {"limit_concurrency": MAX_CONNECTIONS, "timeout_graceful_shutdown": 1}
        super().__init__(uvicorn.Config(app, log_level="error", access_log=False, **settings))
        self.port, self.on_start = port, on_start

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until the process is interrupted; raise ConfigError if the port is in use."""
        try:
            listener = socket.create_server((ADDRESS, self.port))
        except OSError as error:
            raise ConfigError(
                f"--port: expected a free port of {ADDRESS}, got {self.port} ({error}); pass "
                "another one"
            ) from error
        with listener:
            super().run([listener])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to answer, then call `on_start`."""
        await super().startup(sockets)
        self.on_start(f"http://{ADDRESS}:{self.port}")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End within a second, without a message about the streams of pages that are open."""
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        super().handle_exit(sig, frame)


def _application(page: gradio.Blocks, css: str, uploads: Path, hosts: Sequence[str]) -> FastAPI:
    """Return the page with the checks of requests: first of the host, then of everything else."""
    page.queue(max_size=MAX_WAITING, api_open=False)
    app = FastAPI(openapi_url=None)
    gradio.mount_gradio_app(
        app,
        page,
        "",
        max_file_size=MAX_IMAGE_BYTES,
        theme=gradio.themes.Default(font=("system-ui",), font_mono=("monospace",)),
        css=css,
        footer_links=[],
        run_history=False,
        show_error=False,
        ssr_mode=False,
        enable_monitoring=False,
    )

    @app.middleware("http")
    async def check(
        request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        try:
            await _check_request(request, uploads)
        except (TypeError, ValueError, RecursionError) as error:
            return PlainTextResponse(f"refused: {error}", 400)
        return await call_next(request)

    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)
    return app


async def _check_request(request: Request, uploads: Path) -> None:
    """Raise TypeError or ValueError if another site sent it, or it names a URL or another file."""
    headers = request.headers
    if "origin" in headers and urlsplit(headers["origin"]).netloc != headers["host"]:
        raise ValueError(f"Origin: expected {headers['host']!r}, got {headers['origin']!r}")
    if "://" in request.url.path:
        raise ValueError("path: expected no URL in it")
    is_upload = headers.get("content-type", "").startswith("multipart/form-data")
    limit = MAX_UPLOAD_BYTES if is_upload else MAX_REQUEST_BYTES
    if "transfer-encoding" in headers:
        raise ValueError("Transfer-Encoding: expected a Content-Length instead")
    length = headers.get("content-length", "0")
    if int(length) > limit:
        raise ValueError(f"Content-Length: expected at most {limit} bytes, got {length:.20}")

    def check_file(value: dict[str, Any]) -> None:
        if value.get("path") is not None:
            path = Path(value["path"])
            if path.resolve() != path or not path.is_relative_to(uploads):
                raise ValueError(f"path: expected that of an uploaded file, got {path}")

    if not is_upload and (body := await request.body()):
        json.loads(body, object_hook=check_file)
