"""`elip export` writes a reduced model as ONNX, which onnxruntime runs as PyTorch does."""

import re

import onnx
import onnxruntime
import pytest

from elip_models import validation
from tests.helpers.models import hf_clip
from tests.helpers.tiny_run import elip


def difference(printed):
    """The printed largest difference, as a share of the largest output."""
    absolute, largest = re.search(r"difference +(\S+) at most .* up to (\S+)", printed).groups()
    return float(absolute) / float(largest)


@pytest.mark.slow
def test_an_image_model_for_any_number_of_images(tmp_path, capsys):
    file = tmp_path / "vit.onnx"
    options = "--no-pretrained", "--strategy", "elip", "--keep", 0.7, "--image-size", 96
    assert elip("export", "timm:test_vit", file, *options) == 0
    printed = capsys.readouterr().out
    assert difference(printed) < 1e-4
    assert "elip(schedule=" in printed and str(file) in printed
    session = onnxruntime.InferenceSession(file)
    (given,), (returned,) = session.get_inputs(), session.get_outputs()
    assert given.shape == ["batch", 3, 96, 96]
    assert re.search(rf"inputs +{given.name} \(batch, 3, 96, 96\)\n", printed)
    assert re.search(rf"outputs +{returned.name} \(batch, 1000\)\n", printed)
    assert [path.name for path in tmp_path.iterdir()] == ["vit.onnx"]


@pytest.mark.slow
def test_a_whole_clip_for_two_images(tmp_path, capsys):
    hf_clip().save_pretrained(tmp_path / "clip")
    file = tmp_path / "clip.onnx"
    spec = f"hf:{tmp_path / 'clip'}"
    assert elip("export", spec, file, "--strategy", "tome:r=4", "--batch", 2) == 0
    assert difference(capsys.readouterr().out) < 1e-4
    given = {each.name: each for each in onnx.load(file).graph.input}
    assert given.keys() == {"pixel_values", "input_ids"}
    assert given["pixel_values"].type.tensor_type.shape.dim[0].dim_value == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["timm:test_vit", "vit.pt"], "OUT.onnx: expected a name ending in .onnx, got vit.pt"),
        (["timm:test_vit", "none/vit.onnx"], "OUT.onnx: expected a file in a folder that exists"),
        (["clip_tiny", "vit.onnx"], "MODEL: expected an image model, CLIP, SigLIP or BLIP of timm"),
    ],
)
def test_wrong_arguments_are_one_line_and_write_nothing(
    arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert elip("export", *arguments, "--no-pretrained") == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_missing_extra_is_one_line_that_names_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(validation, "find_spec", lambda name: None)
    assert elip("export", "timm:test_vit", tmp_path / "vit.onnx") == 2
    expected = f"elip export needs onnx: {validation.install_command('onnx')}"
    assert expected in capsys.readouterr().err
