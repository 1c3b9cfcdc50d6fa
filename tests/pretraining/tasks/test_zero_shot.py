"""Zero-shot classification: classes by name, and encoding without text."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

from elip_models.intervals import wilson_interval
from elip_models.pretraining.data import open_classes
from elip_models.pretraining.tasks.task import Loading
from elip_models.pretraining.tasks.zero_shot import ZeroShot, class_features
from elip_models.pretraining.training.trainer import train
from elip_models.validation import ConfigError
from tests.helpers.tiny_run import own_process, tiny_config

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue_sky": (0, 0, 255)}


class SeesColours(nn.Module):
    """An image is its mean colour, a text the colours that it names; or nothing at all."""

    def __init__(self, *, blind=False):
        super().__init__()
        self.blind = blind
        self.scale = nn.Parameter(torch.ones(()))
        self.config = SimpleNamespace(image_size=8, resize="crop")

    def image_features(self, images):
        features = images.mean((2, 3)) - images.mean((1, 2, 3))[:, None]
        return nn.functional.normalize(features * (not self.blind), dim=-1)

    def tokenise(self, tokenizer, texts):
        words = [name.replace("_", " ") for name in COLOURS]
        return {"named": torch.tensor([[float(w in text) for w in words] for text in texts])}

    def text_features(self, named):
        return named


def colour_folder(folder, colours=COLOURS):
    for name, colour in colours.items():
        (folder / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (12, 10), colour).save(folder / name / f"{i}.png")
    return str(folder)


def top1(source, model=None):
    scores = ZeroShot().evaluate(model or SeesColours(), None, source)
    return scores.scores["top1"].mean


def test_a_folder_of_images_is_classified_by_the_names_of_its_folders(tmp_path):
    source = open_classes(colour_folder(tmp_path), image_size=8)
    assert source.classes == ("blue_sky", "green", "red")
    assert source.names == ("blue sky", "green", "red")
    assert source[2].captions == ("green",)
    model = SeesColours().train()
    scores = ZeroShot().evaluate(model, None, source, Loading(4))
    assert scores.scores == dict.fromkeys(("top1", "top5"), wilson_interval(1.0, 6))
    assert scores.baselines["chance"] == {"top1": 1 / 3, "top5": 1}
    assert (scores.num_examples, scores.num_skipped, scores.notes["classes"]) == (6, 0, "3")
    assert scores.summary() == "zero_shot: top1 100.0%, top5 100.0%"
    assert scores.metrics == {"zero_shot_top1": 1, "zero_shot_top5": 1}
    assert model.training


def test_a_class_is_the_mean_of_its_texts():
    features = class_features(SeesColours(), None, ["red", "green"], [str, "{} or red".format])
    half = 0.5 / (1 + 0.5**2) ** 0.5
    expected = torch.tensor([[1, 0, 0], [half, 2 * half, 0]])
    torch.testing.assert_close(features, expected)


def test_a_file_names_the_classes(tmp_path):
    folder, file = colour_folder(tmp_path / "images"), tmp_path / "names.json"
    file.write_text(json.dumps({"red": "dark red", "green": "lime", "blue_sky": "azure"}))
    source = open_classes(f"{folder},names={file}", image_size=8)
    assert source.classes == ("blue_sky", "green", "red")
    assert source.names == ("azure", "lime", "dark red")
    numbered = colour_folder(tmp_path / "numbers", dict(zip("012", COLOURS.values(), strict=True)))
    file.write_text(json.dumps(["red", "green", "blue sky"]))
    assert top1(open_classes(f"{numbered},names={file}", image_size=8)) == 1
    file.write_text(json.dumps(["red"]))
    with pytest.raises(ValueError, match="a name for each of the 3 classes, got none for '1'"):
        open_classes(f"{numbered},names={file}", image_size=8)


@pytest.mark.parametrize(
    ("recipe", "source", "message"),
    [
        ("clip_tiny", "emoji_classes", r"data\.zero_shot: .*emoji_classes:seed=0,"),
        ("meter_tiny", "emoji_classes:size=60", "report: expected no zero_shot, .* for METER"),
    ],
)
def test_an_unusable_setting_is_named(tmp_path, recipe, source, message):
    overrides = f"data.zero_shot={source}", "report=[zero_shot]"
    with own_process(), pytest.raises(ConfigError, match=message):
        train(tiny_config(tmp_path, *overrides, recipe=recipe))
