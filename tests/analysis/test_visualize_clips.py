"""`elip visualize` on the clip of a video model: frames in, merged tubelets out."""

import pytest
import torch
from PIL import Image

import elip_models
from elip_models.analysis.merging import tokens_of_patches
from elip_models.analysis.visualize import patch_grid
from elip_models.analysis.visualize_inputs import open_visualized_model, read_pairs
from elip_models.commands.inspect_model import read_source
from elip_models.towers import as_tower
from elip_models.validation import ConfigError
from tests.helpers.tiny_run import elip
from tests.towers.test_transformers import inputs, model_of

LAYERS = ["VideoMAELayer", "VivitLayer"]


def frames(count):
    """Frames with one grey level each, so that the order is seen."""
    return [Image.new("RGB", (64, 48), (20 * i, 20 * i, 20 * i)) for i in range(count)]


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "frames"
    path.mkdir()
    for i, frame in enumerate(frames(10)):
        frame.save(path / f"{i:03d}.png")
    return path


@pytest.fixture
def gif(tmp_path):
    path = tmp_path / "clip.gif"
    first, *others = frames(10)
    first.save(path, save_all=True, append_images=others)
    return path


def test_an_error_names_what_a_clip_is(folder, gif, tmp_path):
    (tmp_path / "clip.mp4").write_bytes(b"video")
    cases = {"clip.gif": "at least 11 frames, got 10", "clip.mp4": "not a readable image"}
    cases |= {"frames": "at least 11 frames, got 10"}
    for name, reason in cases.items():
        expected = f"--image: expected a folder of 11 frames or more, or a GIF.*got .*{name}: "
        with pytest.raises(ConfigError, match=f"{expected}.*{reason}.*ffmpeg -i clip.mp4"):
            read_pairs([tmp_path / name], [], num_frames=11)
    with pytest.raises(ConfigError, match=r"--image: .*frames: not a file"):
        read_pairs([folder], [])
    with pytest.raises(ConfigError, match=r"--data: .* 4 frames, got"):
        read_source("emoji_scenes:size=5", 2, as_tower(model_of("VivitLayer")))


@torch.no_grad()
@pytest.mark.parametrize("layer", [*LAYERS, "VJEPA2Layer"])
def test_encode_image_takes_clips_and_gives_each_tubelet_its_token(layer):
    model, clips = model_of(layer), inputs(layer)
    tower = as_tower(model)
    assert (tower.num_frames, tower.num_steps, patch_grid(tower)) == (4, 2, (6, 6))
    tokens, infos = elip_models.encode_image(model, clips, strategy="tome", return_info=True)
    assert tokens.shape[1] == infos[-1].sizes.shape[1] < tower.size.num_tokens
    with elip_models.record_stages(elip_models.reduce_(model, strategy="tome")) as recorded:
        model(clips)
    found = (tokens_of_patches(each, 72)[-1] for each in (infos, recorded))
    assert torch.equal(*found)
    elip_models.unreduce_(model)
    with pytest.raises(ValueError, match=r"images: expected a .* \(B, 4, 3, H, W\), got \(2, 3"):
        elip_models.encode_image(model, clips[:, 0])


@pytest.mark.slow
@pytest.mark.parametrize("layer", LAYERS)
def test_the_command_draws_one_picture_of_a_clip(layer, folder, gif, tmp_path, capsys):
    model_of(layer).save_pretrained(tmp_path / "model")
    model, output = f"hf:{tmp_path / 'model'}", tmp_path / "clip.png"
    paths = ["--image", folder, "--image", gif, "--output", output]
    assert elip("visualize", "--model", model, *paths, "--keep", 0.5) == 0
    assert capsys.readouterr().out.split() == [str(output)]
    assert Image.open(output).height > 900
    pictured = open_visualized_model(model)
    assert pictured.pixels([frames(4)]).shape == (1, 4, 3, 48, 48)
    assert elip("visualize", "--model", model, "--image", folder / "000.png") != 0
    assert "expected at least 4 frames, got 1; ffmpeg" in capsys.readouterr().err
