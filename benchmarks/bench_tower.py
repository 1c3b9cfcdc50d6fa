"""A ViT-B/16 tower at 256 px: training, inference and saved bytes against timm's dense tower."""

import warnings

import timm
import torch

import elip_models
from elip_models.profile import profile_tower
from elip_models.reduction.schedule import PRESETS

SCHEDULE = PRESETS["albef"]


def check_parity(model, images, text):
    """The dense loop is timm's own forward, and `exact` keeps what `official` keeps."""
    dense = elip_models.encode_image(model, images, text, schedule="12(100%)")
    assert torch.equal(dense, model.forward_features(images))
    runs = [
        elip_models.encode_image(
            model, images, text, schedule=SCHEDULE, scorer=scorer, return_info=True
        )
        for scorer in ("official", "exact")
    ]
    torch.testing.assert_close(runs[0][0], runs[1][0], atol=1e-4, rtol=0)
    for official, exact in zip(runs[0][1], runs[1][1], strict=True):
        assert torch.equal(official.reduction.kept, exact.reduction.kept)


def test_vit_b16_at_256(benchmark, report, device):
    warnings.filterwarnings("ignore", message="scorer=")
    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_224", img_size=256, num_classes=0).to(device)
    batch_size = 4 if device.type == "cpu" else 64
    images = torch.randn(batch_size, 3, 256, 256, device=device)
    with torch.no_grad():
        check_parity(model, images, torch.randn(batch_size, 768, device=device))
    costs = profile_tower(
        model, schedule=SCHEDULE, batch_size=batch_size, image_size=256, rounds=10
    )
    ratios = {
        f"{cost.scorer}, {kind}": getattr(cost, kind)
        for kind in ("training", "inference", "saved")
        for cost in costs
    }
    report(ratios, shape=[batch_size, 3, 256, 256], schedule=SCHEDULE)
    with torch.inference_mode():
        benchmark.pedantic(model.forward_features, (images,), rounds=2)
