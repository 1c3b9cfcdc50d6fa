"""`elip demo`: what the page computes, and that it stays on this machine."""

import itertools
import json
import queue
import re
import socket
import threading

import httpx
import numpy as np
import pytest
import timm
import torch
from PIL import Image

import elip_models
from elip_models.analysis.merging import merged_image, tokens_of_patches
from elip_models.embedding.collection import open_collection
from elip_models.embedding.encoder import open_encoder
from elip_models.embedding.search import find, query_encoder
from elip_models.images import SampleError
from elip_models.validation import ConfigError
from tests.helpers.own_warnings import UNGUIDED
from tests.helpers.tiny_run import elip

gradio = pytest.importorskip("gradio", reason="needs the app extra")
pages = pytest.importorskip("elip_models.embedding.demo", reason="needs the app extra")
servers = pytest.importorskip("elip_models.embedding.page_server", reason="needs the app extra")


@pytest.fixture(scope="module")
def demo(encoder):
    return pages.Demo(encoder)


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    path = tmp_path_factory.mktemp("scene") / "scene.png"
    pages.example_image().save(path)
    return path


@pytest.fixture(scope="module")
def searched(captioned):
    """A folder of embeddings, and the encoder of its image-text model."""
    return captioned[0], query_encoder(open_collection(captioned[0]))


@pytest.fixture(scope="module")
def uploads():
    with servers.upload_folder() as folder:
        yield folder


@pytest.fixture(scope="module")
def page(searched, uploads):
    return pages.build_page(pages.Demo(searched[1]), batch_size=1, embeddings=searched)


@pytest.fixture(scope="module")
def port():
    return free_port()


@pytest.fixture(scope="module")
def url(page, uploads, port):
    """The address of the served page, which may also be called demo.example.org."""
    urls = queue.Queue()
    options = {"allowed_hosts": ["demo.example.org"], "on_start": urls.put}
    server = servers.PageServer(page, uploads, port=port, **options)
    thread = threading.Thread(target=server.run)
    thread.start()
    yield urls.get(timeout=60)
    server.should_exit = True
    thread.join()


def free_port():
    with socket.socket() as free:
        free.bind((servers.ADDRESS, 0))
        return free.getsockname()[1]


def test_the_picture_is_that_of_visualize_after_the_block(demo, scene):
    pixels, strategy = demo.read(scene), demo.strategy("tome", 0.6)
    comparison = demo.compare(pixels, strategy, block=3)
    _, infos = elip_models.encode_image(
        demo.image_model, pixels, strategy=strategy, return_info=True
    )
    tokens = tokens_of_patches(infos, demo.tower.num_patches)
    config = demo.dense.model.pretrained_cfg
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
    drawn = merged_image((pixels[0] * std + mean).clamp(0, 1), tokens[2][0].view(10, 10))
    shown = torch.from_numpy(np.array(comparison.merged))
    assert torch.equal(shown, (drawn * 255).round().byte().permute(1, 2, 0))
    assert comparison.tokens == [len(step[0].unique()) for step in tokens]
    assert comparison.image.size == comparison.merged.size
    assert comparison.image != comparison.merged


def test_the_cosine_is_that_of_the_reduced_model(demo, scene):
    strategy, pixels = demo.strategy("evit", 0.6), demo.read(scene)
    model = demo.dense.reduced("none").model
    with torch.no_grad():
        dense, reduced = model(pixels), elip_models.reduce_(model, strategy)(pixels)
    wanted = torch.nn.functional.cosine_similarity(dense, reduced).item()
    assert demo.compare(pixels, strategy, 1).cosine == pytest.approx(wanted, abs=1e-5)
    assert wanted < 0.9999


def test_a_saved_reduction_is_the_first_choice(tmp_path, scene):
    torch.manual_seed(0)
    made = elip_models.reduce_(timm.create_model("test_vit").eval(), "tome", keep=0.6)
    elip_models.save_reduced(made, tmp_path)
    demo = pages.Demo(open_encoder(str(tmp_path)))
    assert demo.choices[0] == pages.SAVED and demo.strategy(pages.SAVED, 0.6).name == "tome"
    with pytest.raises(ConfigError, match="MODEL: model: expected an image model of timm that can"):
        pages.Demo(open_encoder("timm:resnet18", pretrained=False))


SESSIONS = itertools.count()
"""The names of sessions with the server."""


def values_of(page, name):
    """The first values of the components with this type."""
    return [block.value for block in page.blocks.values() if isinstance(block, name)]


def test_the_page_opens_with_an_image_and_a_model_for_which_the_default_helps():
    """The first screen, of the default model, without its weights."""
    assert pages.DEFAULT_MODEL == "timm:vit_small_patch16_224"
    demo = pages.Demo(open_encoder(pages.DEFAULT_MODEL, pretrained=False))
    page = pages.build_page(demo)
    image = values_of(page, gradio.Image)[0]["path"]
    (choice,), (keep, block) = values_of(page, gradio.Dropdown), values_of(page, gradio.Slider)
    assert page.fns[0].targets[0][1] == "load"
    *_, (shown, merged, figures) = page.fns[0].fn(image, choice, keep, block)
    assert shown != merged and "| time" in figures and "| FLOPs | 1 | 0.69 |" in figures


@UNGUIDED
def test_other_mistakes_are_a_sentence(page, demo, scene, tmp_path):
    for values, message in (
        ((str(scene), "tome", 0.01, 3), "keep: expected at least"),
        ((str(scene), "tome", True, 3), "keep: expected a float"),
        ((str(scene), "tone", 0.5, 3), "did you mean 'tome'"),
        ((str(scene), "tome", 0.5, 99), r"block: expected an integer in \[1, "),
        ((str(scene), "tome", 0.5, 1.5), r"block: expected an integer in \[1, .*, got 1.5"),
    ):
        with pytest.raises(gradio.Error, match=message) as error:
            next(page.fns[0].fn(*values))
        assert not error.value.print_exception
    (tmp_path / "text.jpg").write_bytes(b"no image")
    with pytest.raises(gradio.Error, match=r"text\.jpg: not a readable image"):
        next(page.fns[0].fn(str(tmp_path / "text.jpg"), "tome", 0.5, 3))
    Image.new("1", (9000, 9000)).save(tmp_path / "huge.png")
    with pytest.raises(SampleError, match="expected at most 64000000 pixels"):
        demo.read(tmp_path / "huge.png")


def captions(folder, encoder, text):
    hits = find(open_collection(folder), encoder.encode_texts([text]), text, top=9).hits
    return [f"{hit.similarity:.3f} {hit.key}" for hit in hits]


def test_a_text_is_searched_as_a_text_even_if_it_is_a_path(page, searched, pictures):
    _, by_text, by_image = page.fns.values()
    gallery = by_image.fn(str(pictures / "sub" / "a.jpg"))
    assert len(gallery) == 9 and gallery[0][1] == "1.000 sub/a.jpg"
    with pytest.raises(gradio.Error, match="Choose an image first"):
        by_image.fn(None)
    for text in ("a dog", str(pictures / "0.png"), "/etc/passwd"):
        assert [caption for _, caption in by_text.fn(text)] == captions(*searched, text)
    with pytest.raises(gradio.Error, match="query: expected a text"):
        by_text.fn(None)


def join(url, function, data, **headers):
    """Send an event of the page, and return the answer with the session that waits for it."""
    session = str(next(SESSIONS))
    event = {"data": data, "fn_index": function, "session_hash": session}
    return httpx.post(f"{url}/gradio_api/queue/join", json=event, headers=headers), session


def result(url, function, data):
    """Return the last output of an event, as the page receives it."""
    answer, session = join(url, function, data)
    assert answer.status_code == 200, answer.text
    stream = f"{url}/gradio_api/queue/data?session_hash={session}"
    with httpx.stream("GET", stream, timeout=60) as lines:
        messages = (json.loads(line[5:]) for line in lines.iter_lines() if line[:5] == "data:")
        return next(m["output"] for m in messages if m["msg"] == "process_completed")


def upload(url, path, **headers):
    files = {"files": (path.name, path.read_bytes())}
    return httpx.post(f"{url}/gradio_api/upload", files=files, headers=headers)


def as_file(path):
    return {"path": str(path), "meta": {"_type": "gradio.FileData"}}


def test_an_uploaded_image_is_compared_and_searched(url, pictures):
    image = as_file(upload(url, pictures / "sub" / "a.jpg").json()[0])
    *_, figures = result(url, 0, [image, "tome", 0.5, 3])["data"]
    assert re.search(r"cosine .*1: no change.* 1.000 \| 0.\d{3} \|.*of a batch of 1", figures, re.S)
    (gallery,) = result(url, 2, [image])["data"]
    assert gallery[0]["caption"] == "1.000 sub/a.jpg"


def test_every_route_answers_to_the_address_of_the_server_alone(url, port, pictures):
    routes = ("", "config", "gradio_api/info", "theme.css", "gradio_api/queue/data?session_hash=a")
    for host in ("evil.example", "127.0.0.1.evil.example", f"localhost.:{port}"):
        for route in routes:
            answer = httpx.get(f"{url}/{route}", headers={"Host": host})
            assert answer.status_code == 400, (route, host)
        assert join(url, 1, ["a"], Host=host)[0].status_code == 400
        assert upload(url, pictures / "0.png", Host=host).status_code == 400
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", "demo.example.org"):
        assert httpx.get(f"{url}/config", headers={"Host": host}).status_code == 200
    for origin, status in (("http://evil.example", 400), ("null", 400), (url, 200)):
        assert join(url, 1, ["a"], Origin=origin)[0].status_code == status
        assert upload(url, pictures / "0.png", Origin=origin).status_code == status


def test_no_path_or_url_that_a_client_names_is_opened(url, uploads, pictures, monkeypatch):
    hosts, look_up = set(), socket.getaddrinfo
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *args, **kw: hosts.add(host) or look_up(host, *args, **kw),
    )
    image = upload(url, pictures / "0.png").json()[0]
    for path in (
        *("/etc/passwd", "/nowhere", pictures / "0.png", "pyproject.toml", f"{image}/../../0.png"),
        *("http://pypi.org/a.png", f"http://pypi.org/../../../../../../../../..{image}"),
    ):
        for function, rest in ((0, ["tome", 0.5, 3]), (1, []), (2, [])):
            answer, _ = join(url, function, [as_file(path), *rest])
            assert answer.status_code == 400 and "expected that of an uploaded file" in answer.text
    for route in ("file=https://pypi.org", "file/https://pypi.org", "proxy=https://pypi.org"):
        assert httpx.get(f"{url}/gradio_api/{route}").status_code == 400
    assert httpx.get(f"{url}/gradio_api/file={pictures / '0.png'}").status_code == 403
    assert hosts == {servers.ADDRESS}


def test_size_and_number_of_requests_have_limits(url, port):
    answer, _ = join(url, 1, ["a" * servers.MAX_REQUEST_BYTES])
    assert (
        answer.status_code == 400 and "Content-Length: expected at most 65536 bytes" in answer.text
    )
    answer = httpx.post(f"{url}/gradio_api/queue/join", content=iter([b"{}"]))  # in chunks
    assert answer.status_code == 400
    headers = f"Host: localhost\r\nContent-Length: {servers.MAX_UPLOAD_BYTES + 1}"
    multipart = "Content-Type: multipart/form-data; boundary=a"
    with socket.create_connection((servers.ADDRESS, port)) as client:
        request = f"POST /gradio_api/upload HTTP/1.1\r\n{headers}\r\n{multipart}\r\n\r\n"
        client.sendall(request.encode())
        assert client.recv(100).startswith(b"HTTP/1.1 400")
    statuses = [join(url, 1, ["a"])[0].status_code for _ in range(3 * servers.MAX_WAITING)]
    assert {*statuses} == {200, 503}
    clients = [socket.create_connection((servers.ADDRESS, port)) for _ in range(70)]
    try:
        assert httpx.get(url).status_code == 503
    finally:
        for client in clients:
            client.close()


def test_the_address_is_announced_once_the_server_answers_and_no_page_is_asked_before(
    demo, uploads, monkeypatch
):
    asked, connect = [], socket.socket.connect
    monkeypatch.setattr(
        socket.socket, "connect", lambda self, at: asked.append(at) or connect(self, at)
    )
    monkeypatch.setenv("GRADIO_SHARE", "True")
    port, urls, page = free_port(), [], pages.build_page(demo)

    def announce(url):
        urls.append((url, server.started))
        server.should_exit = True

    server = servers.PageServer(page, uploads, port=port, on_start=announce)
    message = f"--port: expected a free port .*, got {port}"
    with socket.create_server((servers.ADDRESS, port)), pytest.raises(ConfigError, match=message):
        server.run()
    server.run()
    assert urls == [(f"http://127.0.0.1:{port}", True)] and asked == []
    assert not page.share and not page.analytics_enabled


def test_the_command_refuses_options_that_the_embeddings_decide(whole, tmp_path, capsys):
    for arguments, text in (
        ([whole, "--preprocess", "clip"], "--preprocess: expected none with --embeddings"),
        ([whole, "--no-pretrained"], "--no-pretrained: expected none with --embeddings"),
        ([tmp_path], "--embeddings: expected a folder"),
        ([whole, "--allowed-host", "http://a"], "--allowed-host: expected a name without scheme"),
    ):
        assert elip("demo", "--embeddings", *arguments) == 2
        assert text in " ".join(capsys.readouterr().err.split())
