"""Sources on a web server, with and without requests for a part of a file."""

import hashlib
import re
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec

import pyarrow
import pytest
from pyarrow import parquet

from elip_models.embedding.image_source import SourceOptions
from elip_models.embedding.open_images import open_images
from elip_models.embedding.stored import Stored, read
from elip_models.images import SampleError
from elip_models.validation import ConfigError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("aiohttp") is None, reason="fsspec reads https:// by aiohttp"),
]
NAMES = ("0.png", "1.png", "2.png")


class Handler(SimpleHTTPRequestHandler):
    """Serves files, and parts of them if `ranges`."""

    ranges = True

    def do_GET(self):
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not (wanted and self.ranges):
            return super().do_GET()
        with open(self.translate_path(self.path), "rb") as file:
            content = file.read()
        start, end = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{end}/{len(content)}")
        self.send_header("Content-Length", str(end + 1 - start))
        self.end_headers()
        self.wfile.write(content[start : end + 1])

    def end_headers(self):
        if self.ranges:
            self.send_header("Accept-Ranges", "bytes")
        super().end_headers()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def served(pictures, tmp_path):
    """Return the address of a folder with a tar, a list and a Parquet file of three images."""
    contents = [(pictures / name).read_bytes() for name in NAMES]
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        for name in NAMES:
            tar.add(pictures / name, name)
    for name, content in zip(NAMES, contents, strict=True):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "list.csv").write_text("\n".join(("path", *NAMES)))
    parquet.write_table(pyarrow.table({"image": contents}), tmp_path / "images.parquet")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name", ["images.tar", "list.csv", "images.parquet"])
def test_a_file_on_a_web_server_is_a_source(served, pictures, name):
    source = open_images(f"{served}/{name}", SourceOptions())
    found = [hashlib.sha256(read(each)).hexdigest() for each in source.payloads(0, len(source))]
    wanted = [hashlib.sha256((pictures / each).read_bytes()).hexdigest() for each in NAMES]
    assert found == wanted


def test_a_missing_file_is_an_error_and_a_missing_image_a_reason(served):
    with pytest.raises(ConfigError, match="source: expected a folder of images"):
        open_images(f"{served}/missing.tar", SourceOptions())
    source = open_images(f"{served}/list.csv", SourceOptions())
    (stored,) = source.payloads(0, 1)
    with pytest.raises(SampleError, match="cannot be read"):
        read(stored._replace(path=f"{served}/missing.png"))


def test_a_server_that_ignores_ranges_is_a_reason(served, monkeypatch):
    (stored,) = open_images(f"{served}/images.tar", SourceOptions()).payloads(0, 1)
    monkeypatch.setattr(Handler, "ranges", False)
    assert isinstance(stored, Stored) and stored.size
    with pytest.raises(SampleError, match=r"expected .* bytes of a part of a file"):
        read(stored)
