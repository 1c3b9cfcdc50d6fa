"""Workflows of timm, transformers, open_clip and PyTorch with a reduced model."""

import copy

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from timm.utils import ModelEmaV3
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils.flop_counter import FlopCounterMode

import elip_models
from tests.helpers.models import hf_clip
from tests.helpers.towers import images

BY_ANY = pytest.mark.parametrize("how", [{}, {"strategy": "elip"}], ids=["default", "elip"])
VIT = {"depth": 6, "embed_dim": 32, "num_heads": 2, "num_classes": 5, "img_size": 64}


def vit(**options):
    return timm.create_model("vit_base_patch16_224", **(VIT | options)).eval()


def reduced(keep=0.6, **options):
    return elip_models.reduce_(vit(**options), keep=keep)


def x(batch=2):
    return torch.randn(batch, 3, 64, 64)


@pytest.fixture(scope="module")
def tokenizer():
    """Return a tokenizer of a few words, with the end of text that CLIP's text tower needs."""
    words = [
        "[PAD]",
        "[UNK]",
        *["a", "photo", "of", "cat", "dog", "red", "bird"],
    ]
    vocab = {word: i for i, word in enumerate(words)} | {"[EOS]": 49}
    found = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    found.post_processor = processors.TemplateProcessing(
        single="$A [EOS]", special_tokens=[("[EOS]", 49)]
    )
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "eos_token": "[EOS]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=found, model_max_length=8, **names)


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 48, 3), dtype=np.uint8))


def processor():
    size = {"height": 48, "width": 48}
    return transformers.CLIPImageProcessor(size={"shortest_edge": 48}, crop_size=size)


# transformers


@BY_ANY
def test_zero_shot_pipeline_with_more_prompts_than_images(tokenizer, picture, tmp_path, how):
    model = elip_models.reduce_(hf_clip().eval(), keep=0.6, **how)
    parts = {"tokenizer": tokenizer, "image_processor": processor()}
    labels = {"candidate_labels": ["cat", "red dog", "bird"], "hypothesis_template": "a {}"}

    def scores(model):
        pipe = transformers.pipeline("zero-shot-image-classification", model=model, **parts)
        return {each["label"]: each["score"] for each in pipe(picture, **labels)}

    found = scores(model)
    assert len(found) == 3
    dense = scores(elip_models.unreduce_(copy.deepcopy(model)))
    assert found != dense
    model.save_pretrained(tmp_path)
    again = elip_models.reduce_(transformers.CLIPModel.from_pretrained(tmp_path))
    for other in (again, elip_models.load_reduced(tmp_path)):
        assert scores(other) == pytest.approx(found, rel=1e-5) != dense


def test_image_features_alone():
    model, pixels = hf_clip().eval(), images()
    dense = model.get_image_features(pixels).pooler_output
    elip_models.reduce_(model, keep=0.6)
    found = model.get_image_features(pixels).pooler_output
    assert found.shape == dense.shape and not torch.allclose(found, dense)


# open_clip


# timm


def test_model_ema_of_timm_follows_and_stays_reduced():
    model = reduced()
    ema = ModelEmaV3(model, decay=0.5)
    with torch.no_grad():
        model.head.weight.add_(1.0)
    ema.update(model)
    assert elip_models.is_reduced(ema.module)
    assert torch.allclose(ema.module.head.weight, model.head.weight - 0.5)


# PyTorch


def test_the_flop_counter_sees_the_saving():
    counts = []
    for model in (vit(), reduced()):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x(1))
        counts.append(counter.get_total_flops())
    assert counts[1] < 0.8 * counts[0]


def test_the_meta_device_and_back():
    with torch.device("meta"):
        model = reduced()
    model.to_empty(device="cpu").load_state_dict(vit().state_dict())
    assert torch.isfinite(model(x())).all()


def test_channels_last_images_and_an_empty_batch():
    model, pixels = reduced(), x()
    found = model(pixels.to(memory_format=torch.channels_last))
    torch.testing.assert_close(found, model(pixels))
    assert model(pixels[:0]).shape == (0, 5)


# accelerate, peft
