"""The guidance of an image by a caption: its leak into the features."""

import torch
import torch.nn.functional as F

import elip_models
from tests.helpers.towers import SCHEDULE, clip_vit, images, text


def test_guidance_leaks_unseen_captions_into_features_of_noise():
    """Probe the captions from the features of one noise image.

    All images are the same, so the features depend on the guidance alone. Without it, the probe is
    at chance level.
    """
    model, captions, chance = clip_vit().eval(), text(320), 1 / 16
    same = images(1).expand(320, -1, -1, -1)

    def accuracy(**options):
        with torch.no_grad():
            tokens = elip_models.encode_image(model, same, captions, schedule=SCHEDULE, **options)
        features = tokens[:, 0].double()
        features = torch.cat([features - features.mean(0), torch.ones(320, 1)], dim=1)
        seen, targets = features[:256], captions[:256].double()
        ridge = seen.T @ seen + 1e-3 * torch.eye(seen.shape[1])
        read = F.normalize(features[256:] @ torch.linalg.solve(ridge, seen.T @ targets), dim=1)
        similar = (
            read.view(4, 16, -1) @ F.normalize(captions[256:].double(), dim=1).view(4, 16, -1).mT
        )
        return (similar.argmax(2) == torch.arange(16)).float().mean().item()

    assert accuracy(fusion=1.0) == chance
    assert accuracy(fusion=0.8) > 5 * chance
    assert accuracy(fusion=0.8, guidance_norm="match") > 5 * chance
