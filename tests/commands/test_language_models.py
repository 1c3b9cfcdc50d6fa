"""Commands for image models refuse a multimodal language model and name its image tower."""

import pytest
from PIL import Image

from tests.helpers.tiny_run import elip
from tests.vlm.models import build


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name in ("llava", "qwen2_5_vl"):
        build(name)[0].float().save_pretrained(folder / name)
    (folder / "images").mkdir()
    for i in range(12):
        Image.new("RGB", (32, 32), (20 * i, 0, 0)).save(folder / "images" / f"{i}.png")
    return folder


@pytest.mark.parametrize("command", ["export", "distill", "calibrate"])
def test_a_language_model_is_one_line_that_names_its_tower(
    command, folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    arguments = {
        "export": ("out.onnx",),
        "distill": (folder / "images", "--output", "out"),
        "calibrate": (folder / "images", "--output", "out"),
    }[command]
    assert elip(command, f"hf:{folder / 'llava'}", *arguments) == 2
    error = "error: MODEL: expected an image model or an image-text model, got a multimodal langu"
    printed = capsys.readouterr().err
    assert error in printed and "use its image tower, model.vision_tower" in printed
    assert not list(tmp_path.iterdir())
