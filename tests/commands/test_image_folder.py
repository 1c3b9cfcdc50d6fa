"""Commands that read a folder of images preprocess them as `elip embed` does."""

import pytest
import torch
import transformers
from rich.console import Console

from elip_models.commands.image_folder import open_with_images
from elip_models.embedding.encoder import open_encoder
from elip_models.images import decode_image
from tests.helpers.damage import picture
from tests.helpers.models import dinov2


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(picture(0, size=(90, 60)))
    return path


@pytest.fixture
def dynamic(tmp_path):
    """Return a model that takes images of any size, with a processor to another size than its."""
    made = transformers.ViTImageProcessor(size={"height": 64, "width": 64}, image_mean=[0.1] * 3)
    for part in (dinov2(), made):
        part.save_pretrained(tmp_path / "model")
    return f"hf:{tmp_path / 'model'}"


@pytest.mark.parametrize("kind", ["timm", "transformers"])
def test_images_are_preprocessed_as_the_model_describes(kind, path, dynamic, capsys):
    spec = "timm:test_vit" if kind == "timm" else dynamic
    _, files = open_with_images(spec, [path], Console(stderr=True), pretrained=False)
    encoder = open_encoder(spec, pretrained=False, device="cpu")
    expected = encoder.preprocessing.transform(decode_image(path, ""))
    torch.testing.assert_close(files[0], expected, rtol=0, atol=0)
    side = expected.shape[-1]
    assert f"{side} x {side} pixels, by the model's own preprocessing ({kind})" in (
        capsys.readouterr().err.replace("\n", " ")
    )
