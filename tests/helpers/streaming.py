"""A web server of this machine that has what a test gives it, and breaks off where a test says."""

from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


@contextmanager
def served(folder, *, ranges=True, breaks_after=None):
    """Serve a folder and yield its URL; each answer breaks off after `breaks_after` bytes.

    ranges: whether a part of a file can be had.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            file = folder / self.path.partition("?")[0].lstrip("/")
            if not file.is_file():
                self.send_error(404)
                return
            content, asked = file.read_bytes(), self.headers.get("Range")
            is_part = ranges and asked is not None
            first = int(asked.removeprefix("bytes=").rstrip("-")) if is_part else 0
            self.send_response(206 if is_part else 200)
            self.send_header("Content-Length", str(len(content) - first))
            self.end_headers()
            self.wfile.write(content[first:][:breaks_after])

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
