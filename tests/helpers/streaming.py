"""A web server of this machine that has what a test gives it, and breaks off where a test says."""

from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


@contextmanager
def served(folder, *, ranges=True, breaks=0):
    """Serve a folder and yield its URL; the first `breaks` answers end after half of their bytes.

    ranges: whether a part of a file can be requested.
    """
    left = [breaks]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            file = folder / self.path.partition("?")[0].lstrip("/")
            if not file.is_file():
                self.send_error(404)
                return
            content, asked = file.read_bytes(), self.headers.get("Range")
            is_part = ranges and asked is not None
            first, last = asked.removeprefix("bytes=").split("-") if is_part else (0, "")
            content = content[int(first) : int(last or len(content)) + 1]
            self.send_response(206 if is_part else 200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            left[0] -= 1
            self.wfile.write(content[: len(content) // 2] if left[0] >= 0 else content)

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
