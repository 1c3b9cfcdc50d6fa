"""The statistics that normalise images come from the model or a local file; defaults warn."""

import socket
import warnings

import pytest
from transformers import CLIPImageProcessor, CLIPModel, ViTConfig, ViTModel

from elip_models.images import CLIP_STATS
from elip_models.towers import as_image_text, reducible_model
from elip_models.towers.hf_processor import image_stats_of
from tests.helpers.models import hf_clip

HALF = (0.5, 0.5, 0.5)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Record each address that is looked up; warnings were not given before."""
    addresses = []

    def look_up(host, *args, **kwargs):
        addresses.append(host)
        raise OSError(f"{host} was looked up")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    reducible_model._warn_default_stats.cache_clear()
    yield addresses
    assert not addresses


def vit(name=""):
    config = ViTConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        image_size=32, patch_size=16, name_or_path=name,
    )  # fmt: skip
    return ViTModel(config)


def test_a_model_of_the_hub_is_not_looked_up_and_its_default_warns_once():
    model = hf_clip()
    model.config.name_or_path = "an-owner/a-model-that-is-not-here"
    image_text = as_image_text(model)
    expected = r"CLIPModel stores no .* CLIP's are used: mean \(0\.48.*std \(0\.26.*load it"
    with pytest.warns(UserWarning, match=expected):
        stats = image_text.image_stats()
    assert stats == CLIP_STATS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert image_text.image_stats() == stats


def test_the_config_of_a_model_and_the_processor_in_its_folder_count(tmp_path):
    model = vit()
    assert image_stats_of(model) is None
    model.config.image_mean, model.config.image_std = HALF, HALF
    assert image_stats_of(model) == (HALF, HALF)
    hf_clip().save_pretrained(tmp_path)
    CLIPImageProcessor(image_mean=HALF, image_std=HALF).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = as_image_text(CLIPModel.from_pretrained(tmp_path))
        assert loaded.image_stats() == (HALF, HALF)
