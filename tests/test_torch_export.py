"""torch.export of a reduced model."""

import pytest
import torch

import elip_models
from tests.models import ids, open_clip_pair
from tests.test_strategies import strategies
from tests.towers import SCHEDULE, clip_vit, images, text


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


def test_a_whole_model_is_exported_with_its_own_guidance():
    """Of our ops only those of the reduction: none that asks which thread guides."""
    model = elip_models.reduce_(open_clip_pair().eval(), schedule=SCHEDULE)
    x, tokens = images(), ids()
    with torch.no_grad():
        expected = model(x, tokens)["image_features"]
        program = torch.export.export(model, (x, tokens))
        got = program.module()(x, tokens)["image_features"]
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
    ours = {str(n.target) for n in program.graph.nodes if str(n.target).startswith("elip.")}
    assert ours == {"elip.score_reduce.default"}
