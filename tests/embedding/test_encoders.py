"""Each form of model embeds as its own library does, with its own preprocessing."""

import json
from functools import partial

import numpy as np
import open_clip
import pytest
import timm
import torch
import transformers
from PIL import Image

import elip_models
from elip_models.embedding.encoder import open_encoder
from elip_models.pretraining.models.registry import create_model
from elip_models.validation import ConfigError
from tests.helpers.models import (
    OPEN_CLIP_TEXT,
    OPEN_CLIP_VISION,
    enlarged,
    hf_blip,
    hf_clip,
    hf_vision,
)
from tests.helpers.own_warnings import UNGUIDED


@pytest.fixture(scope="module")
def image():
    pixels = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@torch.no_grad()
def embedding(encoder, image):
    return encoder(encoder.preprocessing.transform(image)[None])


def processor(folder, size=48):
    made = transformers.CLIPImageProcessor(size={"shortest_edge": size}, crop_size=size)
    made.save_pretrained(folder)
    return made


def pixels_of(made, image):
    return made(images=image, return_tensors="pt")["pixel_values"]


def test_a_model_of_timm_embeds_before_its_classifier(model, image):
    encoder = open_encoder(model)
    assert encoder.dimension == 64 and encoder.strategy is None and not encoder.has_text
    plain = timm.create_model("test_vit", num_classes=0).eval()
    plain.load_state_dict(encoder.model.state_dict())
    config = timm.data.resolve_model_data_config(plain)
    pixels = timm.data.create_transform(**config, is_training=False)(image)[None]
    with torch.no_grad():
        assert torch.equal(embedding(encoder, image), plain(pixels))


def test_a_clip_of_open_clip_embeds_images_and_texts(image, tmp_path):
    text = OPEN_CLIP_TEXT | {"vocab_size": 49408, "context_length": 12}
    config = {"embed_dim": 16, "vision_cfg": OPEN_CLIP_VISION, "text_cfg": text}
    made = open_clip.CLIP(16, OPEN_CLIP_VISION, text).eval()
    elip_models.save_reduced(elip_models.reduce_(made, "tome"), tmp_path, config=config)
    encoder = open_encoder(str(tmp_path), reduce="none")
    assert encoder.has_text and encoder.dimension == 16
    assert encoder.preprocessing.described["mean"] == list(open_clip.OPENAI_DATASET_MEAN)
    elip_models.unreduce_(made)
    pixels = encoder.preprocessing.transform(image)[None]
    assert pixels.shape == (1, 3, 48, 48)
    tokens = open_clip.get_tokenizer("ViT-B-32", context_length=12)(["a dog", "a cat"])
    with torch.no_grad():
        torch.testing.assert_close(embedding(encoder, image), made.encode_image(pixels))
        texts, wanted = encoder.encode_texts(["a dog", "a cat"]), made.encode_text(tokens)
    torch.testing.assert_close(texts, wanted)


@pytest.mark.slow
def test_a_clip_of_transformers_embeds_images_and_texts(image, tmp_path, tokenizer):
    config = hf_clip().config
    config.text_config.vocab_size, config.text_config.max_position_embeddings = 600, 32
    made = enlarged(transformers.CLIPModel(config)).eval()
    made.save_pretrained(tmp_path)
    pixels = pixels_of(processor(tmp_path), image)
    tokenizer.save_pretrained(tmp_path)
    encoder = open_encoder(str(tmp_path))
    tokens = tokenizer(["a dog"], return_tensors="pt")
    with torch.no_grad():
        wanted = made.get_image_features(pixel_values=pixels).pooler_output
        torch.testing.assert_close(embedding(encoder, image), wanted)
        text = made.get_text_features(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
        )
    torch.testing.assert_close(encoder.encode_texts(["a dog"]), text.pooler_output)


@pytest.mark.slow
def test_a_blip_embeds_in_the_space_of_its_texts(image, tmp_path):
    made = enlarged(hf_blip()).eval()
    made.save_pretrained(tmp_path)
    pixels = pixels_of(processor(tmp_path), image)
    encoder = open_encoder(str(tmp_path))
    with torch.no_grad():
        tokens = made.vision_model(pixel_values=pixels).last_hidden_state
        wanted = torch.nn.functional.normalize(made.vision_proj(tokens[:, 0]), dim=-1)
        torch.testing.assert_close(embedding(encoder, image), wanted)


def test_a_model_without_preprocessing_names_the_option(image, tmp_path):
    hf_vision("ViTModel", "ViTConfig").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="pass preprocess='imagenet', 'clip' or a JSON file"):
        open_encoder(str(tmp_path))
    encoder = open_encoder(str(tmp_path), preprocess="imagenet")
    assert encoder.preprocessing.described["mean"] == [0.485, 0.456, 0.406]
    settings = {"size": 48, "crop": 0.5, "mean": [0.5] * 3, "std": [0.25] * 3}
    (tmp_path / "own.json").write_text(json.dumps(settings))
    encoder = open_encoder(str(tmp_path), preprocess=tmp_path / "own.json")
    white = encoder.preprocessing.transform(Image.new("RGB", (9, 9), "white"))
    torch.testing.assert_close(white, torch.full((3, 48, 48), 2.0))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"size": 48}, "expected crop, .*at least mean and std"),
        ({"mean": [0.5], "std": [0.5] * 3}, r"mean: expected \[a number, .*got \(0.5,\)"),
        ({"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "cubic"}, "interpolation: exp"),
    ],
)
def test_a_wrong_preprocessing_is_named(settings, message, model, tmp_path):
    (tmp_path / "own.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=f"preprocess: {message}"):
        open_encoder(model, preprocess=tmp_path / "own.json")


@UNGUIDED
def test_a_run_folder_embeds_with_its_own_reduction(image, tmp_path, tokenizer):
    made = create_model("elip_clip_tiny").eval()
    made.save_pretrained(tmp_path / "model", tokenizer)
    encoder = open_encoder(str(tmp_path))
    assert encoder.strategy.name == "elip" and encoder.has_text
    feature = embedding(encoder, image)
    torch.testing.assert_close(feature.norm(dim=1), torch.ones(1))
    assert encoder.encode_texts(["a dog", "two cats"]).shape == (2, encoder.dimension)
    (tmp_path / "model" / "tokenizer.json").unlink()  # it is read once
    assert encoder.encode_texts(["a dog"]).shape == (1, encoder.dimension)
    dense = open_encoder(str(tmp_path), reduce="none")
    assert dense.strategy is None
    tome = open_encoder(str(tmp_path), reduce="tome", keep=0.5)
    assert not torch.equal(embedding(dense, image), embedding(tome, image))


def test_a_model_that_scores_pairs_is_an_error():
    with pytest.raises(ConfigError, match="expected one that embeds an image without its text"):
        open_encoder("meter_tiny", pretrained=False)


@pytest.mark.slow
def test_a_convolutional_network_embeds_dense(image):
    encoder = open_encoder("timm:test_resnet", pretrained=False)
    assert embedding(encoder, image).shape == (1, encoder.dimension)
    with pytest.raises(ConfigError, match=r"reduce: .*convolutional network"):
        open_encoder("timm:test_resnet", pretrained=False, reduce="tome")


@pytest.mark.slow
def test_a_compiled_model_gives_the_same_embeddings(model, image, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # no compiler
    plain, compiled = open_encoder(model), open_encoder(model, compile=True)
    torch.testing.assert_close(embedding(compiled, image), embedding(plain, image))
    assert compiled.described()["compiled"] is True
