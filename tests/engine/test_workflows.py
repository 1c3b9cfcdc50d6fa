"""Workflows of timm, transformers and PyTorch with a reduced model."""

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import elip_models

VIT = {"depth": 6, "embed_dim": 32, "num_heads": 2, "num_classes": 5, "img_size": 64}


def vit(**options):
    return timm.create_model("vit_base_patch16_224", **(VIT | options)).eval()


def reduced(keep=0.6, **options):
    return elip_models.reduce_(vit(**options), keep=keep)


def x(batch=2):
    return torch.randn(batch, 3, 64, 64)


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
