"""`elip demo`: what the page computes, that it stays on this machine, and the page in a browser."""

import dataclasses
import json
import os
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from transformers import CLIPImageProcessor

import elip_models
from elip_models.analysis.merging import merged_image, tokens_of_patches
from elip_models.embedding.demo import SAVED, DemoModel
from elip_models.embedding.encoder import open_encoder
from elip_models.images import SampleError
from elip_models.pretraining.data.scenes import EmojiScenes
from elip_models.validation import ConfigError
from tests.embedding.conftest import SMALL
from tests.helpers.damage import picture
from tests.helpers.models import dinov2
from tests.helpers.tiny_run import elip, own_process, tiny_arguments

CAPTIONS = ["two dogs", "a whale on blue", "a red bus"]


@pytest.fixture(autouse=True)
def _one_thread():
    with own_process():
        yield


@pytest.fixture(scope="module")
def demo(model):
    return DemoModel(open_encoder(model))


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A file with a built-in scene."""
    path = tmp_path_factory.mktemp("scene") / "scene.png"
    EmojiScenes(size=1, image_size=160)[0].image.save(path)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of a tiny CLIP."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert elip(*tiny_arguments(folder)) == 0
    return folder


def test_the_picture_is_that_of_visualize_after_the_block(demo, scene):
    pixels, strategy = demo.read(scene), demo.strategy("tome", 0.6)
    found = demo.compare(pixels, strategy, block=3)
    _, infos = elip_models.encode_image(
        demo.image_model, pixels, strategy=strategy, return_info=True
    )
    assert [info.stage.first for info in infos] == list(range(demo.tower.depth))
    tokens = tokens_of_patches(infos, demo.tower.num_patches)
    config = demo.dense.model.pretrained_cfg
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
    image = (pixels[0] * std + mean).clamp(0, 1)
    drawn = merged_image(image, tokens[2][0].view(10, 10))
    shown = torch.from_numpy(np.array(found.merged))
    assert torch.equal(shown, (drawn * 255).round().byte().permute(1, 2, 0))
    assert found.tokens == [len(each[0].unique()) for each in tokens]
    assert found.image.size == found.merged.size and found.image != found.merged


def test_the_cosine_is_that_of_the_reduced_model(demo, scene):
    strategy = demo.strategy("evit", 0.6)
    found = demo.compare(demo.read(scene), strategy, block=1)
    model = demo.dense.reduced("none").model
    with torch.no_grad():
        dense = model(demo.read(scene))
        reduced = elip_models.reduce_(model, strategy)(demo.read(scene))
    wanted = torch.nn.functional.cosine_similarity(dense, reduced).item()
    assert found.cosine == pytest.approx(wanted, abs=1e-5) and wanted < 0.9999
    assert not elip_models.reduction_summary(demo.dense.model).guided_by


def test_a_smaller_share_leaves_fewer_tokens_and_all_leave_the_image(demo, scene):
    pixels = demo.read(scene)
    left = {}
    for keep in (0.5, 0.75, 1.0):
        left[keep] = demo.compare(pixels, demo.strategy("tome", keep), block=2)
    assert left[0.5].tokens[-1] < left[0.75].tokens[-1] < left[1.0].tokens[-1] == 100
    assert left[1.0].merged == left[1.0].image
    assert left[1.0].cosine == pytest.approx(1.0, abs=1e-6)


def test_every_choice_reduces_the_model(demo, scene):
    for choice in demo.choices:
        found = demo.compare(demo.read(scene), demo.strategy(choice, 0.6), demo.tower.depth)
        assert 0 < found.tokens[-1] < found.patches == 100, choice
        assert found.image != found.merged, choice


def test_a_model_takes_the_size_of_its_preprocessing(tmp_path, scene):
    dinov2().save_pretrained(tmp_path)  # of 48 x 48 pixels; the processor crops to 96
    size = {"height": 96, "width": 96}
    processor = CLIPImageProcessor(size={"shortest_edge": 96}, crop_size=size)
    processor.save_pretrained(tmp_path)
    demo = DemoModel(open_encoder(str(tmp_path)))
    found = demo.compare(demo.read(scene), demo.strategy("tome", 0.6), block=6)
    assert found.patches == 144 and found.tokens[-1] < 50
    assert found.image.size == (288, 288)


def test_times_are_of_both_models(demo, scene):
    found = demo.time(demo.read(scene), demo.strategy("tome", 0.5), batch_size=2)
    assert found.batch_size == 2 and min(found) > 0


def test_a_refused_strategy_and_a_refused_model_are_one_sentence(tmp_path, scene):
    made = timm.create_model("test_vit", class_token=False, global_pool="avg")
    torch.save(made.state_dict(), tmp_path / "weights.pt")
    encoder = open_encoder("timm:test_vit", pretrained=False)
    without = DemoModel(dataclasses.replace(encoder, model=made.eval()))
    with pytest.raises((TypeError, ValueError), match=r"(without_text|strategy): expected"):
        without.strategy("elip", 0.6)
    with pytest.raises(ValueError, match="keep: expected at least"):
        without.strategy("evit" if without.tower.has_cls else "tome", 0.01)
    with pytest.raises(ConfigError, match="MODEL: model: expected an image model of timm that can"):
        DemoModel(open_encoder("timm:resnet18", pretrained=False))


def test_the_model_of_a_run_ranks_captions_and_begins_with_its_own_strategy(run, scene):
    demo = DemoModel(open_encoder(str(run)))
    assert demo.choices[0] == demo.default_choice == SAVED
    strategy = demo.strategy(SAVED, demo.default_keep)
    assert strategy.name == demo.saved.name == "elip" and strategy.without_text == "vision"
    pixels = demo.read(scene)
    found = demo.compare(pixels, strategy, 3, CAPTIONS)
    assert sorted(caption for caption, *_ in found.ranking) == sorted(CAPTIONS)
    texts = demo.dense.encode_texts([caption for caption, *_ in found.ranking])
    for column, encoder in ((1, demo.dense), (2, demo.dense.reduced(strategy))):
        wanted = (encoder(pixels) @ texts.T)[0]  # both are normalised
        got = torch.tensor([row[column] for row in found.ranking])
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert [row[1] for row in found.ranking] == sorted([r[1] for r in found.ranking], reverse=True)
    with pytest.raises(ValueError, match="captions: expected Unicode text"):
        demo.compare(pixels, strategy, 3, ["\ud800"])
    with pytest.raises(ValueError, match="captions: expected at most 100, got 101"):
        demo.compare(pixels, strategy, 3, ["a dog"] * 101)


@pytest.mark.slow
def test_without_a_model_the_command_names_one(tmp_path, monkeypatch, capsys):
    pytest.importorskip("gradio", reason="needs the app extra")
    monkeypatch.chdir(tmp_path)
    assert elip("demo") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "MODEL: expected a model, such as timm:vit_small_patch16_224" in said


@pytest.fixture
def page(demo, embeddings):
    pytest.importorskip("gradio", reason="needs the app extra")
    from elip_models.embedding.demo_page import build_page

    return build_page(demo, batch_size=1, embeddings=(embeddings, demo.dense))


@pytest.fixture(scope="module")
def embeddings(model, pictures, tmp_path_factory):
    """The folder of embeddings of nine pictures."""
    folder = tmp_path_factory.mktemp("embeddings") / "out"
    elip_models.embed(model, pictures, folder, **SMALL)
    return folder


def shown(page, *values):
    """The values of the outputs, by their label or id, after each step of the page's function."""
    function = next(iter(page.fns.values()))
    for found in function.fn(*values):
        yield {each.elem_id or each.label: value for each, value in found.items()}


def test_the_page_shows_figures_then_also_times(page, scene):
    first, second = shown(page, str(scene), "tome", 0.5, 3, "")
    assert "| measured time | .. | measuring |" in first["figures"]
    assert "of dense |" in second["figures"] and "1 images" in second["figures"]
    assert "| tokens after block 3 | 100 |" in first["figures"]
    assert first["merged"] == second["merged"] and first["bars"].count("%") > 0
    assert first["message"]["visible"] is False


def test_a_caption_has_its_rank_among_both_features(page, demo, scene):
    from elip_models.embedding.demo_page import ranking_table

    found = demo.compare(demo.read(scene), demo.strategy("tome", 0.5), block=1)
    assert ranking_table(found) == []
    ranking = [("a dog", 0.5, 0.25), ("a cat", 0.125, 0.5), ("a cow", 0.125, 0.0)]
    assert ranking_table(dataclasses.replace(found, ranking=ranking)) == [
        ["a dog", "1. (0.500)", "2. (0.250)"],
        ["a cat", "2. (0.125)", "1. (0.500)"],
        ["a cow", "2. (0.125)", "3. (0.000)"],
    ]


BAD_IMAGES = {
    "text.jpg": b"no image",
    "empty.png": b"",
    "cut.png": picture(1)[:60],
    "drawing.svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_bad_image_is_a_sentence_on_the_page(page, tmp_path, name):
    path = tmp_path / name
    path.write_bytes(BAD_IMAGES[name])
    (found,) = shown(page, str(path), "tome", 0.5, 3, "")
    text = found.pop("message")["value"]
    assert text.startswith(f"{name}: not a readable image") and "Traceback" not in text
    assert set(found.values()) == {None}


def test_an_image_above_the_limits_is_a_sentence(page, tmp_path, demo):
    path = tmp_path / "huge.png"
    Image.new("1", (9000, 9000)).save(path)
    (found,) = shown(page, str(path), "tome", 0.5, 3, "")
    assert "huge.png: not a readable image: expected at most 64000000" in found["message"]["value"]
    with pytest.raises(SampleError):
        demo.read(path)


def test_other_mistakes_are_a_sentence(page, scene):
    for values, text in (
        ((None, "tome", 0.5, 3, ""), "Choose an image first"),
        ((str(scene), "tome", 0.01, 3, ""), "keep: expected at least"),
        ((str(scene), "tone", 0.5, 3, ""), "did you mean 'tome'?"),
        ((str(scene), "tome", 0.5, 3, "a dog"), "texts: expected an image-text model"),
    ):
        (found,) = shown(page, *values)
        assert text in found["message"]["value"]


def test_an_image_or_a_text_is_searched_in_embeddings(page, pictures):
    _, by_text, by_image = page.fns.values()
    path = pictures / "sub" / "a.jpg"
    message, found = by_image.fn(str(path))
    assert message["visible"] is False and found.count("<img") == found.count("<figure") == 9
    assert "<b>1</b> · 1.000<br>sub/a.jpg" in found.partition("</figure>")[0]
    for (message, found), text in (
        (by_image.fn(None), "Choose an image first"),
        (by_text.fn("a dog"), "query: expected the path of an image, since 'timm:test_vit"),
    ):
        assert text in message["value"] and message["visible"] and found == ""


def test_the_command_refuses_options_that_the_embeddings_decide(embeddings, tmp_path, capsys):
    pytest.importorskip("gradio", reason="needs the app extra")
    for arguments, text in (
        ([embeddings, "--preprocess", "clip"], "--preprocess: expected none with --embeddings"),
        ([embeddings, "--no-pretrained"], "--no-pretrained: expected none with --embeddings"),
        ([tmp_path], "--embeddings: expected a folder"),
    ):
        assert elip("demo", "--embeddings", *arguments) == 2
        assert text in " ".join(capsys.readouterr().err.split())


@pytest.fixture
def serving(page):
    """The page, served at a free port."""
    from elip_models.embedding.demo_page import serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve(page, port=port, prevent_thread_lock=True)
    yield page
    page.close()


def test_the_page_is_served_to_this_machine_only(page, monkeypatch):
    from elip_models.embedding import demo_page

    asked = []
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def record_connect(self, address):
        asked.append(address[0])
        return connect(self, address)

    def record_look_up(host, *args, **kwargs):
        asked.append(host)
        return look_up(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", record_connect)
    monkeypatch.setattr(socket, "getaddrinfo", record_look_up)
    monkeypatch.setenv("GRADIO_SHARE", "True")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port: expected a free port .*, got {port}"):
            demo_page.serve(page, port=port, prevent_thread_lock=True)
    demo_page.serve(page, port=port, prevent_thread_lock=True)
    try:
        assert page.share is False and page.share_url is None
        assert page.analytics_enabled is False
        assert page.local_url == f"http://127.0.0.1:{port}/"
        assert asked and set(asked) == {"127.0.0.1"}
    finally:
        page.close()


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
CHROME_OPTIONS = ("--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--no-sandbox")


@pytest.fixture
def browser():
    pytest.importorskip("selenium", reason="needs the package selenium")
    if BROWSER is None or DRIVER is None:
        pytest.skip("needs Debian's packages chromium and chromium-driver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for option in (*CHROME_OPTIONS, "--window-size=1280,1100"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


SET_SLIDER = """
const [slider, value] = arguments;
Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, "value").set.call(slider, value);
for (const name of ["input", "change"]) slider.dispatchEvent(new Event(name, {bubbles: true}));
"""


@pytest.mark.slow
def test_a_person_uploads_an_image_and_moves_the_slider(serving, browser, scene, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    def until(condition):
        return WebDriverWait(browser, 120).until(condition)

    def one(selector):
        return browser.find_element(By.CSS_SELECTOR, selector)

    browser.get(serving.local_url)
    until(lambda _: one("#image input[type=file]")).send_keys(str(scene))
    before = until(lambda _: one("#merged img")).get_attribute("src")
    until(lambda _: "of dense" in one("#figures").text)
    figures = one("#figures").text
    browser.execute_script(SET_SLIDER, one("#keep input[type=range]"), "0.4")
    until(lambda _: one("#merged img").get_attribute("src") != before)
    until(lambda _: "of dense" in one("#figures").text and one("#figures").text != figures)
    assert browser.execute_script("return arguments[0].naturalWidth", one("#merged img")) > 100
    screenshot = Path(os.environ.get("DEMO_SCREENSHOT", tmp_path / "demo.png"))
    assert browser.save_screenshot(str(screenshot))
    one("#similar").click()
    until(lambda _: len(browser.find_elements(By.CSS_SELECTOR, "#found img")) == 9)
    (tmp_path / "bad.png").write_text("no image")
    one("#image button[aria-label='Remove this file'], #image button[aria-label='Clear']").click()
    until(lambda _: one("#image input[type=file]")).send_keys(str(tmp_path / "bad.png"))
    until(lambda _: "bad.png: not a readable" in one("#message textarea").get_attribute("value"))
    assert [each for each in browser.get_log("browser") if each["level"] == "SEVERE"] == []
    requests = [
        each["params"]["request"]["url"]
        for each in (json.loads(e["message"])["message"] for e in browser.get_log("performance"))
        if each["method"] == "Network.requestWillBeSent"
    ]
    assert requests
    local = (serving.local_url, "data:", "blob:")
    assert [url for url in requests if not url.startswith(local)] == []
