"""`elip demo`: what the page computes, and that it stays on this machine."""

import shutil
import socket

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from transformers import CLIPImageProcessor

import elip_models
from elip_models.analysis.merging import merged_image, tokens_of_patches
from elip_models.embedding.encoder import open_encoder
from elip_models.images import SampleError
from elip_models.profiling.measure import no_gain
from elip_models.validation import ConfigError
from tests.helpers.models import dinov2
from tests.helpers.tiny_run import elip

gradio = pytest.importorskip("gradio", reason="needs the app extra")
pages = pytest.importorskip("elip_models.embedding.demo", reason="needs the app extra")


@pytest.fixture(scope="module")
def demo(encoder):
    return pages.Demo(encoder)


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    path = tmp_path_factory.mktemp("scene") / "scene.png"
    pages.example_image().save(path)
    return path


@pytest.fixture(scope="module")
def page(demo, encoder, whole):
    return pages.build_page(demo, batch_size=1, embeddings=(whole, encoder))


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


def test_every_choice_draws_and_all_tokens_leave_the_image(demo, scene):
    for choice in demo.choices:
        comparison = demo.compare(demo.read(scene), demo.strategy(choice, 0.6), demo.tower.depth)
        assert 0 < comparison.tokens[-1] < 100, choice
        assert comparison.image != comparison.merged, choice
    comparison = demo.compare(demo.read(scene), demo.strategy("tome", 1.0), block=2)
    assert comparison.tokens[-1] == 100 and comparison.merged == comparison.image


def test_a_model_takes_the_size_of_its_preprocessing(tmp_path, scene):
    dinov2().save_pretrained(tmp_path)  # of 48 x 48 pixels; the processor crops to 96
    size = {"height": 96, "width": 96}
    processor = CLIPImageProcessor(size={"shortest_edge": 96}, crop_size=size)
    processor.save_pretrained(tmp_path)
    demo = pages.Demo(open_encoder(str(tmp_path)))
    comparison = demo.compare(demo.read(scene), demo.strategy("tome", 0.6), block=6)
    assert demo.size.num_patches == 144 and comparison.tokens[-1] < 50
    assert comparison.image.size == (288, 288)


def test_a_saved_reduction_is_the_first_choice(tmp_path, scene):
    torch.manual_seed(0)
    made = elip_models.reduce_(timm.create_model("test_vit").eval(), "tome", keep=0.6)
    elip_models.save_reduced(made, tmp_path)
    demo = pages.Demo(open_encoder(str(tmp_path)))
    assert demo.choices[0] == pages.SAVED and demo.strategy(pages.SAVED, 0.6).name == "tome"
    with pytest.raises(ConfigError, match="MODEL: model: expected an image model of timm that can"):
        pages.Demo(open_encoder("timm:resnet18", pretrained=False))


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
    assert shown != merged and "of dense" in figures and "| FLOPs | 1 | 0.69 |" in figures


@pytest.mark.slow
def test_a_default_reduction_saves_time_on_the_first_screen(scene):
    demo = pages.Demo(open_encoder(pages.DEFAULT_MODEL, pretrained=False))
    strategy = demo.strategy(pages.DEFAULT.name, pages.DEFAULT_KEEP)
    shares = [demo.time(demo.read(scene), strategy, 4)[1] for _ in range(3)]
    assert not no_gain(sorted(shares)[1])


def test_other_mistakes_are_a_sentence(page, demo, scene, tmp_path):
    for values, message in (
        ((None, "tome", 0.5, 3), "Choose an image first"),
        ((str(scene), "tome", 0.01, 3), "keep: expected at least"),
        ((str(scene), "tone", 0.5, 3), "did you mean 'tome'"),
        ((str(scene), "tome", 0.5, 99), "block: expected"),
    ):
        with pytest.raises(gradio.Error, match=message):
            next(page.fns[0].fn(*values))
    (tmp_path / "text.jpg").write_bytes(b"no image")
    with pytest.raises(gradio.Error, match=r"text\.jpg: not a readable image"):
        next(page.fns[0].fn(str(tmp_path / "text.jpg"), "tome", 0.5, 3))
    Image.new("1", (9000, 9000)).save(tmp_path / "huge.png")
    with pytest.raises(SampleError, match="expected at most 64000000 pixels"):
        demo.read(tmp_path / "huge.png")


def test_an_image_or_a_text_is_searched_in_embeddings_and_no_path_is_opened(page, pictures):
    _, by_text, by_image = page.fns.values()
    gallery = by_image.fn(str(pictures / "sub" / "a.jpg"))
    assert len(gallery) == 9 and gallery[0][1] == "1. 1.000 sub/a.jpg"
    with pytest.raises(gradio.Error, match="Choose an image first"):
        by_image.fn(None)
    for text in ("a dog", str(pictures / "0.png"), "/etc/passwd"):
        with pytest.raises(gradio.Error, match="expected an image-text model, got"):
            by_text.fn(text)


def test_the_page_is_served_to_this_machine_under_its_own_name_only(page, monkeypatch):
    import httpx

    asked = []
    connect, look_up = socket.socket.connect, socket.getaddrinfo
    monkeypatch.setattr(
        socket.socket, "connect", lambda self, at: asked.append(at[0]) or connect(self, at)
    )
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *args: asked.append(host) or look_up(host, *args)
    )
    monkeypatch.setenv("GRADIO_SHARE", "True")
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port: expected a free port .*, got {port}"):
            pages.serve(page, port=port, wait=False)
    pages.serve(page, port=port, wait=False)
    try:
        assert page.share is False and page.analytics_enabled is False
        assert asked and {*asked} == {"127.0.0.1"}
        for path in ("", "config", "gradio_api/info"):
            url = f"http://127.0.0.1:{port}/{path}"
            assert httpx.get(url).status_code == 200
            assert httpx.get(url, headers={"Host": "evil.example"}).status_code == 400
    finally:
        page.close()


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
CHROME_OPTIONS = ("--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--no-sandbox")


@pytest.mark.slow
@pytest.mark.skipif(DRIVER is None, reason="needs Debian's packages chromium and chromium-driver")
def test_a_person_opens_the_page_and_searches(page, scene):
    pytest.importorskip("selenium", reason="selenium drives the browser")
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for option in CHROME_OPTIONS:
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pages.serve(page, port=port, wait=False)
    browser = webdriver.Chrome(options=options)
    try:

        def until(selector, text=""):
            def shown(_):
                return [
                    e for e in browser.find_elements(By.CSS_SELECTOR, selector) if text in e.text
                ]

            return WebDriverWait(browser, 120).until(shown)

        browser.get(f"http://127.0.0.1:{port}")
        until("#figures", "ms")
        (merged,) = until("#merged img")
        assert browser.execute_script("return arguments[0].naturalWidth", merged) > 100
        until("#similar")[0].click()
        until("#found img")
        assert [line for line in browser.get_log("browser") if line["level"] == "SEVERE"] == []
    finally:
        browser.quit()
        page.close()


def test_the_command_refuses_options_that_the_embeddings_decide(whole, tmp_path, capsys):
    for arguments, text in (
        ([whole, "--preprocess", "clip"], "--preprocess: expected none with --embeddings"),
        ([whole, "--no-pretrained"], "--no-pretrained: expected none with --embeddings"),
        ([tmp_path], "--embeddings: expected a folder"),
    ):
        assert elip("demo", "--embeddings", *arguments) == 2
        assert text in " ".join(capsys.readouterr().err.split())
