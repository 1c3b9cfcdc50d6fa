"""torch.export of a reduced model."""

import pytest
import torch

import elip_models
from tests.test_strategies import strategies
from tests.towers import clip_vit, images, text


@strategies
def test_a_guided_model_is_exported_with_its_guidance(strategy):
    if strategy.name in ("random", "patch_dropout"):
        pytest.skip("it draws, or does nothing in inference")
    model, x, t = clip_vit().eval(), images(), text()
    elip_models.reduce_(model, strategy=strategy)
    with torch.no_grad(), elip_models.guidance(model, t):
        expected = model(x)
        exported = torch.export.export(model, (x,)).module()
    assert torch.equal(exported(x), expected)
